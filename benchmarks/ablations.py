"""What each setting of LR-QAT does: one thing changed at a time, on the demo's model.

    python benchmarks/ablations.py run --ablations rank clipping
    python benchmarks/ablations.py table

The base is the row `lrqat` of ``results/quality_demo``, at its options; its figures are read from
there and not measured again. Each changed run writes one JSON file into --results when it ends;
runs that have theirs are passed over. Where a setting also changes the start, the figure of the
untrained start is measured, too.
"""

import argparse
from dataclasses import asdict, dataclass, replace
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import quality
from quality import Run, find_bases, find_place, in_cell, perform
from records import read_results, write_result
from transformers.utils.logging import disable_progress_bar, set_verbosity_error


RESULTS = Path(__file__).parent / "results"
# The options of the runs in `quality_demo`.
BASE = (
    *("--model", "tiny", "--dtype", "float32", "--window", "256"),
    *("--epochs", "4", "--calibration_blocks", "384", "--steps", "150", "--batch_size", "8"),
    *("--learning_rate", "5e-3", "--scale_learning_rate", "1e-3"),
    *("--scales_only_learning_rate", "5e-3", "--full_rate", "0.01"),
)
SETTINGS, STARTS = ("W3", "W2"), ("nearest", "blocks")
# Left to the package, the exponent depends on the start.
RANGE_P = {"nearest": 4.0, "blocks": 2.0}


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """An option of `quality.py`, several at once, or ``training``; its values, the base's among
    them.
    """

    option: str | tuple[str, ...]
    values: tuple[Any, ...]
    starts: tuple[str, ...] = STARTS
    changes_start: bool = False

    def base(self, start: str) -> Any:
        """The value of the base."""
        if self.option == "training":
            return "lrqat"
        if self.option == "range_p":
            return RANGE_P[start]
        names = (self.option,) if isinstance(self.option, str) else self.option
        return attrgetter(*names)(base_options())

    def changed(self, value: Any) -> dict[str, Any]:
        """The options of `quality.py` at a value."""
        if isinstance(self.option, tuple):
            return dict(zip(self.option, value, strict=True))
        return {} if self.option == "training" else {self.option: value}


