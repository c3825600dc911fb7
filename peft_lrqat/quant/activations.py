"""Quantises activations dynamically (LR-QAT, section 4.3): each token has its own range.

    step  = (max - min) / (qmax - qmin)
    z     = round(-min / step)
    x_hat = step * (clip(round(x / step) + z, qmin, qmax) - z)

``min`` and ``max`` are taken over the token and zero, so that zero is exact. On a symmetric grid,
``step = max|x| / qmax`` and there is no ``z``. Every value lies within half a step of a grid point:
nothing is clipped, and the straight-through gradient is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .grid import Grid


def quantized_tokens(x: Tensor, grid: Grid) -> Tensor:
    """Returns ``x_hat``, in the shape and dtype of ``x``, without gradients.

    ``x`` is (..., in); each slice along the last dimension is a token. Computed in float32 or
    wider. A token of zeros stays zero. A NaN or an infinity turns its whole token into NaN.
    """
    if x.numel() == 0:
        return x.detach().clone()
    values = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    codes, step, zero_point = _encode(values, grid)
    if zero_point is not None:
        codes = codes.sub_(zero_point)
    return codes.mul_(step).to(x.dtype)


def encode_tokens(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the integers, and the step and zero point of each token.

    Integers are uint8 (int8 on a symmetric grid), in the shape of ``x``. Steps are float32 and zero
    points uint8, both (..., 1); a symmetric grid has None instead of zero points. ``x`` must be
    finite, in float32 or a shorter dtype.
    """
    codes, step, zero_point = _encode(x.detach().float(), grid)
    if zero_point is None:
        return codes.to(torch.int8), step, None
    return codes.to(torch.uint8), step, zero_point.to(torch.uint8)


def decode_tokens(
    codes: Tensor, step: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Returns ``x_hat`` from what `encode_tokens` returned.

    It equals the result of `quantized_tokens` bit for bit.
    """
    values = codes.to(step.dtype)
    if zero_point is not None:
        values.sub_(zero_point.to(step.dtype))
    return values.mul_(step).to(dtype)


def _encode(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns integers, steps and zero points, all in the dtype of ``values``."""
    smallest = torch.finfo(values.dtype).tiny  # a token of zeros still needs a step to divide by
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    if grid.symmetric:
        step = (torch.maximum(high, -low) / grid.qmax).clamp_(min=smallest)
        return (values / step).round_().clamp_(grid.qmin, grid.qmax), step, None
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    step = ((high - low) / (grid.qmax - grid.qmin)).clamp_(min=smallest)
    zero_point = (-low / step).round_()
    return (values / step).round_().add_(zero_point).clamp_(grid.qmin, grid.qmax), step, zero_point


class _FakeQuantizeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, grid: Grid) -> Tensor:
        return quantized_tokens(x, grid)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize_tokens(x: Tensor, grid: Grid) -> Tensor:
    """Applies `quantized_tokens`, with the identity as its gradient.

    Nothing is kept for the backward pass.
    """
    return _FakeQuantizeTokens.apply(x, grid)
