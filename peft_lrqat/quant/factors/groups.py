"""Vectors at a few bits, in groups with a scale each: mid-rise grids, round-to-nearest and signs.

A component of an adapter is a pair of vectors. Each is cut into groups of ``group_size`` entries;
the last group may be shorter. A group is stored as unsigned codes and a scale:

    value = scale * (code - zero_point)

    mid-rise  zero_point = (2^bits - 1) / 2, the same everywhere and not stored: at 2 bits the
              levels are -1.5, -0.5, 0.5 and 1.5 times the scale. A search finds the scale with
              the least squared error. At 1 bit this is sign(x) * mean|x| (LoRAQuant, section 3).
    rtn       an integer zero_point for each group, from its minimum and maximum (LoRAQuant,
              section 3).

All functions work on a batch of vectors (N, length), each with its own bits. A vector of 0 bits is
zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


MAX_BITS = 8
CANDIDATES = 24  # scales that the search tries for a group
TINY = 2.0**-100  # divides a group whose scale is zero


@dataclass(frozen=True, kw_only=True)
class GroupCodes:
    """Holds a batch of quantised vectors of one length."""

    codes: Tensor  # (N, length) uint8
    scale: Tensor  # (N, groups) in the dtype that is stored
    zero_point: Tensor | None  # (N, groups) uint8; None on mid-rise grids
    bits: Tensor  # (N,) int64
    group_size: int

    def values(self) -> Tensor:
        """Returns the dequantised vectors, (N, length) float32."""
        if self.zero_point is None:
            zero_point = ((2.0 ** self.bits.float() - 1) / 2)[:, None].expand(self.scale.shape)
        else:
            zero_point = self.zero_point.float()
        length = self.codes.shape[1]
        scale = spread(self.scale.float(), self.group_size, length)
        return self.codes.float().sub_(spread(zero_point, self.group_size, length)).mul_(scale)

    def __getitem__(self, rows: slice) -> GroupCodes:
        """Returns some of the vectors."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return replace(
            self,
            codes=self.codes[rows],
            scale=self.scale[rows],
            zero_point=zero_point,
            bits=self.bits[rows],
        )

    def where(self, mine: Tensor, other: GroupCodes) -> GroupCodes:
        """Returns these vectors where the mask ``mine`` (N,) is set, those of ``other`` elsewhere.

        Both batches must have the same bits and the same kind of grid.
        """
        mask = mine[:, None]
        zero_point = None
        if self.zero_point is not None and other.zero_point is not None:
            zero_point = self.zero_point.where(mask, other.zero_point)
        return replace(
            self,
            codes=self.codes.where(mask, other.codes),
            scale=self.scale.where(mask, other.scale),
            zero_point=zero_point,
        )


