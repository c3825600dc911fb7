"""Puts the tables of README and docs in place, from the files of the runs.

    python benchmarks/report.py            # writes the tables
    python benchmarks/report.py --check    # says which differ, and fails

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ablations
import costs
import loraquant
import loraquant_error
import quality
import rivals
import runtimes
import zero_shot
from records import read_results


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"<!-- figures: ([^>]+) -->\n(.*?)<!-- end of figures -->", re.DOTALL)
DEMO_NAMES = {
    "unquantised": "unquantised, float32",
    "scales only": "training the scales only",
    "calibrated": "calibrated, not trained",
}


def demo() -> list[str]:
    """What `make demo` prints."""
    lines = [
        "| | bits | perplexity | bytes in training | bytes deployed |",
        "|---|---|---|---|---|",
    ]
    methods: list[str] = []
    for row in json.loads((RESULTS / "demo.json").read_text()):
        method, perplexity = row["method"], f"{row['perplexity']:.2f}"
        name = DEMO_NAMES.get(method, method)
        if method == "LR-QAT":
            on = " on the calibrated base" if methods[-1] == "calibrated" else ""
            name, perplexity = f"**LR-QAT**{on}", f"**{perplexity}**"
        methods.append(method)
        training = f"{row['training_bytes']:,}" if row["trainable"] else ""
        cells = [name, row["bits"] or "", perplexity, training, f"{row['deployed_bytes']:,}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [re.sub(r"\|  (?=\|)", "| ", line) for line in lines]


def cost() -> list[str]:
    """What a number of bits costs on the demo's model, and a step of training on a larger one."""
    rows = read_results(RESULTS / "quality_demo")
    found, shares = quality.summarise(rows), quality.closed_gaps(rows)
    costs_of = {(row["setting"], row["training"]): row for row in read_results(RESULTS / "costs")}
    plain = costs_of["unquantised", "lora"]["demo"]["shipped"]
    lines = [
        "| weights | rounded to nearest | LR-QAT | from calibrated blocks, distilled | of the gap "
        "closed | size, of 16 bits |",
        "|---|---|---|---|---|---|",
    ]
    for setting in ("W4", "W3", "W2"):
        nearest, blocks = found[setting, "nearest"], found[setting, "blocks"]
        share = statistics.mean(shares[setting, "blocks"]["predictions"])
        size = costs_of[setting, "lrqat"]["demo"]["shipped"] / plain
        cells = [quality.in_cell(nearest["none"]), quality.in_cell(nearest["lrqat"])]
        cells += [f"**{quality.in_cell(blocks['predictions'])}**", f"{share:.0f}%", f"{size:.0%}"]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    best = quality.in_cell(found["unquantised", "none"]["lora"])
    step = costs_of["W4", "lrqat"]
    full = costs_of["W4", "full"]
    memory, time = (step["llama"][name] / step["lora"][name] for name in ("peak", "seconds"))
    all_weights = full["llama"]["peak"] / full["lora"]["peak"]
    return [
        *lines,
        "",
        "Perplexity of the demo's model, three seeds; unquantised, with LoRA on the same tokens: "
        f"{best}. A step takes {memory:.2f} of LoRA's",
        f"memory (training all weights through the rounding: {all_weights:.1f}), and {time:.1f} "
        f"times its time at {step['tokens']} tokens, on one thread of a CPU.",
    ]


# Settings of the demo's model that have a table of their own.
GRIDS = ("W4-g32", "W3-g32", "W2-g32", "W2-balanced", "W2-balanced-g32")
ACTIVATIONS = ("unquantised", "W4", "W4A8", "W4A8KV4", "W4A4KV4")
MAIN = ("unquantised", "W4", "W3", "W2", "W3-by-layer")


def of_quality(
    folder: str,
    settings: Sequence[str] | None = None,
    lines: Callable[[list[dict[str, Any]]], list[str]] = quality.table_lines,
) -> Callable[[], list[str]]:
    """A table of `quality.py`: of some settings, or of all."""

    def table() -> list[str]:
        rows = read_results(RESULTS / folder)
        return lines([row for row in rows if settings is None or row["setting"] in settings])

    return table


MODELS = {"tiny": "the demo's", "wide": "256 wide", "smollm2": "SmolLM2-135M"}


