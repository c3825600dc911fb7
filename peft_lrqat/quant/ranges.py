"""Range estimation: the first scale and zero point of each group, from the weight alone (LR-QAT,
section 4).

The result must be the same on every machine, because a saved adapter rebuilds its frozen weights
from it. Every candidate is therefore computed elementwise in float32 by exactly rounded operations;
errors are summed in float64, whose rounding is far below the distance of any two candidates; and a
candidate wins only if it is strictly better than the ones before it. Two orders of summing that
differ all the same would be noticed when the adapter is loaded, by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import row_blocks
from .grid import Grid, effective_scale


# The search tries these shares of the min-max range.
SEARCH_SHARES = [1.0 - 0.8 * k / 64 for k in range(65)]


def _scale_and_zero_point(
    low: Tensor, high: Tensor, share: float, grid: Grid, scale_dtype: str
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (uint8) whose grid covers ``share`` of the range [low, high];
    shapes as ``low``.
    """
    if grid.symmetric:
        span, steps = torch.maximum(high, -low), grid.qmax
    else:
        span, steps = high - low, grid.qmax - grid.qmin
    # By a tensor: division by a Python number is, on GPUs, a product with its rounded inverse.
    span = span / torch.full_like(span, steps)
    scale = effective_scale(span * share, scale_dtype)
    zero_point = (
        torch.zeros_like(low)
        if grid.symmetric
        else (-low * share / scale).round_().clamp_(0, grid.qmax)
    )
    return scale, zero_point.to(torch.uint8)


def minmax_range(groups: Tensor, grid: Grid, scale_dtype: str, p: float) -> tuple[Tensor, Tensor]:
    """Covers every weight, with step ``max|w| / qmax``, or ``(max - min) / (2^bits - 1)`` on an
    asymmetric grid.

    (rows, groups, size) -> scale and zero point, both (rows, groups).
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    return _scale_and_zero_point(low, high, 1.0, grid, scale_dtype)


def _power(error: Tensor, p: float) -> Tensor:
    """``|error| ** p``, elementwise; even powers by exactly rounded products, in place, the others
    in float64.
    """
    if p == 2:
        return error.square_()
    if p == 4:
        return error.square_().square_()
    return error.abs_().double().pow_(p)


def _clipping_loss(
    extremes: tuple[Tensor, Tensor], step: Tensor, unit: Tensor, grid: Grid, p: float
) -> Tensor:
    """What clipping a few of the largest and least weights alone costs on a symmetric grid, (rows,
    groups), float64.
    """
    largest, least = extremes
    excess = torch.cat([largest - grid.qmax * step, grid.qmin * step - least], -1)
    return excess.clamp_(min=0).div_(unit).double().pow_(p).sum(-1)


def lp_range(groups: Tensor, grid: Grid, scale_dtype: str, p: float) -> tuple[Tensor, Tensor]:
    """Least ``sum |w - dequantize(quantize(w))|^p`` over shares of the min-max range (the paper: p
    around 4).
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    # Errors are taken relative to the range, so that a small weight's p-th power does not
    # underflow.
    unit = torch.maximum(high, -low).clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    best_scale, best_zero_point = _scale_and_zero_point(low, high, 1.0, grid, scale_dtype)
    best_loss = torch.full(low.shape, torch.inf, dtype=torch.float64, device=low.device)
    few = min(16, -(-groups.shape[-1] // 64))
    extremes = groups.topk(few).values, groups.topk(few, largest=False).values
    coordinate, rounded = torch.empty_like(groups), torch.empty_like(groups)
    for share in SEARCH_SHARES:
        scale, zero_point = _scale_and_zero_point(low, high, share, grid, scale_dtype)
        step, offset = scale.unsqueeze(-1), zero_point.unsqueeze(-1).float()
        # It only grows as the share shrinks; the margin is far above any rounding.
        if (
            grid.symmetric
            and (_clipping_loss(extremes, step, unit, grid, p) > 1.001 * best_loss).all()
        ):
            break
        torch.div(groups, step, out=coordinate)
        if grid.symmetric:
            torch.round(coordinate, out=rounded).clamp_(grid.qmin, grid.qmax)
        else:
            torch.add(coordinate, offset, out=rounded).round_().clamp_(grid.qmin, grid.qmax).sub_(
                offset
            )
        error = coordinate.sub_(rounded).mul_(step / unit)
        loss = _power(error, p).sum(-1, dtype=torch.float64)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


RANGES: dict[str, Callable[[Tensor, Grid, str, float], tuple[Tensor, Tensor]]] = {
    "minmax": minmax_range,
    "lp": lp_range,
}


def estimate_range(
    weight: Tensor, grid: Grid, *, estimator: str, scale_dtype: str, p: float
) -> tuple[Tensor, Tensor]:
    """First scale and zero point of ``weight``: (out, in) float -> (out, groups) float32 and (out,
    groups) uint8.

    The scale is already rounded to ``scale_dtype``. Zero points of a symmetric grid are all zero.
    Works on blocks of rows, so that the temporaries stay small. Raises KeyError for an unknown
    estimator.
    """
    search = RANGES[estimator]
    blocks = (weight.detach()[rows].float() for rows in row_blocks(*weight.shape, weight.device))
    parts = [search(grid.split(block), grid, scale_dtype, p) for block in blocks]
    scales, zero_points = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zero_points)
