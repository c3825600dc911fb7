"""What the gradient of clipped weights is worth, and what a low-rank product in bfloat16 would
cost.

    python benchmarks/estimators.py                            # the demo model at 4, 3 and 2 bits:
    about 5 minutes on 2 idle cores python benchmarks/estimators.py --model smollm2 --bits 3   #
    SmolLM2-135M: about 4 minutes for each row

Each width trains twice from the same adapter on the same batches: with the exact gradient, in which
clipped weights have no part, and with the pass-through estimator
(``LRQATConfig(clipped_gradient="pass_through")``). Perplexity: held-out help topics.

    clipped   share of all target weights that lie outside the grid, before and after training
    flipped   share of the integers that would be others, had gamma * B @ A been computed from
    bfloat16 factors; after training
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import LRQATLayer
from peft_lrqat.demo.run import SETUPS, DemoArguments, prepare
from peft_lrqat.quant import inspect_rows
from peft_lrqat.trainer.pipeline import load_base


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SETUPS), default="tiny")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--steps", type=int, help="left out: as in the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gradients", nargs="+", default=["zero", "pass_through"])
    parser.add_argument(
        "--output",
        default="estimator-benchmark",
        help="directory for the base model and the results",
    )
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    for seed in args.seeds:
        demo = prepare(
            DemoArguments(model=args.model, steps=args.steps, output=args.output, seed=seed)
        )
        base, _ = load_base(str(demo.base), demo.setup.dtype)
        print(
            f"{args.model}, seed {seed}, unquantised: perplexity {demo.perplexity(base):.3f}",
            flush=True,
        )
        for bits in args.bits:
            for gradient in args.gradients:
                row = {"model": args.model, "bits": bits, "gradient": gradient, "seed": seed}
                row |= one_run(demo, bits, gradient, seed)
                print(json.dumps(row), flush=True)
                with open(Path(args.output) / "results.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")


def one_run(demo, bits: int, gradient: str, seed: int) -> dict[str, float]:
    model = demo.adapted(bits, group_size=-1, balanced=False, clipped_gradient=gradient)
    before = clipped_share(model)
    seconds, _ = demo.train(model, f"{bits} bits, {gradient}", scales_only=False)
    return {
        "steps": demo.steps,
        "tokens": demo.steps * demo.setup.batch_size * demo.setup.window,
        "perplexity": round(demo.perplexity(model), 3),
        "clipped before": before,
        "clipped": clipped_share(model),
        "flipped": flipped_share(model),
        "seconds": round(seconds, 1),
    }


def weights_of(model):
    """Of every target: the quantised weight and the indices of all its rows."""
    for layer in model.modules():
        if isinstance(layer, LRQATLayer):
            yield layer.low_rank_weight("default"), torch.arange(layer.out_features)


def clipped_share(model) -> float:
    clipped = [inspect_rows(weight, rows)[1] for weight, rows in weights_of(model)]
    return sum(int(c.sum()) for c in clipped) / sum(c.numel() for c in clipped)


@torch.no_grad()
def flipped_share(model) -> float:
    flipped = total = 0
    for weight, rows in weights_of(model):
        codes, _ = inspect_rows(weight, rows)
        # Products of bfloat16 are exact in float32, in which matrix units add them up.
        short = replace(weight, A=weight.A.bfloat16().float(), B=weight.B.bfloat16().float())
        flipped += int((inspect_rows(short, rows)[0] != codes).sum())
        total += codes.numel()
    return flipped / total


if __name__ == "__main__":
    main()
