"""Blocks of a weight, which keep the temporaries of its arithmetic small for layers of any size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


# Weights that one thread works on at a time: half a megabyte of float32 stays in a core's own
# cache, and a block is still long against the cost of starting an operation.
BLOCK_ELEMENTS = 1 << 17
# A block of many threads, which have a larger cache but take longer to start.
MAX_BLOCK_ELEMENTS = 1 << 20
# The part of a dense weight that is made, multiplied with and dropped again.
CHUNK_BYTES = 1 << 23
# The same on other devices: blocks that keep all of a GPU busy, with few launches.
DEVICE_BLOCK_ELEMENTS = 1 << 24
DEVICE_CHUNK_BYTES = 1 << 28


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def block_elements(device: torch.device | None = None) -> int:
    """Weights that elementwise arithmetic takes at a time on ``device``, by default the CPU."""
    if device is not None and device.type != "cpu":
        return DEVICE_BLOCK_ELEMENTS
    return min(BLOCK_ELEMENTS * torch.get_num_threads(), MAX_BLOCK_ELEMENTS)


def row_blocks(rows: int, width: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices that cover ``rows`` rows of ``width`` weights, in order, for elementwise arithmetic.

    Each has at least one row.
    """
    if torch.compiler.is_compiling():
        # It would unroll the loop, and it finds blocks of its own.
        return _slices(rows, max(1, rows))
    return _slices(rows, max(1, block_elements(device) // width))


def _chunk_bytes(device: torch.device | None) -> int:
    return CHUNK_BYTES if device is None or device.type == "cpu" else DEVICE_CHUNK_BYTES


def row_chunks(
    rows: int, width: int, dtype: torch.dtype, device: torch.device | None = None
) -> Iterator[slice]:
    """Slices of the rows of a dense (rows, width) weight in ``dtype``, of at most a chunk's bytes.

    Each has at least one row.
    """
    if torch.compiler.is_compiling():
        return _slices(rows, max(1, rows))
    return _slices(rows, max(1, _chunk_bytes(device) // (width * dtype.itemsize)))


def column_chunks(
    rows: int, width: int, dtype: torch.dtype, unit: int, device: torch.device | None = None
) -> Iterator[slice]:
    """The same for its columns, in slices that start at multiples of ``unit``.

    Each has at least one unit.
    """
    if torch.compiler.is_compiling():
        return _slices(width, max(1, width))
    # Eight weights of packed storage fill whole bytes.
    unit = math.lcm(unit, 8)
    return _slices(width, max(1, _chunk_bytes(device) // (rows * dtype.itemsize * unit)) * unit)
