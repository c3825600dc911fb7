"""The table in the documentation: settings by formats and runtimes, made from the objects."""

from __future__ import annotations

from ..quant.grid import Grid
from .base import Format
from .runtimes import RUNTIMES, Runtime
from .table import FORMATS


SETTINGS = {
    f"W{bits} {'' if symmetric else 'asymmetric, '}{name}": Grid(
        bits=bits, symmetric=symmetric, group_size=size
    )
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for name, size in (("per channel", -1), ("g32", 32), ("g128", 128))
} | {
    "W4 g40": Grid(bits=4, group_size=40),
    "W2 balanced, per channel": Grid(bits=2, balanced=True),
    "W2 balanced, g32": Grid(bits=2, balanced=True, group_size=32),
    "W3 balanced, per channel": Grid(bits=3, balanced=True),
    "W8 balanced, per channel": Grid(bits=8, balanced=True),
}


def capability_table() -> str:
    """The table in Markdown: ``yes`` where a format holds, or a runtime runs, a setting."""
    columns: dict[str, Format | Runtime] = {**FORMATS, **RUNTIMES}
    rows = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, grid in SETTINGS.items():
        cells = (
            "yes" if column.why_not(grid, "bfloat16") is None else "-"
            for column in columns.values()
        )
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
