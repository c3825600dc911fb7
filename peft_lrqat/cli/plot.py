"""`lrqat plot`: what training logged, as curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft_lrqat.shared.plotting import require_matplotlib
from peft_lrqat.trainer.plots import plot_runs, read_logs

from .parser import Parser


@dataclass(kw_only=True)
class PlotArguments:
    """Where the picture goes."""

    output: str | None = field(
        default=None,
        metadata={
            "help": "PNG or SVG file. Default: training.png in the directory of the first RUN"
        },
    )


def run_plot(argv: Sequence[str]) -> int:
    """`lrqat plot`."""
    parser = Parser(
        "plot",
        "RUN [RUN ...] [--output FILE]",
        [PlotArguments],
        "Draws what training logged: losses, integers that changed and that oscillate, clipped\n"
        "weights, scales, learning rates and gradient norms. RUN is the directory of a run, or\n"
        "one of its checkpoints, also while it trains. Several share the panels.",
        "  lrqat plot out\n  lrqat plot rank-8 rank-32 --output ranks.png",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="whose logs are drawn")
    args, more = parser.parse(argv)
    with parser.user_errors():
        require_matplotlib()
        logs = {run: read_logs(run) for run in more.runs}
        first = Path(more.runs[0])
        output = args.output or str((first if first.is_dir() else first.parent) / "training.png")
        names = [Path(run).name for run in logs]
        short = names if len(set(names)) == len(names) else list(logs)
        plot_runs(dict(zip(short, logs.values(), strict=True)), output)
    losses = sum("loss" in log for run in logs.values() for log in run)
    print(f"{output}: {losses:,} logged losses of {len(logs)} run(s)")
    return 0
