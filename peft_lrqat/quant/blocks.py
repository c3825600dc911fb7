"""Blocks of a weight: what keeps the temporaries of its arithmetic small, whatever the layer's size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


# Weights that one thread works on at a time: half a megabyte of float32 stays in a core's own cache, and a block is still
# long against the cost of starting an operation.
BLOCK_ELEMENTS = 1 << 17
# A block of many threads, or on a GPU, which has more to start and a larger cache.
MAX_BLOCK_ELEMENTS = 1 << 20
# The part of a dense weight that is made, multiplied with and dropped again.
CHUNK_BYTES = 1 << 23


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def row_blocks(rows: int, width: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``width`` weights, in order, at least one row each; for elementwise arithmetic."""
    if torch.compiler.is_compiling():
        # It would unroll the loop, and it finds blocks of its own.
        return _slices(rows, max(1, rows))
    on_cpu = device is None or device.type == "cpu"
    elements = (
        min(BLOCK_ELEMENTS * torch.get_num_threads(), MAX_BLOCK_ELEMENTS)
        if on_cpu
        else MAX_BLOCK_ELEMENTS
    )
    return _slices(rows, max(1, elements // width))


def row_chunks(rows: int, width: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the rows of a dense (rows, width) weight in ``dtype``, of at most CHUNK_BYTES, but one row at least."""
    if torch.compiler.is_compiling():
        return _slices(rows, max(1, rows))
    return _slices(rows, max(1, CHUNK_BYTES // (width * dtype.itemsize)))


def column_chunks(rows: int, width: int, dtype: torch.dtype, unit: int) -> Iterator[slice]:
    """The same for its columns: slices that start at multiples of ``unit``, of at most CHUNK_BYTES, but one unit at least."""
    if torch.compiler.is_compiling():
        return _slices(width, max(1, width))
    # Eight weights of packed storage fill whole bytes.
    unit = math.lcm(unit, 8)
    return _slices(width, max(1, CHUNK_BYTES // (rows * dtype.itemsize * unit)) * unit)
