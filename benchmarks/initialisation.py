"""Time and memory of making a model low-bit: the search for the first scales, and the downcast.

    python benchmarks/initialisation.py                     # SmolLM2-135M, and one block of a 7B
    Llama: about 2 minutes on 2 cores python benchmarks/initialisation.py --models 7b --bits 2
    --group_size 128 --asymmetric

Every model runs in processes of its own, one for time and one for memory. Of the 7B one, a single
block of random bfloat16 weights is made; its seconds, times 32, are the model's. Peak: growth of
the resident set from before ``get_peft_model`` to its largest during it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from peft import get_peft_model
from process import MB, in_own_process, peak_bytes, resident
from torch import nn
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import LRQATConfig
from peft_lrqat.demo.smollm2 import load_smollm2


# Outputs and inputs of the linear layers of a block.
BLOCK_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def make_block() -> nn.Module:
    block = nn.ModuleList(
        nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16) for rows, columns in BLOCK_7B
    )
    for linear in block:
        nn.init.normal_(linear.weight, std=0.02)
    return nn.ModuleDict({"block": block})


# How to make it, and how many of it the whole model has.
MODELS = {"smollm2": (lambda: load_smollm2(torch.bfloat16)[0], 1), "7b": (make_block, 32)}


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    make, count = MODELS[name]
    model = make()
    config = LRQATConfig(
        r=16,
        target_modules="all-linear",
        bits=args.bits,
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        range_estimator=args.range_estimator,
    )
    weights = sum(
        m.weight.numel()
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    )
    before, seconds = resident(), []

    def run() -> None:
        start = time.perf_counter()
        get_peft_model(model, config)
        seconds.append(time.perf_counter() - start)

    peak = peak_bytes(run) - before
    return {"weights": weights * count, "seconds": seconds[0] * count, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=-1)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--range_estimator", default="lp")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    if args.child:
        print(json.dumps(measure(args.models[0], args)))
        return
    print(
        f"{torch.get_num_threads()} threads, {args.bits} bits, group size {args.group_size}, "
        f"{args.range_estimator}"
    )
    rest = [word for word in sys.argv[1:] if word not in ("--models", *MODELS)]
    for name in args.models:
        timed, measured = (
            in_own_process(__file__, *rest, "--models", name, "--child", for_memory=memory)
            for memory in (False, True)
        )
        print(
            f"{name:8} {timed['weights'] / 1e6:6.0f} million weights: {timed['seconds']:6.1f} s "
            "for all, "
            f"peak {measured['peak'] / MB:5.0f} MB above the model",
            flush=True,
        )


if __name__ == "__main__":
    main()
