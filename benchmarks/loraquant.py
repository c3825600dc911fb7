"""What packing costs trained LoRA adapters: scores of tasks with error bars, by method and bits.

    python benchmarks/loraquant.py run --data tasks --adapters sst2:0 gsm8k:0 e2e:0
    python benchmarks/loraquant.py run                       # without files: CPython's help topics
    python benchmarks/loraquant.py table --plot adapters.svg

An adapter is a task and a seed (see adapter_tasks.py); --data is the folder with the tasks' files.
Each is trained once on SmolLM2-135M and kept in --work. A row is a way to store it (see
adapter_rows.py); each writes one JSON file into --results when it ends, and rows that have theirs
are passed over. An adapter is merged into the bfloat16 weights to be scored.

Beside the score stands its standard error over the held-out items, and how far the row is from the
same adapter in float16, with the standard error of the difference, item by item.
"""

import argparse
import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_rows import GROUP_SIZE, ROWS, Factors, Stored, rows
from adapter_tasks import ALPHA, LEARNING_RATE, RANK, TASKS, Example, Task, trained
from records import print_results, write_result
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat.demo.smollm2 import load_smollm2
from peft_lrqat.loraquant.convert import split_lora


BASE, REFERENCE = "no adapter", "float16"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A task, and the seed that the adapter was trained with."""

    task: str
    seed: int


class Scorer:
    """The model, with any factors merged into its weights, on the held-out items of a task."""

    def __init__(self, base: Path, task: Task, tokenizer: Any, items: list[Example]) -> None:
        self.task, self.tokenizer, self.items = task, tokenizer, items
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        self.model.eval()
        self.weights: dict[str, torch.Tensor] = {}  # those of the base, where factors are merged

    @torch.no_grad()
    def scores(self, factors: Factors) -> list[float]:
        for name, (B, A) in factors.items():
            layer: Any = self.model.get_submodule(name)
            weight = self.weights.setdefault(name, layer.weight.data)
            layer.weight.data = (weight.float() + ALPHA / RANK * (B @ A)).to(weight.dtype)
        found = self.task.score(self.model, self.tokenizer, self.items)
        for name in factors:
            self.model.get_submodule(name).weight.data = self.weights[name]
        return found


def find_base(work: Path) -> Path:
    base = work / "base"
    if not (base / "config.json").exists():
        for part in load_smollm2():
            part.save_pretrained(base)
    return base


def find_adapter(
    args: argparse.Namespace, adapter: Adapter, base: Path, examples: list[Example]
) -> Path:
    """Trains it, if it is not there yet."""
    folder = Path(args.work) / f"{adapter.task}-{adapter.seed}"
    if not folder.exists():
        whole = Path(args.work) / "unfinished"
        shutil.rmtree(whole, ignore_errors=True)
        model, tokens = trained(
            base,
            examples,
            seed=adapter.seed,
            tokens=args.tokens or TASKS[adapter.task].tokens,
            batch_size=args.batch_size,
        )
        model.save_pretrained(whole)
        (whole / "tokens.json").write_text(json.dumps(tokens))
        whole.rename(folder)
    return folder


def factors_of(folder: Path) -> Factors:
    factors, _, _ = split_lora(load_file(folder / "adapter_model.safetensors"))
    return factors


# Runs


def run_all(args: argparse.Namespace) -> None:
    disable_progress_bar()
    set_verbosity_error()
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    base = find_base(Path(args.work))
    tokenizer = AutoTokenizer.from_pretrained(base)
    for adapter in args.adapters:
        run_adapter(args, adapter, base, tokenizer)


def run_adapter(
    args: argparse.Namespace, adapter: Adapter, base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = TASKS[adapter.task]
    examples, heldout = task.read(args.data, tokenizer)
    heldout = heldout[: args.items or task.items]
    folder = find_adapter(args, adapter, base, examples)
    factors = factors_of(folder)
    scorer: Scorer | None = None
    for name, store in rows(args.rows).items():
        file = Path(args.results) / f"{adapter.task}-{adapter.seed}-{slug(name)}.json"
        if file.exists():
            continue
        stored = store(factors)
        scorer = scorer or Scorer(base, task, tokenizer, heldout)
        common = {
            "task": adapter.task,
            "seed": adapter.seed,
            "measure": task.measure,
            "items": len(heldout),
            "tokens": json.loads((folder / "tokens.json").read_text()),
            "threads": torch.get_num_threads(),
            "options": {
                "model": "SmolLM2-135M",
                "dtype": "bfloat16",
                "rank": RANK,
                "alpha": ALPHA,
                "learning_rate": LEARNING_RATE,
                "batch_size": args.batch_size,
                "group_size": GROUP_SIZE,
            },
        }
        # Both are scored once, and kept for the differences.
        plain = kept(Path(args.work) / f"{adapter.task}-{len(heldout)}-items.json", scorer, {})
        halved = rows([REFERENCE])[REFERENCE](factors).factors
        whole = kept(folder / f"{len(heldout)}-items.json", scorer, halved)
        scores = whole if name == REFERENCE else scorer.scores(stored.factors)
        write_result(file, common | measured(name, stored, scores, whole))
        if name == REFERENCE:
            nothing = Stored(factors={}, error=1.0, bits=0.0, nominal=0.0)
            file = file.with_name(f"{adapter.task}-{adapter.seed}-{slug(BASE)}.json")
            write_result(file, common | measured(BASE, nothing, plain, whole))


def kept(file: Path, scorer: Scorer, factors: Factors) -> list[float]:
    """The scores of all items, from the file or for it."""
    if not file.exists():
        file.write_text(json.dumps(scorer.scores(factors)))
    found: list[float] = json.loads(file.read_text())
    return found


def measured(
    row: str, stored: Stored, scores: list[float], whole: list[float]
) -> dict[str, float | str]:
    change = [score - other for score, other in zip(scores, whole, strict=True)]
    return {
        "row": row,
        "score": round(statistics.mean(scores), 5),
        "standard_error": round(standard_error(scores), 5),
        "change": round(statistics.mean(change), 5),
        "change_standard_error": round(standard_error(change), 5),
        "error": round(stored.error, 4),
        "bits": round(stored.bits, 4),
        "nominal_bits": round(stored.nominal, 4),
    }


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


# The table


TITLES = {"sst2": "SST-2", "gsm8k": "GSM8K", "e2e": "E2E", "text": "text"}
Row = dict[str, Any]


def by_row(found: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The results of all seeds, by task and name of the row."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(found, key=lambda row: row["seed"]):
        grouped.setdefault((row["task"], row["row"]), []).append(row)
    return grouped


def mean(several: list[Row], what: str) -> float:
    return statistics.mean(row[what] for row in several)


def table_lines(found: list[Row]) -> list[str]:
    """A table in Markdown: a line for each row, three columns for each task.

    Scores, and their changes from float16 with a standard error, are means over the adapters of a
    task. All of them are scored on the same items, so the error does not shrink with their number.
    """
    grouped = by_row(found)
    tasks = [task for task in TASKS if (task, REFERENCE) in grouped]
    names = [BASE, *ROWS]
    heads = []
    for task in tasks:
        unit = ", %" if TASKS[task].percent else ""
        heads += [f"{TITLES[task]}: {TASKS[task].measure}{unit}", "change from float16", "error"]
    lines = ["| | bits | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for name in names:
        present = [task for task in tasks if (task, name) in grouped]
        if not present:
            continue
        bits = [mean(grouped[task, name], "bits") for task in present]
        cells = [name, "" if name == BASE else in_range(bits)]
        for task in tasks:
            cells += cells_of(grouped.get((task, name), []), TASKS[task].percent)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def in_range(values: list[float]) -> str:
    ends = [f"{value:.2f}" for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def cells_of(several: list[Row], percent: bool) -> list[str]:
    if not several:
        return ["-", "-", "-"]
    unit, digits = (100, 1) if percent else (1, 3)
    score, change, error = (
        unit * mean(several, what) for what in ("score", "change", "change_standard_error")
    )
    told = f"{score:.{digits}f}"
    if several[0]["row"] in (BASE, REFERENCE):
        told += f" \u00b1 {unit * mean(several, 'standard_error'):.{digits}f}"
    if several[0]["row"] == REFERENCE:
        return [told, "", f"{mean(several, 'error'):.3f}"]
    change = round(change, digits) + 0.0  # no "-0.0"
    lost = f"{change:+.{digits}f} \u00b1 {error:.{digits}f}"
    if len(several) > 1:
        ends = [unit * end(row["change"] for row in several) for end in (min, max)]
        lost += f" ({ends[0]:+.{digits}f} to {ends[1]:+.{digits}f})"
    return [told, lost, "" if several[0]["row"] == BASE else f"{mean(several, 'error'):.3f}"]


# In the plots, and their marks.
FAMILIES = {
    "residual, ": ("residual", "s-"),
    "published": ("published", "o-"),
    "GPTQ": ("GPTQ", "D-"),
    "RTN": ("RTN", "^"),
    "sign": ("sign", "v"),
    "HQQ": ("HQQ", "x"),
}


def plot(found: list[Row], file: str) -> None:
    """A panel for each task: change from float16 by true bits, with error bars."""
    from matplotlib.figure import Figure

    grouped = by_row(found)
    tasks = [task for task in TASKS if (task, REFERENCE) in grouped]
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        unit = 100 if TASKS[task].percent else 1
        for start, (label, style) in FAMILIES.items():
            points = sorted(
                (
                    mean(several, "bits"),
                    unit * mean(several, "change"),
                    unit * mean(several, "change_standard_error"),
                )
                for (own, name), several in grouped.items()
                if own == task and name.startswith(start)
            )
            if points:
                bits, change, error = zip(*points, strict=True)
                panel.errorbar(
                    bits, change, yerr=error, fmt=style, label=label, capsize=2, markersize=4
                )
        panel.axhline(0, color="gray", linewidth=1)
        base = unit * mean(grouped[task, BASE], "change")
        panel.axhline(base, color="gray", linestyle=":", linewidth=1)
        panel.annotate(
            "no adapter",
            (0.98, base),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
        )
        percent = " (points)" if TASKS[task].percent else ""
        panel.set(
            title=f"{TITLES[task]}: {TASKS[task].measure}",
            xlabel="bits of storage per parameter",
            ylabel=f"change from float16{percent}",
        )
    panels[0].legend(fontsize=7)
    figure.savefig(file, dpi=120)


def adapter_of(text: str) -> Adapter:
    task, _, seed = text.partition(":")
    if task not in TASKS:
        raise argparse.ArgumentTypeError(f"knows {', '.join(TASKS)}, but not {task}")
    return Adapter(task=task, seed=int(seed or 0))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--data", type=Path, help="folder of the tasks; of `text`, a file")
    parser.add_argument(
        "--adapters",
        nargs="+",
        type=adapter_of,
        default=[adapter_of("text:0")],
        metavar="TASK:SEED",
    )
    parser.add_argument("--rows", nargs="+", help="default: all")
    parser.add_argument("--tokens", type=int, help="to train on; default: the task's")
    parser.add_argument("--batch_size", type=int, default=384, help="tokens in a training step")
    parser.add_argument("--items", type=int, help="to score; default: the task's")
    parser.add_argument("--work", default="loraquant-benchmark", help="for base and adapters")
    parser.add_argument(
        "--results",
        default=str(Path(__file__).parent / "results" / "loraquant"),
        help="for results",
    )
    parser.add_argument("--plot", help="an image file, with `table`")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    print_results(args, table_lines, plot) if args.action == "table" else run_all(args)


if __name__ == "__main__":
    main()
