"""Scales as the K blocks of llama.cpp hold them: small whole numbers times one float16.

In each 256 weights of a row, the scale of a group is ``d * k``: ``d`` is shared by the 256 weights,
and ``k`` is an integer from 1 to 15, or to less where the block must hold ``k * zero_point``, too:

    Q2_K   2 bits                       groups of 16;  k * zero_point <= 15
    Q3_K   3 bits, symmetric            groups of 16
    Q4_K   3 and 4 bits                 groups of 32;  k * zero_point <= 63
    Q5_K   5 bits, with a zero point    groups of 32;  k * zero_point <= 63
    Q6_K   5 and 6 bits, symmetric      groups of 16

Groups of twice, four or eight times that size hold the same ``k`` several times. A symmetric grid
in a block with a minimum has the zero point ``-qmin`` there, a balanced one ``2^bits - 1`` half
steps. ``d`` has 7 significant bits, so that every scale is exact in float16 (11 bits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grid import K_WITHOUT_MINIMUM, Grid


BLOCK = 256  # weights of a row that share `d`
MOST = 15  # four bits
# What float16 holds with 7 bits to spare on both sides: halves of `d`, and 15 times `d`.
LEAST_D, LARGEST_D = 2.0**-17, 2.0**12
DROPPED = 17  # of the 24 significant bits of a float32


@dataclass(frozen=True, kw_only=True)
class KScales:
    """``scale = d * k`` for a weight (rows, in)."""

    d: Tensor  # (rows, in / 256, 1) float32
    k: Tensor  # (rows, in / 256, groups of a block) float32, whole numbers

    @property
    def scale(self) -> Tensor:
        """(rows, groups) float32; exact."""
        return (self.d * self.k).flatten(1)


def split(scale: Tensor, zero_point: Tensor | None, grid: Grid) -> KScales:
    """The nearest scales that K blocks hold; those that they hold come out as they are.

    ``scale`` is (rows, groups), ``zero_point`` likewise, or None on a grid without.
    """
    per_block = BLOCK // grid.group_size
    s = scale.float().unflatten(1, (-1, per_block))
    most: Tensor | float = MOST
    if (largest := largest_minimum(grid)) is not None:
        minimum = torch.full_like(s, 2**grid.bits - 1 if grid.balanced else -grid.qmin)
        if zero_point is not None:
            minimum = zero_point.float().unflatten(1, (-1, per_block))
        most = (largest / minimum.clamp(min=1)).floor().clamp(max=MOST)
    d = _seven_bits((s / most).amax(-1, keepdim=True))
    k = (s / d).round().clamp(min=1)
    return KScales(d=d, k=torch.minimum(k, torch.as_tensor(most, dtype=k.dtype, device=k.device)))


def largest_minimum(grid: Grid) -> int | None:
    """The largest ``k * zero_point`` that the blocks of a grid hold; None: they hold no minimum."""
    if grid.kind == "symmetric" and grid.bits in K_WITHOUT_MINIMUM:
        return None
    return 15 if grid.bits == 2 else 63


def on_blocks(scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Rounds scales (rows, groups) to K blocks, straight-through, in their own dtype."""
    return _OnBlocks.apply(scale, zero_point, grid)


class _OnBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
        return split(scale, zero_point, grid).scale.to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


def _seven_bits(d: Tensor) -> Tensor:
    bits = d.clamp(LEAST_D, LARGEST_D).view(torch.int32)
    rounded = (bits + 2 ** (DROPPED - 1)) & ~(2**DROPPED - 1)
    return rounded.view(torch.float32).clamp(max=LARGEST_D)
