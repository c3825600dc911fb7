"""`lrqat plan`: what training and shipping a model takes, from its configuration alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft_lrqat.lrqat.config import LRQATConfig
from peft_lrqat.trainer.plan import WORKSPACE, Plan, make_plan

from .options import AdapterArguments, JsonOptions, adapter_config
from .parser import Parser, print_columns


GB = 1e9


@dataclass(kw_only=True)
class PlanArguments(JsonOptions):
    """What is trained, and on how much memory."""

    _argument_group_name = "model and data"

    model: str = field(
        metadata={
            "help": "causal language model, a directory or a name on the Hub; only its "
            "config.json is read"
        }
    )
    tokens: int = field(default=2048, metadata={"help": "tokens in a training example"})
    batch: int = field(default=1, metadata={"help": "examples in a step, on one device"})
    memory: float | None = field(
        default=None, metadata={"help": "GB of a device: says whether it is enough"}
    )
    devices: int = field(
        default=1,
        metadata={"help": "how many there are: FSDP2 shares weights and training state out"},
    )


def run_plan(argv: Sequence[str]) -> int:
    """`lrqat plan`."""
    parser = Parser(
        "plan",
        "--model M [options]",
        [PlanArguments, AdapterArguments],
        "Tells how much memory LR-QAT training of a model takes on one device, and how large the\n"
        "result is, from the model's config.json alone. What the backward pass keeps is counted\n"
        "on a run without data.",
        "  lrqat plan --model ./my-llama --bits 4 --group_size 128 --tokens 4096 --memory 24\n"
        "  lrqat plan --model ./my-llama --bits 2 --no_symmetric --downcast int --json",
    )
    args, adapter = parser.parse(argv)
    with parser.user_errors():
        for name in ("tokens", "batch", "devices"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but is {getattr(args, name)}")
        config = adapter_config(adapter)
        plan = make_plan(args.model, config, tokens=args.tokens, batch=args.batch)
    if args.json:
        peaks = {
            "peak": plan.peak_of_each(args.devices, False),
            "peak_checkpointed": plan.peak_of_each(args.devices, True),
            "loading_plain": plan.loading_plain,
            "loading_base": plan.loading_base,
        }
        print(json.dumps({"model": args.model, **dataclasses.asdict(plan), **peaks}))
        return 0
    _print(args, config, plan)
    return 0


def _print(args: PlanArguments, config: LRQATConfig, plan: Plan) -> None:
    grid = config.weight_grid("")
    groups = "one scale per row" if grid.group_size == -1 else f"groups of {grid.group_size}"
    print(
        f"{plan.architecture}, {plan.weights:,} weights at {config.bits} bits, {grid.kind}, "
        f"{groups}, kept as {config.downcast}; rank {config.r}, {plan.trainable:,} trained "
        f"parameters; {args.batch} x {args.tokens:,} tokens\n"
    )
    parts = {
        "quantised weights": plan.frozen,
        "all other weights": plan.others,
        "factors and scales, gradients, AdamW": plan.training_state,
        "temporaries of a layer": WORKSPACE,
    }
    rows = [_row(name, size, size) for name, size in parts.items()]
    ways = (False, True)  # without checkpointing, and with
    rows += [
        _row("activations and gradients of the logits", *(plan.activations(way) for way in ways)),
        _row("peak", *(plan.peak(way) for way in ways)),
    ]
    peaks = [plan.peak_of_each(args.devices, way) for way in ways]
    if args.devices > 1:
        rows.append(_row(f"peak of each of {args.devices}, FSDP2", *peaks))
    if args.memory is not None:
        plain, checkpointed = ("yes" if peak <= args.memory * GB else "no" for peak in peaks)
        rows.append((f"fits {args.memory:g} GB", plain, checkpointed))
    print_columns(("GB of one device", "in training", "with --gradient_checkpointing"), rows)
    print(
        f"\nCUDA takes about half a GB more. The unquantised model has {plan.plain / GB:.2f} GB, "
        "which a teacher in memory\nadds (--distillation_weight without --distillation_cache).\n"
        f"Before training, loading takes {plan.loading_base / GB:.2f} GB from a low-bit base, and "
        f"{plan.loading_plain / GB:.2f} GB from the\nplain model.\n"
    )
    if plan.plain_experts:
        print(
            f"{plan.plain_experts / GB:.2f} GB of the other weights are those of experts: "
            "--target_parameters all-experts quantises them.\n"
        )
    sizes = {
        name: f"{size / GB:.2f}" for name, size in plan.shipped.items() if not isinstance(size, str)
    }
    refused = {name: reason for name, reason in plan.shipped.items() if isinstance(reason, str)}
    print_columns(("GB on disk", ""), [("adapter", f"{plan.adapter / GB:.2f}"), *sizes.items()])
    for name, reason in refused.items():
        print(f"{name}: {reason}")


def _row(name: str, plain: int, checkpointed: int) -> tuple[str, str, str]:
    return name, f"{plain / GB:.2f}", f"{checkpointed / GB:.2f}"
