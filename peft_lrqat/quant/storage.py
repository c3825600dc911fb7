"""Stores phi, the frozen weight in units of its grid (LR-QAT, section 3.2, "downcasting operator").

fp32, bf16, fp16   phi itself, not clipped
fixed8             8-bit fixed point Q(b).(8-b): b integer and 8-b fractional bits,
                   clipped to the grid; int8
int                rounded and clipped to the grid, b bits each, densely packed; uint8
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import SCALE_DTYPES, Grid, effective_scale
from .k_scales import on_blocks
from .packing import pack, packed_bytes, unpack


FLOAT_DOWNCASTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DOWNCASTS = (*FLOAT_DOWNCASTS, "fixed8", "int")


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """Says how one (out, in) weight is stored: grid, downcast of phi, dtype of scales, width."""

    grid: Grid
    downcast: str
    scale_dtype: str
    in_features: int

    def __post_init__(self) -> None:
        if self.downcast not in DOWNCASTS:
            raise ValueError(
                f"`downcast` must be one of {', '.join(DOWNCASTS)}, but is {self.downcast!r}"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"`scale_dtype` must be one of {', '.join(SCALE_DTYPES)}, but is "
                f"{self.scale_dtype!r}"
            )
        if self.grid.k_quant and self.scale_dtype != "float16":
            raise ValueError(
                f"`k_quant` has scales in float16, but `scale_dtype` is {self.scale_dtype!r}"
            )
        self.grid.num_groups(self.in_features)

    def on_grid(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The scales that K blocks hold, straight-through; on other grids, ``scale`` itself.

        (rows, groups), whole rows. They still have to be rounded to ``scale_dtype``.
        """
        return on_blocks(scale, zero_point, self.grid) if self.grid.k_quant else scale

    def step(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The scales that are used and shipped, (rows, groups) in the dtype of ``scale``."""
        return effective_scale(self.on_grid(scale, zero_point), self.scale_dtype)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of the stored tensor."""
        return FLOAT_DOWNCASTS.get(
            self.downcast, torch.int8 if self.downcast == "fixed8" else torch.uint8
        )

    @property
    def row_elements(self) -> int:
        """The number of elements in one row of the stored tensor."""
        return (
            packed_bytes(self.in_features, self.grid.bits)
            if self.downcast == "int"
            else self.in_features
        )

    @property
    def _fixed_point(self) -> tuple[int, int]:
        # The byte is signed, so the asymmetric grid 0 .. 2^b-1 is centred on zero.
        fraction_bits = 8 - self.grid.bits
        return 2**fraction_bits, 0 if self.grid.symmetric else 2 ** (self.grid.bits - 1)

    def encode(self, phi: Tensor) -> Tensor:
        """Encodes (rows, in) float32 as (rows, row_elements) in ``storage_dtype``."""
        if self.downcast in FLOAT_DOWNCASTS:
            # The forward pass would clip a float16 infinity, but its gradient would not be finite.
            limit = torch.finfo(self.storage_dtype).max
            return phi.clamp(-limit, limit).to(self.storage_dtype)
        clipped = phi.clamp(self.grid.qmin, self.grid.qmax)
        if self.downcast == "fixed8":
            unit, middle = self._fixed_point
            return (clipped - middle).mul_(unit).round_().to(torch.int8)
        return pack(clipped.round_().sub_(self.grid.qmin).to(torch.uint8), self.grid.bits)

    def as_stored(self, phi: Tensor) -> Tensor:
        """``phi`` (..., float32) as `decode` gives it back, before any clipping; a new tensor.

        Neither are integers made of it, so that with ``int`` it is ``phi`` itself.
        """
        if self.downcast == "fixed8":
            # Adding and subtracting the middle of the grid, as `encode` does, is exact.
            unit, _ = self._fixed_point
            return (phi * unit).round_().div_(unit)
        if self.downcast == "int":
            return phi.clone()
        return phi.to(self.storage_dtype, copy=True).float()

    def decode(self, stored: Tensor, columns: slice | None = None) -> Tensor:
        """Decodes (rows, row_elements) in ``storage_dtype`` to (rows, in) float32.

        This is the inverse of :meth:`encode`, up to its rounding. With ``columns``, returns only
        those columns, as (rows, number of columns); their start must be a multiple of 8.
        """
        width = self.in_features
        if columns is not None:
            width = columns.stop - columns.start
            first = (
                packed_bytes(columns.start, self.grid.bits)
                if self.downcast == "int"
                else columns.start
            )
            last = (
                packed_bytes(columns.stop, self.grid.bits)
                if self.downcast == "int"
                else columns.stop
            )
            stored = stored[:, first:last]
        if self.downcast in FLOAT_DOWNCASTS:
            return stored.to(torch.float32, copy=True)
        if self.downcast == "fixed8":
            unit, middle = self._fixed_point
            phi = stored.float().mul_(1 / unit)
            return phi.add_(middle) if middle else phi
        return unpack(stored, self.grid.bits, width).float().add_(self.grid.qmin)
