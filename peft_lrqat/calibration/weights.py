"""A full-rank weight that is trained together with its grid, as block reconstruction does.

    Z     = W / s + zero_point             in units of the grid
    Q     = clip(round(Z), qmin, qmax)
    W_hat = s * (Q - zero_point)

All three are trained, straight through every rounding, the one to the storage of phi included
(Chen et al., "EfficientQAT", arXiv 2407.11062, section 3.2). Unlike in LR-QAT, Z depends on s, so
that the gradient of the scale has the further term of LSQ (arXiv 1902.08153, equation 3):

    dW = dW_hat * inside
    ds = sum over the group of  dW_hat * (Q - zero_point - inside * W / s)
    dz = sum over the group of  -s * dW_hat * (1 - inside)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..quant import Grid, WeightFormat
from ..quant.blocks import row_blocks


@dataclass(frozen=True, kw_only=True)
class StoredLinear:
    """What is stored of one weight of shape (out, in)."""

    phi: Tensor  # (out, row_elements), in the format's storage dtype
    scale: Tensor  # (out, groups) float32, already rounded to the format's scale dtype
    zero_point: Tensor | None  # (out, groups) uint8; None on a symmetric grid

    def to(self, device: torch.device) -> StoredLinear:
        """The same on a device."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return StoredLinear(phi=self.phi.to(device), scale=self.scale.to(device), zero_point=zero)


def store(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat
) -> StoredLinear:
    """Stores ``weight`` (out, in) on a grid; ``scale`` and ``zero_point`` are (out, groups)."""
    grid = format.grid
    offset = None if zero_point is None else _whole(zero_point.detach(), format)
    step = format.step(scale.detach().float(), offset)
    phi = torch.empty(
        len(weight), format.row_elements, dtype=format.storage_dtype, device=weight.device
    )
    for rows in row_blocks(len(weight), weight.shape[1], weight.device):
        zero = None if offset is None else offset[rows]
        units = grid.units(weight.detach()[rows].float(), step[rows], zero)
        phi[rows] = _without_ties(format.encode(units), format)
    return StoredLinear(
        phi=phi, scale=step, zero_point=None if offset is None else offset.to(torch.uint8)
    )


def _without_ties(phi: Tensor, format: WeightFormat) -> Tensor:
    """Moves fixed-point values halfway between two integers one unit towards the one they round to.

    The first step of an adapter, however small, would tip all of them over at once: at 2 bits one
    weight in 64, which is enough to ruin a calibrated model.
    """
    if format.downcast != "fixed8":
        return phi
    grid = format.grid
    units = format.decode(phi)
    whole = units.round().clamp_(grid.qmin, grid.qmax)
    towards = (whole - units).sign().to(phi.dtype)
    return torch.where((whole - units).abs() == 0.5, phi + towards, phi)


def rounded(stored: StoredLinear, format: WeightFormat, dtype: torch.dtype) -> Tensor:
    """``W_hat`` of a stored weight, (out, in) in ``dtype``: the model that is deployed."""
    grid = format.grid
    phi = stored.phi
    weight = torch.empty(len(phi), format.in_features, dtype=dtype, device=phi.device)
    for rows in row_blocks(len(phi), format.in_features, phi.device):
        codes = format.decode(phi[rows]).round_().clamp_(grid.qmin, grid.qmax)
        zero = None if stored.zero_point is None else stored.zero_point[rows]
        weight[rows] = grid.values(codes, stored.scale[rows], zero).to(dtype)
    return weight


def _whole(zero_point: Tensor, format: WeightFormat) -> Tensor:
    return zero_point.round().clamp_(format.grid.qmin, format.grid.qmax)


class TrainedWeight(nn.Module):
    """The weight, scale and zero point of one layer while its block is reconstructed.

    Args:
        weight: (out, in), the unquantised weight.
        scale: (out, groups), the first scale.
        zero_point: (out, groups), or None on a symmetric grid.
        format: how the result is stored.
        dtype: of ``W_hat``.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        format: WeightFormat,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.format, self.dtype = format, dtype
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True))
        self.scale = nn.Parameter(scale.detach().to(torch.float32, copy=True))
        self.zero_point = (
            None if zero_point is None else nn.Parameter(zero_point.detach().float().clone())
        )

    def forward(self) -> Tensor:
        """``W_hat``, (out, in) in ``dtype``."""
        return _RoundedWeight.apply(
            self.weight, self.scale, self.zero_point, self.format, self.dtype
        )

    def stored(self) -> StoredLinear:
        """The result, as it is stored."""
        return store(self.weight, self.scale, self.zero_point, self.format)


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        format: WeightFormat,
        dtype: torch.dtype,
    ) -> Tensor:
        grid = format.grid
        zero = None if zero_point is None else _whole(zero_point, format)
        step = format.step(scale, zero)
        made = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        kept = made.new_empty(weight.shape, dtype=torch.int8 if grid.symmetric else torch.uint8)
        for rows in row_blocks(len(weight), weight.shape[1], weight.device):
            steps, shift = step[rows].unsqueeze(-1), _shift(grid, zero, rows)
            codes = format.as_stored(grid.split(weight[rows]).div(steps).sub_(shift))
            codes = codes.round_().clamp_(grid.qmin, grid.qmax)
            kept[rows] = codes.flatten(1)
            made[rows] = codes.add_(shift).mul_(steps).flatten(1)
        ctx.save_for_backward(weight, step, zero, kept)
        ctx.format = format
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, zero, kept = ctx.saved_tensors
        grid: Grid = ctx.format.grid
        grad_weight, grad_scale = torch.empty_like(weight), torch.empty_like(step)
        grad_zero = None if zero is None else torch.empty_like(step)
        for rows in row_blocks(len(weight), weight.shape[1], weight.device):
            G, W = grid.split(grad[rows].float()), grid.split(weight[rows])
            steps, shift = step[rows].unsqueeze(-1), _shift(grid, zero, rows)
            low, high = steps * (shift + (grid.qmin - 0.5)), steps * (shift + (grid.qmax + 0.5))
            inner = G.where((low < W) & (high > W), 0.0)
            grad_weight[rows] = inner.flatten(1)
            # The sum over G (Q - zero_point), less that over inside * G W / s.
            values = grid.split(kept[rows]).to(G.dtype).add_(shift)
            of_values, of_weights = values.mul_(G).sum(-1), W.mul(inner).sum(-1)
            grad_scale[rows] = of_values - of_weights / step[rows]
            if grad_zero is not None:
                grad_zero[rows] = (inner.sum(-1) - G.sum(-1)).mul_(step[rows])
        return grad_weight, grad_scale, grad_zero, None, None


def _shift(grid: Grid, zero_point: Tensor | None, rows: slice) -> Tensor | float:
    """What an integer's value is more than the integer, in steps; (rows, groups, 1)."""
    return grid.shift if zero_point is None else -zero_point[rows].unsqueeze(-1)
