"""Error against true bits: ways to store factors, on factors with known spectra and on adapters.

    python benchmarks/loraquant_error.py run       # geometric and random spectra, ten minutes
    python benchmarks/loraquant_error.py run --adapters loraquant-benchmark/sst2-0  # and trained
    python benchmarks/loraquant_error.py table --plot errors.svg
    python benchmarks/loraquant_error.py time --model 7b    # of a whole adapter: 7b or smollm2

Relative error ``||BA - Q(B)Q(A)||_F / ||BA||_F`` over all layers; bits of codes, scales and zero
points per parameter of B and A (see adapter_rows.py). Singular vectors are random, and B and A are
turned by a random rotation, as training leaves them in no special basis. Each spectrum writes one
JSON file into --results when it is done; those that have theirs are passed over.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_rows import ROWS, Factors, packed, rows
from loraquant import FAMILIES, factors_of, in_range, mean
from records import print_results, write_result
from torch import Tensor


SIZE, LAYERS, R = 512, 2, 16
RANDOM = 10  # spectra


def adapter(
    layers: int, m: int, n: int, spectrum: Tensor, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors whose products have the singular values ``spectrum`` (r,)."""
    r, root = len(spectrum), spectrum.sqrt()

    def basis(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, r, generator=generator)).Q

    factors = {}
    for layer in range(layers):
        turn = basis(r)
        factors[f"layer {layer}"] = (
            basis(m) * root @ turn,
            turn.T @ (basis(n) * root).T,
        )
    return factors


def spectra() -> Iterator[tuple[str, str, Tensor]]:
    """Kind, name, and singular values."""
    k = torch.arange(R)
    for decay in (0.6, 0.8, 0.9):
        yield "geometric", f"{decay}^k", decay**k
    for seed in range(RANDOM):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.exp(0.3 * torch.randn(R, generator=generator))
        share = float(torch.rand(1, generator=generator))
        if seed % 2:
            power = 0.5 + 1.5 * share
            yield "random", f"{seed}: k^-{power:.2f}", (k + 1.0) ** -power * noise
        else:
            decay = 0.6 + 0.35 * share
            yield "random", f"{seed}: {decay:.2f}^k", decay**k * noise


def run(args: argparse.Namespace) -> None:
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    for number, (kind, name, values) in enumerate(spectra()):
        file = results / f"{kind}-{number:02}.json"
        if not file.exists():
            generator = torch.Generator().manual_seed(number)
            measure(file, kind, name, adapter(LAYERS, SIZE, SIZE, values, generator))
    for folder in map(Path, args.adapters):
        file = results / f"adapter-{folder.name}.json"
        if not file.exists():
            measure(file, "trained", folder.name, factors_of(folder))


def measure(file: Path, kind: str, name: str, factors: Factors) -> None:
    found = []
    for row, store in rows().items():
        stored = store(factors)
        found.append(
            {
                "row": row,
                "error": round(stored.error, 4),
                "bits": round(stored.bits, 4),
                "nominal_bits": round(stored.nominal, 4),
            }
        )
    write_result(
        file,
        {"kind": kind, "spectrum": name, "threads": torch.get_num_threads(), "rows": found},
    )


# The table


