"""Time and memory of a training step: LR-QAT against LoRA, full QAT, and LR-QAT as published
(autograd, checkpointed).

    python benchmarks/step.py                                            all of it: about two hours
    on 2 cores python benchmarks/step.py --cases 4096x4096 --tokens 2048            one layer: a few
    minutes python benchmarks/step.py --cases 1024x1024 --tokens 256 --rounds 3  a look, in seconds
    python benchmarks/step.py --cases smollm2 --variants "LoRA" "LR-QAT, fixed8" --groups -1

A case is a linear layer of out x in, forward and backward, or SmolLM2-135M on sequences of 512,
with AdamW. Weights are bfloat16, grids have 4 bits, factors rank 32. All variants of a case run in
one process, in turn; the table gives medians of the rounds and their ratio to LoRA with bfloat16
factors. Then each runs in a process of its own for the peak of one step: on Linux of the resident
set, above the imports. Results are added to results.json in ``--output`` and plotted from there.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from process import MB, in_own_process, peak_bytes, resident
from torch import nn
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from variants import VARIANTS

from peft_lrqat import LRQATLayer
from peft_lrqat.demo.smollm2 import load_smollm2
from peft_lrqat.quant import Grid, inspect_rows


REFERENCE = "LoRA, bf16 factors"
SEQUENCE = 512
PLOTTED = (
    REFERENCE,
    "full QAT (LSQ)",
    "LR-QAT, naive autograd",
    "LR-QAT, checkpointed",
    "LR-QAT, fixed8",
    "LR-QAT, int",
)


def spread_factors(model: nn.Module) -> None:
    """B such that gamma * B @ A has a deviation of a quarter of a step, as after training: some
    weights are clipped then.
    """
    for layer in model.modules():
        if isinstance(layer, LRQATLayer):
            deviation = (
                0.25
                * (3 * layer.in_features / layer.r["default"]) ** 0.5
                / layer.scaling["default"]
            )
            nn.init.normal_(layer.lrqat_B["default"], std=deviation)


def clipped_share(model: nn.Module) -> float:
    """Of some weights of every LR-QAT layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, LRQATLayer)]
    if not layers:
        return 0.0
    found = [
        inspect_rows(m.low_rank_weight("default"), torch.arange(min(64, m.out_features)))[1]
        for m in layers
    ]
    return sum(int(f.sum()) for f in found) / sum(f.numel() for f in found)


