"""The fake-quantised linear with low-rank factors inside the rounding (LR-QAT, equation 6), forward and backward.

    Z     = phi + gamma * B @ A            in units of the grid
    Q     = clip(round(Z), qmin, qmax)
    W_hat = s * (Q - zero_point)
    y     = x @ W_hat.T + bias

    dZ = s * G * inside,  G = dL/dW_hat;  dB = gamma * dZ @ A.T;  dA = gamma * B.T @ dZ;  ds = sum_group G * (Q - zero_point)

``round`` is straight-through; ``inside`` marks where round(Z) lies in the grid. ``phi`` does not depend on ``s``, so the
scale has no further term (unlike LSQ). Nothing of size (out, in) is kept for the backward pass: Z and Q are computed
again, a block of rows at a time. Forward, merge and export all go through :func:`_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .blocks import row_blocks
from .grid import effective_scale
from .storage import WeightFormat


@dataclass(frozen=True, kw_only=True)
class LowRankWeight:
    """One quantised weight, W_hat: the frozen storage of a layer and the tensors that one adapter trains."""

    format: WeightFormat
    phi: Tensor  # (out, row_elements), stored
    zero_point: Tensor | None  # (out, groups) uint8; None on a symmetric grid
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: Tensor  # (out, groups), before its straight-through rounding to the format's scale dtype
    gamma: float  # lora_alpha / r
    dtype: torch.dtype  # of the deployed weight: W_hat is rounded to it once


@contextmanager
def _ieee_matmul(device: torch.device) -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products: the integers must be the same in training, merge and export.

    Inside a graph of ``torch.compile`` the setting of the process holds; it cannot be changed there.
    """
    if torch.compiler.is_compiling():
        yield
        return
    backend = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}.get(device.type)
    precision = backend.fp32_precision if backend is not None else "ieee"
    if precision in ("ieee", "none"):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        # "none" follows the setting of all backends.
        backend.fp32_precision = "none" if precision == torch.backends.fp32_precision else precision


def _rows(w: LowRankWeight, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: round(Z) before the clip, Q - zero_point, and the step, each (rows, in) or broadcastable to it."""
    grid, in_features = w.format.grid, w.format.in_features
    dtype = torch.promote_types(torch.float32, torch.promote_types(w.A.dtype, w.scale.dtype))
    phi = w.format.decode(w.phi[rows]).to(dtype)
    with _ieee_matmul(phi.device), torch.autocast(phi.device.type, enabled=False):
        rounded = torch.addmm(phi, w.B[rows].to(dtype), w.A.to(dtype), alpha=w.gamma).round_()
    zero_point = None if w.zero_point is None else w.zero_point[rows]
    codes = grid.centered(rounded.clamp(grid.qmin, grid.qmax), zero_point)
    step = grid.expand(effective_scale(w.scale[rows].to(dtype), w.format.scale_dtype), in_features)
    return rounded, codes, step


def _dense(w: LowRankWeight, dtype: torch.dtype) -> Tensor:
    """W_hat rounded to the deployed dtype, handed over in ``dtype``; (out, in)."""
    dense = torch.empty(w.phi.shape[0], w.format.in_features, dtype=dtype, device=w.phi.device)
    for rows in row_blocks(w.phi.shape[0], w.format.in_features):
        _, codes, step = _rows(w, rows)
        dense[rows] = codes.mul_(step).to(w.dtype)
    return dense


class _FakeQuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        phi: Tensor,
        zero_point: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        constants: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(x, phi, zero_point, A, B, scale)
        ctx.constants = constants
        w = LowRankWeight(phi=phi, zero_point=zero_point, A=A, B=B, scale=scale, **constants)
        return torch.nn.functional.linear(x, _dense(w, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, phi, zero_point, A, B, scale = ctx.saved_tensors
        w = LowRankWeight(phi=phi, zero_point=zero_point, A=A, B=B, scale=scale, **ctx.constants)
        need_x, _, _, need_A, need_B, need_scale, need_bias = ctx.needs_input_grad[:7]
        grid = w.format.grid
        grad_A = torch.zeros_like(A, dtype=torch.promote_types(A.dtype, torch.float32)) if need_A else None
        grad_B = torch.empty_like(B) if need_B else None
        grad_scale = torch.empty_like(scale) if need_scale else None
        dense = torch.empty(phi.shape[0], x.shape[-1], dtype=x.dtype, device=x.device) if need_x else None
        tokens_y, tokens_x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])

        with torch.autocast(x.device.type, enabled=False):
            for rows in row_blocks(w.phi.shape[0], w.format.in_features):
                rounded, codes, step = _rows(w, rows)
                if dense is not None:
                    dense[rows] = (codes * step).to(w.dtype)
                if not (need_A or need_B or need_scale):
                    continue
                grad_weight = (tokens_y[:, rows].T @ tokens_x).to(codes.dtype)
                if grad_scale is not None:
                    grad_scale[rows] = grid.split(codes.mul_(grad_weight)).sum(-1).to(scale.dtype)
                if need_A or need_B:
                    inside = (rounded >= grid.qmin).logical_and_(rounded <= grid.qmax)
                    grad_z = grad_weight.mul_(step).mul_(inside)
                    if grad_B is not None:
                        grad_B[rows] = (grad_z @ A.to(grad_z.dtype).T).mul_(w.gamma).to(B.dtype)
                    if grad_A is not None:
                        grad_A.addmm_(B[rows].to(grad_z.dtype).T, grad_z, alpha=w.gamma)
            grad_x = grad_y @ dense if dense is not None else None
        grad_bias = tokens_y.sum(0) if need_bias else None
        return (
            grad_x,
            None,
            None,
            grad_A.to(A.dtype) if grad_A is not None else None,
            grad_B,
            grad_scale,
            grad_bias,
            None,
        )


def fake_quant_linear(x: Tensor, weight: LowRankWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W_hat.T + bias`` in the dtype of ``x`` (..., in) -> (..., out); differentiable in x, A, B, scale and bias (out,)."""
    w = weight
    constants = {"format": w.format, "gamma": w.gamma, "dtype": w.dtype}
    with torch.autocast(x.device.type, enabled=False):
        return _FakeQuantLinear.apply(x, w.phi, w.zero_point, w.A, w.B, w.scale, bias, constants)


@torch.no_grad()
def quantized_weight(weight: LowRankWeight) -> Tensor:
    """W_hat (out, in) in the deployed dtype: bit for bit what :func:`fake_quant_linear` multiplies with."""
    return _dense(weight, weight.dtype)


@torch.no_grad()
def quantized_codes(weight: LowRankWeight) -> Tensor:
    """The integers Q that ship, (out, in): int8 for a symmetric grid, uint8 for an asymmetric one."""
    grid = weight.format.grid
    dtype = torch.int8 if grid.symmetric else torch.uint8
    codes = torch.empty(weight.phi.shape[0], weight.format.in_features, dtype=dtype, device=weight.phi.device)
    for rows in row_blocks(*codes.shape):
        codes[rows] = _rows(weight, rows)[0].clamp_(grid.qmin, grid.qmax).to(dtype)
    return codes


@torch.no_grad()
def inspect_rows(weight: LowRankWeight, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For the rows with the given indices: the integers Q as in :func:`quantized_codes`, and which of them were clipped."""
    grid = weight.format.grid
    rounded, _, _ = _rows(weight, rows)
    clipped = (rounded < grid.qmin).logical_or_(rounded > grid.qmax)
    return rounded.clamp_(grid.qmin, grid.qmax).to(torch.int8 if grid.symmetric else torch.uint8), clipped