def table_lines(found: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown: a line for each row, a column for each geometric spectrum, one for all
    random ones and one for all trained adapters, with the least and the greatest error.
    """
    columns = columns_of(found)
    lines = ["| | bits | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name in ROWS:
        by_column = {
            title: [row for one in several for row in one["rows"] if row["row"] == name]
            for title, several in columns.items()
        }
        if name == "float16" or not any(by_column.values()):
            continue
        bits = [row["bits"] for own in by_column.values() for row in own]
        cells = [name, in_range(bits), *map(in_cell, by_column.values())]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def columns_of(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    columns: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if one["kind"] == "geometric":
            columns[one["spectrum"]] = [one]
    for kind in ("random", "trained"):
        if several := [one for one in found if one["kind"] == kind]:
            title = f"{len(several)} random" if kind == "random" else f"{len(several)} trained"
            columns[title] = several
    return columns


def in_cell(own: list[dict[str, Any]]) -> str:
    if not own:
        return "-"
    told = f"{mean(own, 'error'):.3f}"
    if len(own) > 1:
        ends = [end(row["error"] for row in own) for end in (min, max)]
        told += f" ({ends[0]:.3f} to {ends[1]:.3f})"
    return told


def plot(found: list[dict[str, Any]], file: str) -> None:
    """A panel for random spectra and one for trained adapters: error by true bits."""
    from matplotlib.figure import Figure

    panels_of = {
        kind: [one for one in found if one["kind"] == kind] for kind in ("random", "trained")
    }
    panels_of = {kind: several for kind, several in panels_of.items() if several}
    figure = Figure(figsize=(4.6 * len(panels_of), 3.6), layout="constrained")
    panels = figure.subplots(1, len(panels_of), squeeze=False, sharey=True)[0]
    for panel, (kind, several) in zip(panels, panels_of.items(), strict=True):
        for start, (label, style) in FAMILIES.items():
            by_name: dict[str, list[dict[str, Any]]] = {}
            for one in several:
                for row in one["rows"]:
                    if row["row"].startswith(start):
                        by_name.setdefault(row["row"], []).append(row)
            points = sorted(
                (
                    mean(own, "bits"),
                    mean(own, "error"),
                    statistics.stdev(row["error"] for row in own) if len(own) > 1 else 0.0,
                )
                for own in by_name.values()
            )
            if points:
                bits, error, spread = zip(*points, strict=True)
                panel.errorbar(
                    bits, error, yerr=spread, fmt=style, label=label, capsize=2, markersize=4
                )
        what = "random spectra" if kind == "random" else "trained adapters"
        panel.set(title=f"{len(several)} {what}", xlabel="bits of storage per parameter")
    panels[0].set(ylabel="relative error of B A")
    panels[-1].legend(fontsize=7, loc="upper right")
    figure.savefig(file)


# The time of a whole adapter

# Outputs and inputs of the linear layers of one block, and how many blocks there are.
MODELS = {
    "7b": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32),
    "smollm2": ([(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)], 30),
}


def whole_adapter(model: str) -> Factors:
    """An adapter for every linear layer of a model, with a spectrum of 0.8^k."""
    block, count = MODELS[model]
    factors = {}
    for index, (m, n) in enumerate(block):
        generator = torch.Generator().manual_seed(0)
        ((B, A),) = adapter(1, m, n, 0.8 ** torch.arange(R), generator).values()
        # Blocks differ by the signs of their rows, which costs nothing to make.
        for number in range(count):
            generator = torch.Generator().manual_seed(1000 * index + number)
            signs = torch.randint(0, 2, (m, 1), generator=generator).mul(2).sub(1)
            factors[f"{number}.{index}"] = B * signs, A
    return factors


def time_all(args: argparse.Namespace) -> None:
    factors = whole_adapter(args.model)
    threads = torch.get_num_threads()
    print(f"{args.model}, rank {R}, {len(factors)} modules, {threads} threads")
    for method in ("paper", "residual"):
        start = time.perf_counter()
        found = packed(factors, method=method, bits_high=2, ratio=0.9)
        seconds = time.perf_counter() - start
        print(f"{method}: {seconds:.0f} s, error {found.error:.3f} at {found.bits:.3f} bits")


ACTIONS = {
    "run": run,
    "table": partial(print_results, table_lines=table_lines, plot=plot),
    "time": time_all,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--adapters", nargs="*", default=[], help="folders of LoRA adapters")
    parser.add_argument(
        "--results", default=str(Path(__file__).parent / "results" / "loraquant_error")
    )
    parser.add_argument("--plot", help="an image file, with `table`")
    parser.add_argument("--model", choices=sorted(MODELS), default="7b", help="with `time`")
    args = parser.parse_args()
    ACTIONS[args.action](args)


if __name__ == "__main__":
    main()
