"""Integers as blocks of ggml, the tensor format of GGUF files: float16 scales and integers.

    Q4_0   32 weights, -8 .. 7       scale, then 16 bytes: weight j in the low half of byte j,
                                     weight j + 16 in the high half
    Q5_0   32 weights, -16 .. 15     scale, the fifth bits as one 32-bit number, then as Q4_0
    Q8_0   32 weights, -128 .. 127   scale, then a byte each
    TQ2_0  256 weights, -1 .. 2      64 bytes: weight j + 32 n of each half in bits 2 n and 2 n + 1
                                     of byte j; then the scale

The "K" blocks of 256 weights have small integers beside the float16 scale, one for each 16 or 32
weights. On grids with ``k_quant`` these are k of `k_scales`, on others they are all 1, so that a
block has one scale. In blocks with a minimum, that is k times the zero point (or, for half steps,
an odd number of half scales):

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

from ..quant import k_scales
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
    small_group: int | None = None  # weights that share a small integer; None: it has none

    def holds(self, grid: Grid, in_features: int) -> bool:
        """Whether it holds a grid exactly."""
        size = in_features if grid.group_size == -1 else grid.group_size
        if grid.k_quant:
            return (
                self.small_group is not None
                and size % self.small_group == 0
                and in_features % self.size == 0
                and self.has_minimum == (k_scales.largest_minimum(grid) is not None)
                and grid.bits <= self.bits
            )
        if size % self.size:
            return False
        if self.has_minimum:
            return grid.kind != "symmetric" and grid.bits <= self.bits
        # Codes and zero points lie anywhere on an asymmetric grid; their difference needs one bit
        # more, and so do odd numbers of half steps.
        return grid.bits + (grid.kind != "symmetric") <= self.bits

    @property
    def small_integers(self) -> int:
        """How many a block has; one that is not stored, where it has none."""
        return 1 if self.small_group is None else self.size // self.small_group


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The integers of a weight in blocks."""

    codes: Tensor  # (rows, blocks, size) int16; from 0 up where the kind has a minimum
    scale: Tensor  # (rows, blocks, 1) float16
    small: Tensor  # (rows, blocks, small integers) uint8, what the scale is multiplied by
    minimum: Tensor | None  # likewise, how many `minimum_scale` are subtracted
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
        linear, rows, TYPES[kind]
    )
    parts = TYPES[kind].encode(blocks)
    return torch.cat(parts, dim=-1).flatten(1).cpu().numpy()


def _without_minimum(
    linear: QuantizedLinear, rows: Callable[[Tensor], Tensor], kind: BlockType
) -> Blocks:
    linear = linear.on(linear.grid.whole)
    scale, small = _scales(linear, kind)
    return Blocks(
        codes=rows(linear.centered).to(torch.int16).unflatten(1, (-1, kind.size)),
        scale=rows(scale),
        small=rows(small),
        minimum=None,
        minimum_scale=None,
    )


def _with_minimum(
    linear: QuantizedLinear, rows: Callable[[Tensor], Tensor], kind: BlockType
) -> Blocks:
    grid = linear.grid
    scale, small = _scales(linear, kind)
    if linear.zero_point is not None:
        zero = _per_small(linear.zero_point, linear, kind)
        minimum, minimum_scale = small * zero, scale
    elif grid.balanced:
        # (Q + 1/2) s  =  (Q - qmin) s - (2^bits - 1) s / 2
        linear.on(grid.whole).scale_as(torch.float16)  # refuses halves that it does not hold
        minimum, minimum_scale = small * (2**grid.bits - 1), scale / 2
    else:
        minimum, minimum_scale = small * -grid.qmin, scale
    return Blocks(
        codes=rows(linear.codes.to(torch.int16) - grid.qmin).unflatten(1, (-1, kind.size)),
        scale=rows(scale),
        small=rows(small),
        minimum=rows(minimum),
        minimum_scale=rows(minimum_scale),
    )


