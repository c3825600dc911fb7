"""Integers as blocks of ggml, the tensor format of GGUF files: float16 scales and integers.

    Q4_0   32 weights, -8 .. 7       scale, then 16 bytes: weight j in the low half of byte j,
                                     weight j + 16 in the high half
    Q5_0   32 weights, -16 .. 15     scale, the fifth bits as one 32-bit number, then as Q4_0
    Q8_0   32 weights, -128 .. 127   scale, then a byte each
    TQ2_0  256 weights, -1 .. 2      64 bytes: weight j + 32 n of each half in bits 2 n and 2 n + 1
                                     of byte j; then the scale

The "K" blocks of 256 weights have small integers beside the float16 scale, one for each 16 or 32
weights. Here these are all 1, so that a block has one scale; in those with a minimum, it is the
zero point (or, for half steps, an odd number of half scales):

    Q2_K   0 .. 3, with a minimum    scales and minima as halves of 16 bytes, weights as in TQ2_0
    Q3_K   -4 .. 3                   32 bytes of third bits, two bits as in TQ2_0, 12 of scales
    Q4_K   0 .. 15, with a minimum   12 bytes of scales and minima, then for each 64 weights 32
                                     bytes: weight j in the low half of byte j, j + 32 in the high
    Q5_K   0 .. 31, with a minimum   likewise, with 32 bytes of fifth bits before
    Q6_K   -32 .. 31                 128 bytes of four bits, 64 of two, 16 of scales

The blocks are written from the integers themselves. Quantising ``scale * integer`` again would
choose other scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..quant.grid import Grid
from .linear import QuantizedLinear


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One kind of block."""

    size: int  # weights
    bytes: int
    bits: int  # of its integers
    encode: Callable[[Blocks], list[Tensor]]  # the parts of each block, (rows, blocks, bytes) uint8
    has_minimum: bool = False

    def holds(self, grid: Grid, in_features: int) -> bool:
        """Whether it holds a grid exactly."""
        size = in_features if grid.group_size == -1 else grid.group_size
        if size % self.size:
            return False
        if self.has_minimum:
            return grid.kind != "symmetric" and grid.bits <= self.bits
        # Codes and zero points lie anywhere on an asymmetric grid; their difference needs one bit
        # more, and so do odd numbers of half steps.
        return grid.bits + (grid.kind != "symmetric") <= self.bits


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The integers of a weight in blocks."""

    codes: Tensor  # (rows, blocks, size) int16; from 0 up where the kind has a minimum
    scale: Tensor  # (rows, blocks, 1) float16
    minimum: Tensor | None  # (rows, blocks, 1) uint8, how many `minimum_scale` are subtracted
    minimum_scale: Tensor | None  # (rows, blocks, 1) float16


def block_type(grid: Grid, in_features: int) -> str:
    """The smallest blocks that hold a grid."""
    fitting = [name for name, kind in TYPES.items() if kind.holds(grid, in_features)]
    return min(fitting, key=lambda name: TYPES[name].bytes / TYPES[name].size)


def row_bytes(kind: str, in_features: int) -> int:
    """Bytes of a row in blocks of one kind."""
    return in_features // TYPES[kind].size * TYPES[kind].bytes


def encode(
    kind: str, linear: QuantizedLinear, rows: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> np.ndarray:
    """The bytes of the blocks, (out, bytes of a row) uint8; ``rows`` changes the order of rows.

    Raises:
        ValueError: scales that float16 does not hold.
    """
    blocks = (_with_minimum if TYPES[kind].has_minimum else _without_minimum)(
        linear, rows, TYPES[kind].size
    )
    parts = TYPES[kind].encode(blocks)
    return torch.cat(parts, dim=-1).flatten(1).cpu().numpy()


def _without_minimum(
    linear: QuantizedLinear, rows: Callable[[Tensor], Tensor], size: int
) -> Blocks:
    linear = linear.on(linear.grid.whole)
    return Blocks(
        codes=rows(linear.centered).to(torch.int16).unflatten(1, (-1, size)),
        scale=_per_block(rows(linear.scale_as(torch.float16)), linear, size),
        minimum=None,
        minimum_scale=None,
    )


def _with_minimum(linear: QuantizedLinear, rows: Callable[[Tensor], Tensor], size: int) -> Blocks:
    grid = linear.grid
    scale = linear.scale_as(torch.float16)
    if linear.zero_point is None:
        # (Q + 1/2) s  =  (Q - qmin) s - (2^bits - 1) s / 2
        minimum = torch.full(scale.shape, 2**grid.bits - 1, dtype=torch.uint8, device=scale.device)
        minimum_scale = linear.on(grid.whole).scale_as(torch.float16)
    else:
        minimum, minimum_scale = linear.zero_point, scale
    return Blocks(
        codes=rows(linear.codes.to(torch.int16) - grid.qmin).unflatten(1, (-1, size)),
        scale=_per_block(rows(scale), linear, size),
        minimum=_per_block(rows(minimum), linear, size),
        minimum_scale=_per_block(rows(minimum_scale), linear, size),
    )


def _per_block(per_group: Tensor, linear: QuantizedLinear, size: int) -> Tensor:
    """(rows, groups) -> (rows, blocks, 1)."""
    return per_group.repeat_interleave(linear.group_size // size, dim=1)[..., None].contiguous()


def _q4_0(blocks: Blocks) -> list[Tensor]:
    return [_raw(blocks.scale), _halves((blocks.codes + 8).to(torch.uint8))]


def _q5_0(blocks: Blocks) -> list[Tensor]:
    codes = blocks.codes + 16
    fifth = _bits((codes >> 4).unflatten(-1, (4, 8)), 1).flatten(-1)
    return [_raw(blocks.scale), fifth, _halves((codes & 15).to(torch.uint8))]


def _q8_0(blocks: Blocks) -> list[Tensor]:
    return [_raw(blocks.scale), blocks.codes.to(torch.int8).view(torch.uint8)]


def _tq2_0(blocks: Blocks) -> list[Tensor]:
    # The scale is negative, so that -2 .. 1 become 2 .. -1, which is what the blocks hold.
    return [_quarters(1 - blocks.codes), _raw(-blocks.scale)]


def _q2_k(blocks: Blocks) -> list[Tensor]:
    assert blocks.minimum is not None
    assert blocks.minimum_scale is not None
    small = (1 | (blocks.minimum << 4)).expand(*blocks.codes.shape[:2], 16)
    return [small, _quarters(blocks.codes), _raw(blocks.scale), _raw(blocks.minimum_scale)]


def _q3_k(blocks: Blocks) -> list[Tensor]:
    codes = blocks.codes + 4
    third = _bits((codes >> 2).unflatten(-1, (8, 32)).transpose(-1, -2), 1)
    # 33 stands for 1: sixteen times its low four bits, then its high two.
    small = torch.tensor([0x11] * 8 + [0xAA] * 4, dtype=torch.uint8, device=codes.device)
    return [third, _quarters(codes & 3), small.expand(*codes.shape[:2], 12), _raw(blocks.scale)]


def _q4_k(blocks: Blocks) -> list[Tensor]:
    return [*_small_and_minima(blocks), _halves_of_64(blocks.codes)]


def _q5_k(blocks: Blocks) -> list[Tensor]:
    fifth = _bits((blocks.codes >> 4).unflatten(-1, (8, 32)).transpose(-1, -2), 1)
    return [*_small_and_minima(blocks), fifth, _halves_of_64(blocks.codes & 15)]


def _q6_k(blocks: Blocks) -> list[Tensor]:
    codes = (blocks.codes + 32).unflatten(-1, (2, 4, 32))  # (..., half, quarter, weight)
    low = (codes[..., :2, :] & 15) | ((codes[..., 2:, :] & 15) << 4)
    high = _bits((codes >> 4).transpose(-1, -2), 2)
    small = torch.ones(*blocks.codes.shape[:2], 16, dtype=torch.uint8, device=codes.device)
    return [low.to(torch.uint8).flatten(-3), high.flatten(-2), small, _raw(blocks.scale)]


def _raw(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8)


def _bits(values: Tensor, width: int) -> Tensor:
    """Joins the last dimension to bytes, ``width`` bits each, the first lowest."""
    shifts = torch.arange(0, 8, width, device=values.device)
    return (values.to(torch.int64) << shifts).sum(-1).to(torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    low, high = codes.unflatten(-1, (2, 16)).unbind(-2)
    return low | (high << 4)


def _quarters(codes: Tensor) -> Tensor:
    return _bits(codes.unflatten(-1, (2, 4, 32)).transpose(-1, -2), 2).flatten(-2)


def _halves_of_64(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).unflatten(-1, (4, 2, 32)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def _small_and_minima(blocks: Blocks) -> list[Tensor]:
    """Both float16 scales, and six bits for each of 8 small scales and minima in 12 bytes."""
    assert blocks.minimum is not None
    assert blocks.minimum_scale is not None
    m = blocks.minimum
    # Four scales, four minima with the high bits of the other four, four halves of each.
    small = torch.ones_like(m), m | (m >> 4 << 6), 1 | ((m & 15) << 4)
    shape = *blocks.codes.shape[:2], 4
    scales = _raw(blocks.scale), _raw(blocks.minimum_scale)
    return [*scales, *(part.expand(shape) for part in small)]


TYPES = {
    "TQ2_0": BlockType(size=256, bytes=66, bits=2, encode=_tq2_0),
    "Q2_K": BlockType(size=256, bytes=84, bits=2, encode=_q2_k, has_minimum=True),
    "Q3_K": BlockType(size=256, bytes=110, bits=3, encode=_q3_k),
    "Q4_0": BlockType(size=32, bytes=18, bits=4, encode=_q4_0),
    "Q4_K": BlockType(size=256, bytes=144, bits=4, encode=_q4_k, has_minimum=True),
    "Q5_0": BlockType(size=32, bytes=22, bits=5, encode=_q5_0),
    "Q5_K": BlockType(size=256, bytes=176, bits=5, encode=_q5_k, has_minimum=True),
    "Q6_K": BlockType(size=256, bytes=210, bits=6, encode=_q6_k),
    "Q8_0": BlockType(size=32, bytes=34, bits=8, encode=_q8_0),
}
