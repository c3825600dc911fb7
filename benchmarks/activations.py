"""Weights of 4 bits with activations and a KV cache of 16, 8 and 4: round-to-nearest, scales only
and LR-QAT on the same tokens.

    python benchmarks/activations.py                            # the demo model
    python benchmarks/activations.py --model smollm2 --steps 15

Every figure is kept in OUTPUT/activations.json as soon as it is there; the next call goes on from
there, and the table at the end has what there is. ``--minutes``: begin nothing new after that time.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from peft_lrqat import LRQATConfig
from peft_lrqat.demo.run import DemoArguments, Experiment, freeze_factors, prepare
from peft_lrqat.trainer.pipeline import load_base


SCHEMES = {
    "W4A16": {},
    "W4A8": {"activation_bits": 8},
    "W4A8KV4": {"activation_bits": 8, "kv_cache_bits": 4},
    "W4A4KV4": {"activation_bits": 4, "kv_cache_bits": 4},
}
METHODS = ("RTN", "scales only", "LR-QAT")


def measure(experiment: Experiment, method: str, fields: dict) -> dict:
    """One cell of the table: held-out perplexity and seconds of training."""
    set_seed(experiment.seed)
    base, _ = load_base(str(experiment.base), experiment.setup.dtype)
    config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", bits=4, **fields)
    model: PeftModel = get_peft_model(base, config)
    setup, seconds, rates = experiment.setup, 0.0, {}
    if method != "RTN":
        rates = {"scales": setup.scales_only_learning_rate}
        if method == "scales only":
            freeze_factors(model)
        else:
            rates = {"factors": setup.learning_rate, "scales": setup.scale_learning_rate}
        seconds, _ = experiment.train(model, method, scales_only=method == "scales only")
    return {"perplexity": experiment.perplexity(model), "seconds": seconds, "rates": rates}


def table(results: dict) -> str:
    """The rows that there are, in Markdown."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for scheme in SCHEMES:
        cells = [results.get(f"{scheme} {method}") for method in METHODS]
        lines.append(
            f"| {scheme} | "
            + " | ".join(f"{c['perplexity']:.2f}" if c else "" for c in cells)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--steps", type=int, help="of training; left out: the demo's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs=2,
        help="of LR-QAT's factors and scales; left out: the demo's",
    )
    parser.add_argument("--rows", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument(
        "--windows", type=int, help="of the held-out text, the first; left out: all"
    )
    parser.add_argument(
        "--minutes", type=float, default=7, help="begin nothing new after this time"
    )
    parser.add_argument("--output", type=Path, default=Path("activations-output"))
    args = parser.parse_args()
    start = time.monotonic()
    disable_progress_bar()
    experiment = prepare(
        DemoArguments(model=args.model, steps=args.steps, seed=args.seed, output=str(args.output))
    )
    if args.learning_rates is not None:
        rates = dict(
            zip(("learning_rate", "scale_learning_rate"), args.learning_rates, strict=True)
        )
        experiment = dataclasses.replace(
            experiment, setup=dataclasses.replace(experiment.setup, **rates)
        )
    if args.windows is not None:
        heldout = experiment.heldout[: args.windows * experiment.setup.window]
        experiment = dataclasses.replace(experiment, heldout=heldout)
    path = args.output / "activations.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    setting = {
        "model": args.model,
        "steps": experiment.steps,
        "seed": args.seed,
        "windows": args.windows,
        "threads": torch.get_num_threads(),
    }
    if results.setdefault("setting", setting) != setting:
        parser.error(
            f"{path} has figures of {results['setting']}, but these would be of {setting}; give "
            "another --output"
        )

    def store(name: str, cell: dict) -> None:
        results[name] = cell
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(name, cell, flush=True)

    if "unquantised" not in results:
        model, _ = load_base(str(experiment.base), experiment.setup.dtype)
        store("unquantised", {"perplexity": experiment.perplexity(model), "seconds": 0.0})
    for scheme in args.rows:
        for method in METHODS:
            if f"{scheme} {method}" in results:
                continue
            if time.monotonic() - start > 60 * args.minutes:
                print("time is up; call again to go on")
                print(table(results))
                return
            store(f"{scheme} {method}", measure(experiment, method, SCHEMES[scheme]))
    setup = experiment.setup
    print(
        f"{setting}, {setup.batch_size} x {setup.window} tokens a step; unquantised "
        f"{results['unquantised']['perplexity']:.2f}"
    )
    print(table(results))


if __name__ == "__main__":
    main()