def _scales(linear: QuantizedLinear, kind: BlockType) -> tuple[Tensor, Tensor]:
    """The float16 of each block, and its small integers."""
    scale = linear.scale_as(torch.float16)
    if linear.grid.k_quant:
        found = k_scales.split(scale, linear.zero_point, linear.grid)
        small = found.k.repeat_interleave(kind.small_integers // found.k.shape[-1], dim=-1)
        return found.d.half(), small.to(torch.uint8)
    per_block = scale.repeat_interleave(linear.group_size // kind.size, dim=1)[..., None]
    shape = *per_block.shape[:2], kind.small_integers
    return per_block.contiguous(), torch.ones(shape, dtype=torch.uint8, device=scale.device)


def _per_small(per_group: Tensor, linear: QuantizedLinear, kind: BlockType) -> Tensor:
    """(rows, groups) -> (rows, blocks, small integers)."""
    size = kind.size // kind.small_integers
    spread = per_group.repeat_interleave(linear.group_size // size, dim=1)
    return spread.unflatten(1, (-1, kind.small_integers))


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
    small = blocks.small | (blocks.minimum << 4)
    return [small, _quarters(blocks.codes), _raw(blocks.scale), _raw(blocks.minimum_scale)]


def _q3_k(blocks: Blocks) -> list[Tensor]:
    codes = blocks.codes + 4
    third = _bits((codes >> 2).unflatten(-1, (8, 32)).transpose(-1, -2), 1)
    # 32 stands for 0. Low four bits of two in a byte, then the high two bits of four.
    small = blocks.small + 32
    low = (small[..., :8] & 15) | ((small[..., 8:] & 15) << 4)
    high = _bits((small >> 4).unflatten(-1, (4, 4)).transpose(-1, -2), 2)
    return [third, _quarters(codes & 3), low, high, _raw(blocks.scale)]


def _q4_k(blocks: Blocks) -> list[Tensor]:
    return [*_small_and_minima(blocks), _halves_of_64(blocks.codes)]


def _q5_k(blocks: Blocks) -> list[Tensor]:
    fifth = _bits((blocks.codes >> 4).unflatten(-1, (8, 32)).transpose(-1, -2), 1)
    return [*_small_and_minima(blocks), fifth, _halves_of_64(blocks.codes & 15)]


def _q6_k(blocks: Blocks) -> list[Tensor]:
    codes = (blocks.codes + 32).unflatten(-1, (2, 4, 32))  # (..., half, quarter, weight)
    low = (codes[..., :2, :] & 15) | ((codes[..., 2:, :] & 15) << 4)
    high = _bits((codes >> 4).transpose(-1, -2), 2)
    return [low.to(torch.uint8).flatten(-3), high.flatten(-2), blocks.small, _raw(blocks.scale)]


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
    k, m = blocks.small, blocks.minimum
    # The first four scales and minima with the high bits of the last four, then their low halves.
    first = (part[..., :4] | (part[..., 4:] >> 4 << 6) for part in (k, m))
    last = (k[..., 4:] & 15) | ((m[..., 4:] & 15) << 4)
    return [_raw(blocks.scale), _raw(blocks.minimum_scale), *first, last]


TYPES = {
    "TQ2_0": BlockType(size=256, bytes=66, bits=2, encode=_tq2_0),
    "Q2_K": BlockType(size=256, bytes=84, bits=2, encode=_q2_k, has_minimum=True, small_group=16),
    "Q3_K": BlockType(size=256, bytes=110, bits=3, encode=_q3_k, small_group=16),
    "Q4_0": BlockType(size=32, bytes=18, bits=4, encode=_q4_0),
    "Q4_K": BlockType(size=256, bytes=144, bits=4, encode=_q4_k, has_minimum=True, small_group=32),
    "Q5_0": BlockType(size=32, bytes=22, bits=5, encode=_q5_0),
    "Q5_K": BlockType(size=256, bytes=176, bits=5, encode=_q5_k, has_minimum=True, small_group=32),
    "Q6_K": BlockType(size=256, bytes=210, bits=6, encode=_q6_k, small_group=16),
    "Q8_0": BlockType(size=32, bytes=34, bits=8, encode=_q8_0),
}