def exponents() -> list[str]:
    """Calibrated blocks, by the exponent that their first scales were found with; same seeds."""
    found: dict[tuple[str, str], dict[tuple[str, int], dict[int, float]]] = {}
    for folder in ("quality", "quality_range_p_2", "quality_range_p_4"):
        for row in read_results(RESULTS / folder):
            exponent = row["options"].get("range_p")
            if row["start"] == "blocks" and exponent is not None:
                by_cell = found.setdefault((row["model"], row["setting"]), {})
                cell = by_cell.setdefault((row["training"], int(exponent)), {})
                cell[row["seed"]] = row["perplexity"]
    lines = ["| model | setting | none, 4 | none, 2 | lrqat, 4 | lrqat, 2 |"]
    lines.append("|---|---|---|---|---|---|")
    for (model, setting), by_cell in found.items():
        cells = []
        for training in ("none", "lrqat"):
            pair = [by_cell.get((training, exponent), {}) for exponent in (4, 2)]
            seeds = pair[0].keys() & pair[1].keys()
            cells += [quality.in_cell([by_seed[seed] for seed in seeds]) for by_seed in pair]
        if cells[0] != "-":
            lines.append(f"| {MODELS[model]} | {setting} | {' | '.join(cells)} |")
    return lines


def calibration_batches() -> list[str]:
    """Calibrated blocks after one pass, by rows in a batch and rate of the weights."""
    rows = read_results(RESULTS / "calibration_batches")
    rows += [row for row in read_results(RESULTS / "ablations") if row["value"] == [642, 1]]
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        options = row["options"]
        batch = options.get("calibration_batch_size", 4)
        settings = options["calibration_blocks"], batch, options["reconstruction_rate"]
        found.setdefault((row["model"], row["setting"], *settings), {})[row["training"]] = row[
            "perplexity"
        ]
    lines = ["| model | setting | examples | rows in a batch | steps | rate | none | lrqat |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for (model, setting, examples, batch, rate), by_training in sorted(found.items()):
        cells = [MODELS[model], setting, examples, batch, math.ceil(examples / batch), rate]
        cells += [
            quality.in_cell([by_training[name]] if name in by_training else None)
            for name in ("none", "lrqat")
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def of_ablation(name: str) -> Callable[[], list[str]]:
    def lines() -> list[str]:
        rows = read_results(RESULTS / "ablations")
        return ablations.table_lines([row for row in rows if row["ablation"] == name])

    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "demo": demo,
    "cost": cost,
    "quality_demo": of_quality("quality_demo", MAIN),
    "quality_demo, gap": of_quality("quality_demo", MAIN, lines=quality.gap_lines),
    "quality_demo, grids": of_quality("quality_demo", GRIDS),
    "quality_demo, activations": of_quality("quality_demo", ACTIVATIONS),
    "exponents": exponents,
    "calibration batches": calibration_batches,
    "costs": lambda: costs.table_lines(read_results(RESULTS / "costs")),
    **{f"ablations, {name}": of_ablation(name) for name in ablations.ABLATIONS},
    "quality_smollm2": of_quality("quality_smollm2"),
    "quality_smollm2, gap": of_quality("quality_smollm2", lines=quality.gap_lines),
    "quality_small_batches": of_quality("quality_small_batches"),
    "loraquant": lambda: loraquant.table_lines(read_results(RESULTS / "loraquant")),
    "loraquant_error": lambda: loraquant_error.table_lines(
        read_results(RESULTS / "loraquant_error")
    ),
    "rivals": lambda: rivals.table_lines(read_results(RESULTS / "rivals")),
    "zero_shot": lambda: zero_shot.table_lines(read_results(RESULTS / "zero_shot")),
    "runtimes": lambda: runtimes.table_lines(json.loads((RESULTS / "runtimes.json").read_text())),
}


def filled(text: str) -> str:
    """A page with the tables that its places name."""

    def table(place: re.Match[str]) -> str:
        name = place[1]
        return "\n".join([f"<!-- figures: {name} -->", *TABLES[name](), "<!-- end of figures -->"])

    return PLACE.sub(table, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    differ = []
    for page in pages():
        text = page.read_text()
        if (made := filled(text)) != text:
            differ.append(page.relative_to(ROOT).as_posix())
            if not args.check:
                page.write_text(made)
    if args.check and differ:
        sys.exit(f"not what the runs say: {', '.join(differ)}; run `python benchmarks/report.py`")


if __name__ == "__main__":
    main()
