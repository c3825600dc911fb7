"""Blocks of rows: what keeps the temporaries of a weight's arithmetic small, whatever the layer's size."""

from __future__ import annotations

from collections.abc import Iterator


# Weights worked on at a time: float32 temporaries of a few MB.
BLOCK_ELEMENTS = 1 << 20


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``width`` weights, in order, at least one row each."""
    step = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
