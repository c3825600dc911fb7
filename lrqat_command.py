"""The console script `lrqat`: finds the command, and imports torch only to run one.

This file lies outside `peft_lrqat` because importing that package registers the adapter types with
PEFT, which takes seconds. `lrqat --help` and `lrqat --version` answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


INTERRUPTED = 128 + signal.SIGINT  # as shells report it
SECONDS_BETWEEN_LINES = 30  # of a progress bar that is not on a terminal
# By name: the module in peft_lrqat/cli and its function, and what the command does.
COMMANDS = {
    "train": ("train:run_train", "train an LR-QAT adapter on a text or on chats"),
    "prepare": (
        "prepare:run_prepare",
        "make a low-bit base of a model, or of a GPTQ, AWQ or compressed-tensors checkpoint",
    ),
    "eval": ("evaluate:run_eval", "measure models: perplexity, and scores in tasks"),
    "compare": (
        "evaluate:run_compare",
        "measure how far the predictions of models are from those of a reference",
    ),
    "plot": ("plot:run_plot", "draw what training logged: losses, integers, scales, rates"),
    "info": ("info:run_info", "tell what an adapter, a model or a file is, and what runs it"),
    "plan": ("plan:run_plan", "tell what memory training takes, and how large the result is"),
    "recipe": ("recipe:run_recipe", "print the settings to train with for a runtime"),
    "export": ("export:run_export", "write a trained model for a runtime, every weight unchanged"),
    "quantize-adapter": (
        "adapters:run_quantize_adapter",
        "store a trained LoRA or LR-QAT adapter at a few bits",
    ),
    "dequantize-adapter": (
        "adapters:run_dequantize_adapter",
        "turn an adapter stored at a few bits into a standard one",
    ),
    "demo": (
        "demo:run_demo",
        "compare LR-QAT with its baselines on a small model, offline, in a few minutes",
    ),
    "env": ("env:run_env", "print versions and devices for a bug report"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lrqat: error: {message} (commands: lrqat --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not sys.stderr.isatty():
        # In a log file each state of a bar is a line; tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS_BETWEEN_LINES))
    # transformers renames its checkpointing switch, and PEFT asks by the old name.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
    try:
        command = _find_command(argv[:1])
        return command(argv[1:])
    except KeyboardInterrupt:
        print(f"lrqat {argv[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _find_command(argv: Sequence[str]) -> Callable[[Sequence[str]], int]:
    """The function of a command; ends the program for help, the version and unknown commands."""
    parser = _Parser(
        prog="lrqat",
        usage="lrqat COMMAND [options]",
        description="LR-QAT: low-rank quantisation-aware training of language models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:19} {about}" for name, (_, about) in COMMANDS.items())
        + "\n\n`lrqat COMMAND --help` explains the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"peft-lrqat {_version()}")
    name = parser.parse_args(argv).command
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        parser.error(
            f"`{name}` is not a command"
            + (f"; did you mean `{close[0]}`?" if close else f"; use one of {', '.join(COMMANDS)}")
        )
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(f"peft_lrqat.cli.{module}"), function)


def _version() -> str:
    """The version of the package that would be imported, without importing it."""
    package = find_spec("peft_lrqat")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("`peft_lrqat` is not installed; run `pip install peft-lrqat`")
    return runpy.run_path(str(Path(package.origin).with_name("_version.py")))["__version__"]
