"""The fake-quantised linear layer (LR-QAT, equation 6), at about the price of a frozen one.

    y  = x @ W_hat.T + bias,  W_hat = s * (Q - zero_point)
    Q  = clip(round(Z), qmin, qmax),  Z = phi + gamma * B @ A

`round` passes its gradient straight through. `phi` does not depend on `s`, so the scale has no
further term (unlike LSQ). W_hat is made, multiplied and dropped a chunk at a time: by rows in the
forward pass, by columns in the backward pass, so that no result is a sum over chunks. The formulas
of the gradients are in `gradients`.

With one scale per row, the backward pass takes the gradient of the scales from the output y, which
the forward pass keeps. It needs G = gy.T @ x instead where rows are divided into groups, where y
was overwritten since or has a bias rounded into it in half precision, and inside a graph of
`torch.compile`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear

from . import low_rank
from .activations import quantized_tokens
from .blocks import row_chunks
from .gradients import Sums, add_gradients
from .grid import Grid
from .low_rank import LowRankWeight


def _multiply(x: Tensor, w: LowRankWeight, bias: Tensor | None) -> Tensor:
    """``x @ W_hat.T + bias``, a chunk of rows of W_hat at a time."""
    out, width = w.shape
    chunks = list(row_chunks(out, width, x.dtype))
    if len(chunks) == 1:
        return linear(x, low_rank.dense(w, x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], out)
    for rows in chunks:
        y[..., rows] = linear(
            x, low_rank.dense(w, x.dtype, rows), None if bias is None else bias[rows]
        )
    return y


def _write_counter(y: Tensor) -> Tensor:
    """An empty tensor that shares the version counter of ``y``, but does not keep its memory."""
    counter = y.detach()
    counter.data = y.new_empty(0)
    return counter


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
        activations: Grid | None,
    ) -> Tensor:
        w = LowRankWeight(phi=phi, zero_point=zero_point, A=A, B=B, scale=scale, **constants)
        y = _multiply(x if activations is None else quantized_tokens(x, activations), w, bias)
        if not torch.compiler.is_compiling() and y._is_view():
            # As `linear` gives where there are batches and a bias; a caller may write into y.
            y = y.data
        # In half precision, a large bias would leave little of y0 in y.
        rounded_into = bias is not None and x.dtype.itemsize < 4
        kept = None
        if (
            ctx.needs_input_grad[5]
            and scale.shape[1] == 1
            and not rounded_into
            and not torch.compiler.is_compiling()
        ):
            # Kept so that a caller may write into y as he may after a plain linear layer: without autograd's check.
            writes, kept = _write_counter(y), y.data
            ctx.writes = writes, writes._version
        ctx.save_for_backward(x, phi, zero_point, A, B, scale, kept, None if kept is None else bias)
        ctx.constants, ctx.activations = constants, activations
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, phi, zero_point, A, B, scale, y, bias = ctx.saved_tensors
        if ctx.activations is not None:
            # Made again, not kept: the layers that share an input then still share one saved tensor.
            x = quantized_tokens(x, ctx.activations)
        w = LowRankWeight(phi=phi, zero_point=zero_point, A=A, B=B, scale=scale, **ctx.constants)
        if y is not None:
            writes, before = ctx.writes
            y = y if writes._version == before else None
        need_x, _, _, *need_parameters, need_bias = ctx.needs_input_grad[:7]
        tokens_y, tokens_x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        totals = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            if needed
            else None
            for p, needed in zip((A, B, scale), need_parameters, strict=True)
        ]
        sums = Sums(torch.empty_like(tokens_x) if need_x else None, *totals)
        with torch.autocast(x.device.type, enabled=False):
            add_gradients(
                sums, w, tokens_y, tokens_x, None if y is None else y.reshape(tokens_y.shape), bias
            )
        grad_A, grad_B, grad_scale = (
            None if total is None else total.to(p.dtype)
            for total, p in zip(totals, (A, B, scale), strict=True)
        )
        grad_x = None if sums.x is None else sums.x.view(x.shape)
        grad_bias = tokens_y.sum(0) if need_bias else None
        return grad_x, None, None, grad_A, grad_B, grad_scale, grad_bias, None, None


def fake_quant_linear(
    x: Tensor, weight: LowRankWeight, bias: Tensor | None = None, activations: Grid | None = None
) -> Tensor:
    """``x @ W_hat.T + bias`` in the dtype of ``x`` (..., in) -> (..., out); differentiable in x, A, B, scale and bias (out,).

    With ``activations``, each token of ``x`` is rounded to that grid first, straight-through (`quantized_tokens`).
    """
    w = weight
    constants = {
        "format": w.format,
        "gamma": w.gamma,
        "dtype": w.dtype,
        "pass_through": w.pass_through,
    }
    with torch.autocast(x.device.type, enabled=False):
        return _FakeQuantLinear.apply(
            x, w.phi, w.zero_point, w.A, w.B, w.scale, bias, constants, activations
        )