def num_groups(length: int, group_size: int) -> int:
    """Returns the number of groups of a vector; the last one may be shorter."""
    return -(-length // group_size)


def quantize_midrise(
    x: Tensor, bits: Tensor, *, group_size: int, scale_dtype: torch.dtype
) -> GroupCodes:
    """Quantises x (N, length) float to the nearest levels of mid-rise grids.

    Of the scales that it tries for a group, it takes the one with the least squared error.
    """
    grouped, mask = _grouped(x.float(), group_size)  # (N, groups, size)
    half = (2.0 ** (bits.float() - 1))[:, None, None]  # levels on each side of zero
    peak = grouped.abs().amax(-1, keepdim=True)
    best = torch.full_like(peak, torch.inf)
    scale = torch.zeros_like(peak)
    for fraction in torch.linspace(1.0, 0.2, CANDIDATES, dtype=torch.float32).tolist():
        # The outermost level is half - 1/2.
        candidate = fraction * peak / (half - 0.5).clamp(min=0.5)
        # One step of Lloyd's algorithm: the best scale for the codes of the candidate.
        level = _levels(grouped, candidate, half).mul_(mask)
        candidate = (grouped * level).sum(-1, keepdim=True) / level.square().sum(
            -1, keepdim=True
        ).clamp(min=TINY)
        candidate = candidate.to(scale_dtype).float()
        error = (
            (grouped - candidate * _levels(grouped, candidate, half))
            .square_()
            .mul_(mask)
            .sum(-1, keepdim=True)
        )
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    # A vector of 0 bits has no codes; a scale of 0 marks it.
    scale = torch.where(half < 1, 0.0, scale)
    codes = (_levels(grouped, scale, half) + (half - 0.5)).clamp_(min=0)
    codes = codes.flatten(1)[:, : x.shape[1]].round().to(torch.uint8)
    return GroupCodes(
        codes=torch.where((bits > 0)[:, None], codes, 0),
        scale=scale.squeeze(-1).to(scale_dtype),
        zero_point=None,
        bits=bits,
        group_size=group_size,
    )


def quantize_rtn(
    x: Tensor, bits: Tensor, *, group_size: int, scale_dtype: torch.dtype
) -> GroupCodes:
    """Rounds x (N, length) float to nearest between the minimum and maximum of each group.

    The range includes zero. This is the grid of LoRAQuant.
    """
    grouped, _ = _grouped(x.float(), group_size)
    scale, zero_point, top = _rtn_range(grouped, bits)
    scale = scale.to(scale_dtype).float()
    codes = (grouped / scale.clamp(min=TINY)).round_().add_(zero_point).clamp_(min=0).minimum(top)
    return GroupCodes(
        codes=codes.flatten(1)[:, : x.shape[1]].to(torch.uint8),
        scale=scale.squeeze(-1).to(scale_dtype),
        zero_point=zero_point.squeeze(-1).to(torch.uint8),
        bits=bits,
        group_size=group_size,
    )


def fake_rtn(x: Tensor, bits: Tensor, *, group_size: int) -> Tensor:
    """Returns differentiable values of :func:`quantize_rtn`, before its scale is shortened.

    Rounding passes the gradient on. The scale depends on the group's minimum and maximum, so that
    these learn where the range should end.
    """
    grouped, _ = _grouped(x, group_size)
    scale, zero_point, top = _rtn_range(grouped, bits)
    units = grouped / scale.clamp(min=TINY)
    codes = units + (units.round() - units).detach() + zero_point
    # The ends of the grid pass the whole gradient on; a clamp does so in some releases of torch.
    codes = torch.where(codes < 0, 0.0, torch.where(codes > top, top, codes))
    return ((codes - zero_point) * scale).flatten(1)[:, : x.shape[1]]


def _rtn_range(grouped: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scale and zero point (N, groups, 1) of each group.

    The third tensor is the greatest code of each vector, (N, 1, 1).
    """
    top = (2.0 ** bits.to(grouped.dtype) - 1)[:, None, None]
    # Padding is zero, which every range includes. Zero itself passes the gradient on.
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    low, high = torch.where(low > 0, 0.0, low), torch.where(high < 0, 0.0, high)
    scale = (high - low) / top
    zero_point = (-low / scale.clamp(min=TINY)).detach().round().clamp(min=0).minimum(top)
    return scale, zero_point, top


def _levels(grouped: Tensor, scale: Tensor, half: Tensor) -> Tensor:
    """Returns the nearest of -half + 1/2 ... half - 1/2, in units of the scale; zero goes up."""
    level = (grouped / scale.clamp(min=TINY)).floor_()
    return torch.maximum(torch.minimum(level, half - 1), -half).add_(0.5)


def _grouped(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Pads x with zeros and cuts it: (N, length) -> (N, groups, size).

    The second tensor says which entries are real, (groups, size).
    """
    length = x.shape[1]
    groups = num_groups(length, group_size)
    size = min(group_size, length)
    padded = torch.nn.functional.pad(x, (0, groups * size - length)).unflatten(1, (groups, size))
    return padded, (torch.arange(groups * size, device=x.device) < length).unflatten(
        0, (groups, size)
    )


def spread(per_group: Tensor, group_size: int, length: int) -> Tensor:
    """Repeats a value of each group for its entries, (N, groups) -> (N, length)."""
    return per_group.repeat_interleave(min(group_size, length), dim=1)[:, :length]
