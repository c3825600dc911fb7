"""The command `lrqat`: trains, evaluates, exports, packs adapters, runs the demo."""

import argparse
import sys
from collections.abc import Sequence

from .adapters import run_dequantize_adapter, run_quantize_adapter
from .demo import run_demo
from .evaluate import run_eval
from .export import run_export, run_recipe
from .train import run_train


COMMANDS = {
    "train": (run_train, "train an LR-QAT adapter on a text"),
    "eval": (run_eval, "perplexity of a model, with or without an adapter"),
    "quantize-adapter": (run_quantize_adapter, "store a trained LoRA adapter at a few bits"),
    "dequantize-adapter": (run_dequantize_adapter, "make a standard LoRA adapter of such a one"),
    "recipe": (run_recipe, "settings to train with for a runtime"),
    "export": (run_export, "write a trained model for a runtime, no weight changed"),
    "demo": (run_demo, "LR-QAT against its baselines on a small model, offline, in a few minutes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="lrqat",
        description="LR-QAT: low-rank quantisation-aware training of language models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:18} {about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=COMMANDS, help="what to do; `lrqat COMMAND --help` tells more"
    )
    command, _ = COMMANDS[parser.parse_args(argv[:1]).command]
    return command(argv[1:])