def make_step(
    variant: str, case: str, tokens: int, group_size: int
) -> tuple[Callable[[], None], float]:
    """What is measured, and the share of clipped weights in it."""
    torch.manual_seed(0)
    grid = Grid(bits=4, group_size=group_size)
    if case == "smollm2":
        base, tokenizer = load_smollm2(torch.bfloat16)
        model = VARIANTS[variant](base, grid).train()
        ids = torch.randint(0, len(tokenizer), (max(1, tokens // SEQUENCE), min(tokens, SEQUENCE)))
        spread_factors(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, clipped_share(model)
    rows, columns = map(int, case.split("x"))
    # Normal weights in small groups are like those of real models.
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(linear.weight, std=0.02)
    model = VARIANTS[variant](nn.Sequential(linear), grid).train()
    spread_factors(model)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, requires_grad=True)
    grad_y = torch.randn(tokens, rows, dtype=torch.bfloat16)

    def layer_step() -> None:
        model(x).backward(grad_y)
        model.zero_grad()
        x.grad = None

    return layer_step, clipped_share(model)


def measure_times(
    args: argparse.Namespace, case: str, tokens: int, group_size: int
) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds of a step, for all variants in turn."""
    steps = {name: make_step(name, case, tokens, group_size) for name in args.variants}
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, (step, _) in steps.items():
            start = clock()
            step()
            if round_:  # the first one warms up
                seconds[name].append(clock() - start)
    return {
        name: {
            "seconds": statistics.median(s),
            "least": min(s),
            "most": max(s),
            "clipped": steps[name][1],
        }
        for name, s in seconds.items()
    }


def measure_memory(case: str, tokens: int, group_size: int, variant: str) -> int:
    """Bytes of the peak of a step above the imports, in a process of its own."""
    setting = [
        "--cases",
        case,
        "--tokens",
        str(tokens),
        "--groups",
        str(group_size),
        "--variants",
        variant,
    ]
    return in_own_process(__file__, *setting, "--child")


def table(rows: dict[str, dict[str, float]]) -> str:
    reference = rows.get(REFERENCE, next(iter(rows.values())))
    lines = [
        f"{'':26} {'seconds':>8} {'least':>7} {'most':>7} {'of LoRA':>8} {'peak, MB':>9} "
        f"{'less':>7} {'clipped':>8}"
    ]
    for name, row in rows.items():
        peak, less = row.get("peak"), None
        if peak is not None and "peak" in reference:
            less = (reference["peak"] - peak) / MB
        lines.append(
            f"{name:26} {row['seconds']:8.3f} {row['least']:7.3f} {row['most']:7.3f} "
            f"{row['seconds'] / reference['seconds']:8.2f} "
            + (f"{peak / MB:9.0f} " if peak is not None else f"{'-':>9} ")
            + (f"{less:7.0f} " if less is not None else f"{'-':>7} ")
            + f"{row['clipped']:8.2%}"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, float]]], group_size: int, path: Path) -> None:
    """Time and memory against tokens (one layer) and against the size of a layer (one number of
    tokens).
    """
    by_key = {tuple(json.loads(key)): rows for key, rows in results.items()}
    layers = {k: r for k, r in by_key.items() if k[0] != "smollm2" and k[2] == group_size}
    if not layers:
        return
    cases, counts = [k[0] for k in layers], [k[1] for k in layers]
    case = max(set(cases), key=cases.count)
    count = max(set(counts), key=counts.count)
    sweeps = {
        f"{case}, tokens": [(k[1], r) for k, r in layers.items() if k[0] == case],
        f"{count} tokens, million weights": [
            (int.__mul__(*map(int, k[0].split("x"))) / 1e6, r)
            for k, r in layers.items()
            if k[1] == count
        ],
    }
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, (label, points) in enumerate(sweeps.items()):
        for row, (field, unit, name) in enumerate(
            (("seconds", 1, "seconds a step"), ("peak", MB, "peak, MB"))
        ):
            ax = axes[row][column]
            for variant in PLOTTED:
                line = sorted(
                    (x, r[variant][field] / unit) for x, r in points if field in r.get(variant, {})
                )
                if line:
                    ax.plot(*zip(*line, strict=True), marker="o", label=variant)
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel=name)
            ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", default=["1024x1024", "4096x4096", "11008x4096", "smollm2"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument(
        "--groups",
        nargs="+",
        type=int,
        default=[-1, 128],
        help="group sizes; -1 is one scale per row",
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the process's CPU time, on a machine that others use",
    )
    parser.add_argument("--output", type=Path, default=Path("step-benchmark"))
    parser.add_argument("--plot", action="store_true", help="only plot what is in --output")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    warnings.simplefilter("ignore")
    if args.child:
        start = resident()
        step, _ = make_step(args.variants[0], args.cases[0], args.tokens[0], args.groups[0])
        step()  # makes the optimizer's state and workspaces
        print(peak_bytes(step) - start)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if not args.plot:
        if "torchao QAT + LoRA" not in VARIANTS:
            print(
                "torchao is not installed (`pip install --no-deps torchao`): its QAT + LoRA is "
                "left out"
            )
        print(
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of "
            f"{args.rounds} rounds"
        )
        settings = [(c, t, g) for c in args.cases for t in args.tokens for g in args.groups]
        for case, tokens, group_size in settings:
            rows = measure_times(args, case, tokens, group_size)
            gc.collect()
            if not args.no_memory and sys.platform == "linux":
                for name, row in rows.items():
                    row["peak"] = measure_memory(case, tokens, group_size, name)
            scales = "one scale per row" if group_size == -1 else f"groups of {group_size}"
            print(f"\n{case}, {tokens} tokens, {scales}\n{table(rows)}", flush=True)
            results.setdefault(json.dumps([case, tokens, group_size]), {}).update(rows)
            file.write_text(json.dumps(results, indent=1) + "\n")
    for group_size in args.groups:
        name = "per-row" if group_size == -1 else f"g{group_size}"
        plot(results, group_size, args.output / f"step-{name}.png")


if __name__ == "__main__":
    main()
