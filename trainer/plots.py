"""What training logged, as curves: losses, integers, scales, rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from peft_lrqat.shared.plotting import require_matplotlib

from .checkpoint import last_complete_checkpoint


# Written by `Trainer.save_state`, and into every checkpoint.
STATE = "trainer_state.json"
Log = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that share an axis: keys of the logs, and what they are called."""

    title: str
    curves: Mapping[str, str]
    logarithmic: bool = False
    percent: bool = False


LOSSES = Panel(
    title="loss (nats per token)", curves={"loss": "training", "eval_loss": "evaluation"}
)
FIGURES = (
    Panel(
        title="integers that differ from the start (%)",
        curves={"changed_integers": "all", "changed_integers_since_log": "since the last log"},
        percent=True,
    ),
    Panel(title="weights outside the grid (%)", curves={"clipped_weights": ""}, percent=True),
    Panel(title="mean change of the scales (%)", curves={"scale_change": ""}, percent=True),
)
STYLES = ("-", "--", ":", "-.", (0, (1, 4)))


def read_logs(run: str) -> list[dict[str, Any]]:
    """What the Trainer logged in a run, one dict for each log, in order.

    Args:
        run: the directory that a run wrote to, one of its checkpoints, or a `trainer_state.json`.

    Raises:
        ValueError: there is none, or nothing was logged.
    """
    file = Path(run)
    if file.is_dir():
        file = file / STATE
        newest = None if file.exists() else last_complete_checkpoint(run)
        file = file if newest is None else Path(newest) / STATE
    if not file.is_file():
        raise ValueError(
            f"{run} holds no {STATE}, which `lrqat train` and `trainer.save_state()` write, and "
            "every checkpoint has"
        )
    try:
        logs = TrainerState.load_from_json(str(file)).log_history
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not any("loss" in log for log in logs):
        raise ValueError(f"{file} has no logged loss; set --logging_steps below --max_steps")
    return logs


def plot_runs(runs: Mapping[str, Sequence[Log]], file: str) -> None:
    """Draws the logs of runs, each in its colour, into a PNG or SVG file.

    A panel each, if it was logged: the losses; the share of integers that training changed, and
    since the last log (where that stays high while the loss does not fall, integers oscillate);
    weights outside the grid; the change of the scales; rates and gradient norms by group.

    Args:
        runs: by name, what `read_logs` returns or ``trainer.state.log_history``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    logged = {key for logs in runs.values() for log in logs for key in log}
    panels = [panel for panel in _panels(logged) if logged & panel.curves.keys()]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw(axes, panel, runs)
    for axes in list(all_axes)[len(panels) :]:
        axes.remove()
    figure.savefig(file, dpi=120)


def _panels(logged: set[str]) -> list[Panel]:
    """The panels, with the groups of the optimizer that were logged."""
    panels = [LOSSES, *FIGURES]
    for setting, title in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")):
        groups = sorted(key for key in logged if key.endswith(f"_{setting}"))
        names = {key: key.removesuffix(f"_{setting}") for key in groups} or {setting: ""}
        panels.append(Panel(title=title, curves=names, logarithmic=True))
    return panels


def _draw(axes: Any, panel: Panel, runs: Mapping[str, Sequence[Log]]) -> None:
    factor = 100 if panel.percent else 1
    labelled = False
    for colour, (run, logs) in enumerate(runs.items()):
        for style, (key, name) in zip(STYLES, panel.curves.items(), strict=False):
            points = [(log["step"], factor * log[key]) for log in logs if key in log]
            if panel.logarithmic:
                points = [(step, value) for step, value in points if value > 0]
            if not points:
                continue
            label = ", ".join(part for part in (run if len(runs) > 1 else "", name) if part)
            labelled = labelled or bool(label)
            marker = "." if len(points) < 20 else None
            look: dict[str, Any] = {"linestyle": style, "color": f"C{colour % 10}"}
            axes.plot(*zip(*points, strict=True), label=label or None, marker=marker, **look)
    axes.set(title=panel.title, xlabel="step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.title.set_fontsize(10)
    if panel.logarithmic and axes.lines:
        axes.set_yscale("log")
    if labelled:
        axes.legend(fontsize=8)
