"""The integer grid of a quantised weight, and its step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Describes ``2^bits`` consecutive integers, with one step (and zero point) per group of a row.

    A symmetric grid is ``-2^(bits-1) .. 2^(bits-1)-1``, without a zero point. An asymmetric one is
    ``0 .. 2^bits-1``, with an integer zero point. On a balanced one each integer stands for the
    value half a step above it, so that the values lie evenly on both sides of 0: at 2 bits -1.5,
    -0.5, 0.5 and 1.5 steps (Liu et al., "ParetoQ", arXiv 2502.02631).

    With ``k_quant``, the scales of a row lie on a grid of their own, see `k_scales`.
    """

    bits: int
    symmetric: bool = True
    group_size: int = -1  # -1: one group per row, "per channel"
    balanced: bool = False  # its integers are those of a symmetric grid
    k_quant: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"`bits` must be 2 to 8, but is {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(
                "`group_size` must be -1 (one group per row) or at least 1, but is "
                f"{self.group_size}"
            )
        if self.balanced and not self.symmetric:
            raise ValueError(
                "a balanced grid has no zero point; with `balanced`, leave `symmetric` at True"
            )
        if self.k_quant:
            self._check_k_quant()

    def _check_k_quant(self) -> None:
        unit = k_group(self.bits, self.symmetric and not self.balanced)
        if unit is None:
            raise ValueError(
                f"`k_quant` has no blocks for {self.kind} weights of {self.bits} bits; use fewer "
                "bits, or leave it out"
            )
        sizes = [size for size in (16, 32, 64, 128) if size >= unit]
        if self.group_size not in sizes:
            raise ValueError(
                f"with `k_quant`, {self.kind} weights of {self.bits} bits have groups of "
                f"{', '.join(map(str, sizes))}, but `group_size` is {self.group_size}"
            )

    @property
    def kind(self) -> str:
        """The name of the kind of grid."""
        if self.balanced:
            return "balanced"
        return "symmetric" if self.symmetric else "asymmetric"

    @property
    def shift(self) -> float:
        """What an integer's value, in steps, is more than the integer."""
        return 0.5 if self.balanced else 0.0

    @property
    def whole(self) -> Grid:
        """A grid without halves that holds the same values, with steps of half the size.

        Integer Q becomes 2 Q + 1, which takes a bit more.
        """
        if not self.balanced:
            return self
        return replace(self, bits=self.bits + 1, balanced=False, k_quant=False)

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1

    def num_groups(self, in_features: int) -> int:
        """Returns the number of groups in a row.

        Raises ValueError if the group size does not divide ``in_features``.
        """
        if self.k_quant and in_features % 256:
            raise ValueError(
                f"`k_quant` needs `in_features` to be a multiple of 256, but it is {in_features}; "
                "leave these modules out, or leave out `k_quant`"
            )
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            smaller = [
                g for g in (16, 32, 64, 128, 256) if g < self.group_size and in_features % g == 0
            ]
            hint = (
                f"use {smaller[-1]}, or -1 for one scale per row"
                if smaller
                else "use -1, one scale per row"
            )
            raise ValueError(
                f"`group_size` must divide `in_features`, but {self.group_size} does not divide "
                f"{in_features}; {hint}"
            )
        return in_features // self.group_size

    def split(self, weight: Tensor) -> Tensor:
        """Views (rows, in) as (rows, groups, size of a group)."""
        return weight.unflatten(1, (self.num_groups(weight.shape[1]), -1))

    def centered(self, values: Tensor, zero_point: Tensor | None) -> Tensor:
        """Turns integers into values, in steps: subtracts ``zero_point`` in place.

        ``values`` is (rows, in), ``zero_point`` (rows, groups), or None on a symmetric grid, which
        subtracts nothing, and on a balanced one, which adds a half.
        """
        if zero_point is None:
            return values.add_(self.shift) if self.balanced else values
        return values.sub_(self.expand(zero_point.to(values.dtype), values.shape[1]))

    def units(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Returns ``weight / scale + zero_point``, not rounded; minus a half if balanced.

        (rows, in), (rows, groups) -> (rows, in), in the dtype of ``weight``. ``zero_point`` is None
        on a symmetric grid.
        """
        units = weight / self.expand(scale, weight.shape[1])
        if zero_point is None:
            return units.sub_(self.shift) if self.balanced else units
        return units.add_(self.expand(zero_point.to(units.dtype), weight.shape[1]))

    def values(self, units: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Computes ``scale * (units - zero_point)`` in place: the inverse of `units`."""
        return self.centered(units, zero_point).mul_(self.expand(scale, units.shape[1]))

    def expand(self, per_group: Tensor, in_features: int) -> Tensor:
        """Expands (rows, groups) to (rows, in).

        If a row is one group, returns (rows, 1), left to broadcast.
        """
        if per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(in_features // per_group.shape[1], dim=1)


# Widths that symmetric grids keep in K blocks without a minimum: Q3_K, and Q6_K.
K_WITHOUT_MINIMUM = (3, 5, 6)


def k_group(bits: int, symmetric: bool) -> int | None:
    """The weights that share a small scale in the K blocks of llama.cpp; None: there are none."""
    if bits == 2 or (symmetric and bits in K_WITHOUT_MINIMUM):
        return 16
    return 32 if bits <= 5 else None


def effective_scale(scale: Tensor, scale_dtype: str) -> Tensor:
    """Returns the step that is used and shipped: positive, and rounded to ``scale_dtype``.

    It has the shape and dtype of ``scale``. Training sees this rounding (straight-through), so that
    storing the scale in ``scale_dtype`` changes nothing.
    """
    info = torch.finfo(SCALE_DTYPES[scale_dtype])
    step = scale.clamp(min=info.tiny, max=info.max)
    return step if scale_dtype == "float32" else step.to(SCALE_DTYPES[scale_dtype]).to(scale.dtype)