ABLATIONS = {
    "rank": Ablation(option="rank", values=(4, 8, 16, 32, 64)),
    "factor of the product": Ablation(option="gamma", values=(1 / 8, 1 / 2, 1.0, 2.0)),
    "rate of the scales": Ablation(option="scale_learning_rate", values=(0.0, 1e-4, 1e-3, 1e-2)),
    "clipping": Ablation(option="clipping", values=("group", "all")),
    "distillation": Ablation(
        option="training", values=("lrqat", "resident teacher", "hidden states", "predictions")
    ),
    "calibration blocks": Ablation(
        option="calibration_blocks", values=(32, 128, 384), starts=("blocks",), changes_start=True
    ),
    "reconstruction epochs": Ablation(
        option="epochs", values=(1, 2, 4, 8), starts=("blocks",), changes_start=True
    ),
    "calibration blocks and epochs": Ablation(
        option=("calibration_blocks", "epochs"),
        values=((384, 4), (642, 1), (642, 2)),
        starts=("blocks",),
        changes_start=True,
    ),
    "downcast": Ablation(option="downcast", values=("fixed8", "int", "bf16"), changes_start=True),
    "exponent of the search for scales": Ablation(
        option="range_p", values=(2.0, 3.0, 4.0, 5.0), changes_start=True
    ),
}
# How values are called in the table.
WORDS = {"lrqat": "none", "predictions": "cached predictions", "hidden states": "cached states"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure: the run, and what is changed in it."""

    ablation: str
    value: Any
    run: Run

    @property
    def file(self) -> str:
        parts = (self.ablation, _in_file(self.value), *list(asdict(self.run).values())[2:])
        return "-".join(map(str, parts)).replace(" ", "-") + ".json"


def _in_file(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def in_words(value: Any) -> str:
    """A value as the table and --values have it."""
    if isinstance(value, tuple):
        return " x ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else WORDS.get(value, str(value))


def base_options(*more: str) -> argparse.Namespace:
    return quality.make_parser().parse_args(["run", *BASE, *more])


def changes(ablation: str, seeds: list[int]) -> list[Change]:
    """The runs of an ablation that are not runs of the base."""
    asked, found = ABLATIONS[ablation], []
    for seed, value, setting, start in product(seeds, asked.values, SETTINGS, asked.starts):
        if value == asked.base(start):
            continue
        trained = value if asked.option == "training" else "lrqat"
        for training in ("none", trained) if asked.changes_start else (trained,):
            run = Run(
                model="tiny",
                text="topics",
                setting=setting,
                start=start,
                training=training,
                seed=seed,
            )
            found.append(Change(ablation=ablation, value=value, run=run))
    return found


def run_all(args: argparse.Namespace) -> None:
    disable_progress_bar()
    set_verbosity_error()
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    place = find_place(base_options("--work", args.work))
    for change in [c for name in args.ablations for c in changes(name, args.seeds)]:
        file = results / change.file
        if file.exists() or _known(change, args.base):
            continue
        if args.values and in_words(change.value) not in args.values:
            continue
        if change.run.setting not in args.settings or change.run.start not in args.starts:
            continue
        if args.trainings and change.run.training not in args.trainings:
            continue
        options = base_options("--work", args.work)
        vars(options).update(ABLATIONS[change.ablation].changed(change.value))
        here = replace(place, args=options, bases=find_bases(options, place.text))
        found = perform(here, change.run)
        written = {"ablation": change.ablation, "value": change.value, **found}
        write_result(file, written)


def _known(change: Change, base: str) -> bool:
    """Whether `quality_demo` has the run, where only the training differs from the base."""
    is_training = ABLATIONS[change.ablation].option == "training"
    return is_training and (Path(base) / change.run.file).exists()


# The tables


def with_base(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ablations, and those of the base wherever an ablation has its value."""
    found, options = list(rows), vars(base_options())
    for name in dict.fromkeys(row["ablation"] for row in rows):
        asked = ABLATIONS[name]
        is_training = asked.option == "training"
        trainings = set(asked.values if is_training else ("lrqat",))
        trainings |= {"none"} if asked.changes_start else set()
        for row in base:
            if row["setting"] not in SETTINGS or row["start"] not in asked.starts:
                continue
            if row["training"] not in trainings:
                continue
            if any(options[option] != value for option, value in row["options"].items()):
                raise ValueError(f"a run of the base has other options: {row}")
            value = row["training"] if is_training else asked.base(row["start"])
            found.append({"ablation": name, "value": value, **row})
    return found


def table_lines(rows: list[dict[str, Any]], base: list[dict[str, Any]] | None = None) -> list[str]:
    """Tables in Markdown, one for each ablation: a line for each value, the base's marked."""
    base = read_results(RESULTS / "quality_demo") if base is None else base
    found: list[str] = []
    for name in ABLATIONS:
        mine = [row | {"value": _as_asked(row["value"])} for row in rows if row["ablation"] == name]
        found += [*([""] if found and mine else []), *_one_table(name, with_base(mine, base))]
    return found


def _as_asked(value: Any) -> Any:
    """A value out of a JSON file, which knows no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _one_table(name: str, rows: list[dict[str, Any]]) -> list[str]:
    asked = ABLATIONS[name]
    if not rows:
        return []
    by_cell: dict[tuple[Any, ...], dict[int, float]] = {}
    changed = set()
    for row in rows:
        trained = row["training"] != "none"
        key = (row["value"], trained, row["setting"], row["start"])
        by_cell.setdefault(key, {})[row["seed"]] = row["perplexity"]
        if row["value"] != asked.base(row["start"]):
            changed.add((row["setting"], row["start"]))
    columns = [column for column in product(SETTINGS, asked.starts) if column in changed]
    lines = [f"| {name} | " + " | ".join(f"{s}, {start}" for s, start in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for trained in (False, True) if asked.changes_start else (True,):
        for value in asked.values:
            cells = []
            for setting, start in columns:
                seeds = by_cell.get((value, trained, setting, start), {})
                base = value == asked.base(start)
                cells.append(_cell(seeds, base=base))
            label = in_words(value)
            label += ", not trained" if asked.changes_start and not trained else ""
            if any(cell != "-" for cell in cells):
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _cell(seeds: dict[int, float], *, base: bool) -> str:
    """The figure of seed 0; the base's is bold, with the range of its seeds behind it."""
    if 0 not in seeds:
        return "-"
    first = in_cell([seeds[0]])
    if not base:
        return first
    return f"**{first}** ({in_cell([min(seeds.values())])} to {in_cell([max(seeds.values())])})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--ablations", nargs="+", default=list(ABLATIONS), choices=ABLATIONS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--trainings", nargs="+", help="only these")
    parser.add_argument("--values", nargs="+", help="only these, as the table has them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", default="quality-benchmark", help="for bases")
    parser.add_argument("--results", default=str(RESULTS / "ablations"))
    parser.add_argument(
        "--base", default=str(RESULTS / "quality_demo"), help="where the base's results are"
    )
    args = parser.parse_args()
    if args.action == "run":
        run_all(args)
        return
    rows = [row for row in read_results(Path(args.results)) if row["ablation"] in args.ablations]
    print("\n".join(table_lines(rows, read_results(Path(args.base)))))


if __name__ == "__main__":
    main()
