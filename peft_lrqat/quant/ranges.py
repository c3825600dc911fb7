"""Range estimation: the first scale and zero point of each group (LR-QAT, section 4).

The weight alone decides. The result must be the same on every machine, because a saved adapter
rebuilds its frozen weights from it. Each candidate is therefore computed elementwise in float32, by
exactly rounded operations. Errors are summed in float64, whose rounding is far smaller than the
distance between any two candidates. A candidate wins only if it is strictly better than the ones
before it. If two orders of summing still differ, the fingerprint shows it when the adapter
is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .blocks import row_blocks
from .grid import Grid, effective_scale
from .k_scales import on_blocks


# The search tries these shares of the min-max range.
SEARCH_SHARES = [1.0 - 0.8 * k / 64 for k in range(65)]
# Shares between two looks whether smaller ones can still win; on a GPU, a look waits.
CHECKED_EVERY = 4


def _scale_and_zero_point(
    low: Tensor, high: Tensor, share: float, grid: Grid, scale_dtype: str
) -> tuple[Tensor, Tensor]:
    """Returns the scale and zero point whose grid covers ``share`` of the range [low, high].

    ``low``, ``high`` (rows, groups) float32 -> scale (float32) and zero point (uint8), of that
    shape.
    """
    if grid.symmetric:
        span, steps = torch.maximum(high, -low), grid.qmax + grid.shift
    else:
        span, steps = high - low, grid.qmax - grid.qmin
    # Divides by a tensor: on GPUs, division by a Python number multiplies by its rounded inverse.
    span = span / torch.full_like(span, steps)
    scale = effective_scale(span * share, scale_dtype)
    zero_point = (
        torch.zeros_like(low)
        if grid.symmetric
        else (-low * share / scale).round_().clamp_(0, grid.qmax)
    )
    return scale, zero_point.to(torch.uint8)


def minmax_range(groups: Tensor, grid: Grid, scale_dtype: str, p: float) -> tuple[Tensor, Tensor]:
    """Covers every weight: the step is ``max|w| / qmax``.

    On a balanced grid it is ``max|w| / (qmax + 1/2)``, on an asymmetric one
    ``(max - min) / (2^bits - 1)``. (rows, groups, size) -> scale and zero point, both
    (rows, groups).
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    return _scale_and_zero_point(low, high, 1.0, grid, scale_dtype)


def _power(error: Tensor, p: float) -> Tensor:
    """Returns ``|error| ** p``, elementwise.

    Powers 2 and 4 are exactly rounded products, in place; the others are computed in float64.
    """
    if p == 2:
        return error.square_()
    if p == 4:
        return error.square_().square_()
    return error.abs_().double().pow_(p)


def _clipping_loss(
    extremes: tuple[Tensor, Tensor], step: Tensor, unit: Tensor, grid: Grid, p: float
) -> Tensor:
    """Returns what clipping alone costs a few of the largest and smallest weights.

    For symmetric grids; (rows, groups), float64.
    """
    largest, least = extremes
    top, bottom = grid.qmax + grid.shift, grid.qmin + grid.shift
    excess = torch.cat([largest - top * step, bottom * step - least], -1)
    return excess.clamp_(min=0).div_(unit).double().pow_(p).sum(-1)


def lp_range(groups: Tensor, grid: Grid, scale_dtype: str, p: float) -> tuple[Tensor, Tensor]:
    """Minimizes ``sum |w - dequantize(quantize(w))|^p`` over shares of the min-max range.

    The paper uses p around 4. (rows, groups, size) -> scale and zero point, both (rows, groups).
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    # Errors are relative to the range, so that a small weight's p-th power does not
    # underflow.
    unit = torch.maximum(high, -low).clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    best_scale, best_zero_point = _scale_and_zero_point(low, high, 1.0, grid, scale_dtype)
    best_loss = torch.full(low.shape, torch.inf, dtype=torch.float64, device=low.device)
    few = min(16, -(-groups.shape[-1] // 64))
    extremes = groups.topk(few).values, groups.topk(few, largest=False).values
    coordinate, rounded = torch.empty_like(groups), torch.empty_like(groups)
    for number, share in enumerate(SEARCH_SHARES):
        scale, zero_point = _scale_and_zero_point(low, high, share, grid, scale_dtype)
        step, offset = scale.unsqueeze(-1), zero_point.unsqueeze(-1).float()
        # This loss only grows as the share shrinks; the margin is far larger than any rounding.
        if (
            grid.symmetric
            and number % CHECKED_EVERY == 0
            and (_clipping_loss(extremes, step, unit, grid, p) > 1.001 * best_loss).all()
        ):
            break
        torch.div(groups, step, out=coordinate)
        if grid.balanced:
            torch.sub(coordinate, grid.shift, out=rounded).round_().clamp_(
                grid.qmin, grid.qmax
            ).add_(grid.shift)
        elif grid.symmetric:
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
    """Returns the first scale and zero point of ``weight``.

    (out, in) float -> (out, groups) float32 and (out, groups) uint8. The scale is already rounded
    to ``scale_dtype``. Zero points of a symmetric grid are all zero. The work is done on blocks of
    rows, so that temporaries stay small. Raises KeyError for an unknown estimator.
    """
    search = RANGES[estimator]
    rows, width = weight.shape
    blocks = (weight.detach()[block].float() for block in row_blocks(rows, width, weight.device))
    parts = [search(grid.split(block), grid, scale_dtype, p) for block in blocks]
    scales, zero_points = (torch.cat(part) for part in zip(*parts, strict=True))
    if grid.k_quant:
        scales = on_blocks(scales, None if grid.symmetric else zero_points, grid)
    return scales, zero_points
