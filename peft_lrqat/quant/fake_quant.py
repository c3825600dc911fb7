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
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import gpu_gradients, low_rank
from .activations import quantized_tokens
from .blocks import row_chunks
from .gradients import Gradients, Needed, add_from_weight, gradients
from .grid import Grid
from .low_rank import LowRankWeight


def _multiply(
    x: Tensor, w: LowRankWeight, bias: Tensor | None, clipped: Tensor | None = None
) -> Tensor:
    """``x @ W_hat.T + bias``, a chunk of rows of W_hat at a time.

    On a GPU, the number of clipped weights is added to ``clipped`` (1,) int32.
    """
    out, width = w.shape
    chunks = list(row_chunks(out, width, x.dtype, x.device))
    if len(chunks) == 1:
        return linear(x, low_rank.dense(w, x.dtype, count=clipped), bias)
    y = x.new_empty(*x.shape[:-1], out)
    for rows in chunks:
        weight = low_rank.dense(w, x.dtype, rows, count=clipped)
        y[..., rows] = linear(x, weight, None if bias is None else bias[rows])
    return y


def _write_counter(y: Tensor) -> Tensor:
    """An empty tensor that shares the version counter of ``y``, but does not keep its memory."""
    counter = y.detach()
    counter.data = y.new_empty(0)
    return counter


def gives_scale_gradient(groups: int, has_bias: bool, dtype: torch.dtype) -> bool:
    """Whether a layer keeps its output, in ``dtype``: the gradient of its scales comes from it."""
    # In half precision, a large bias would leave little of y0 in y.
    return groups == 1 and not (has_bias and dtype.itemsize < 4)


class _FakeQuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
        needed = _needed(ctx)
        keep = (
            needed.scale
            and gives_scale_gradient(scale.shape[1], bias is not None, x.dtype)
            and not torch.compiler.is_compiling()
            and not torch.is_inference_mode_enabled()  # whose tensors count no writes
        )
        clipped = None
        if low_rank.served(w, x.dtype):
            clipped = gpu_gradients.count_clipped(w, needed, keep)
        tokens = x if activations is None else quantized_tokens(x, activations)
        y = _multiply(tokens, w, bias, None if clipped is None else clipped.on_device)
        if not torch.compiler.is_compiling() and y._is_view():
            # As `linear` returns it where there are batches and a bias; a caller may write into y.
            y = y.data
        if clipped is not None:
            clipped.send()
        kept = None
        if keep:
            # Without autograd's check: a caller may write into y, as after a plain linear layer.
            writes, kept = _write_counter(y), y.data
            ctx.writes = writes, writes._version
        ctx.clipped = clipped
        ctx.save_for_backward(x, phi, zero_point, A, B, scale, kept, None if kept is None else bias)
        ctx.constants, ctx.activations = constants, activations
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, phi, zero_point, A, B, scale, y, bias = ctx.saved_tensors
        if ctx.activations is not None:
            # Made again: the layers that share an input still share one saved tensor.
            x = quantized_tokens(x, ctx.activations)
        w = LowRankWeight(phi=phi, zero_point=zero_point, A=A, B=B, scale=scale, **ctx.constants)
        if y is not None:
            writes, before = ctx.writes
            y = y if writes._version == before else None
        tokens_y, tokens_x = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        y = None if y is None else y.reshape(tokens_y.shape)
        given = w, tokens_y, tokens_x, y, bias, _needed(ctx)
        with torch.autocast(x.device.type, enabled=False):
            if low_rank.served(w, x.dtype):
                found = gpu_gradients.gradients(*given, ctx.clipped)
            else:
                found = gradients(*given)
        grad_A, grad_B, grad_scale = (
            None if total is None else total.to(p.dtype)
            for total, p in zip(found[1:], (A, B, scale), strict=True)
        )
        grad_x = None if found.x is None else found.x.view(x.shape)
        grad_bias = tokens_y.sum(0) if ctx.needs_input_grad[6] else None
        return grad_x, None, None, grad_A, grad_B, grad_scale, grad_bias, None, None


def _needed(ctx: Any) -> Needed:
    x, _, _, A, B, scale, *_ = ctx.needs_input_grad
    return Needed(x, A, B, scale)


def fake_quant_linear(
    x: Tensor, weight: LowRankWeight, bias: Tensor | None = None, activations: Grid | None = None
) -> Tensor:
    """``x @ W_hat.T + bias`` in the dtype of ``x``, (..., in) -> (..., out).

    Differentiable in x, A, B, scale and bias (out,). With ``activations``, each token of ``x`` is
    rounded to that grid first, straight-through (`quantized_tokens`).
    """
    w = weight
    with torch.autocast(x.device.type, enabled=False):
        return _FakeQuantLinear.apply(
            x, w.phi, w.zero_point, w.A, w.B, w.scale, bias, _constants(w), activations
        )


def _constants(w: LowRankWeight) -> dict[str, Any]:
    """What is no tensor in a weight."""
    return {
        "format": w.format,
        "gamma": w.gamma,
        "dtype": w.dtype,
        "pass_through": w.pass_through,
    }


class _FakeQuantWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        phi: Tensor,
        zero_point: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: Tensor,
        constants: dict[str, Any],
    ) -> Tensor:
        w = LowRankWeight(phi=phi, zero_point=zero_point, A=A, B=B, scale=scale, **constants)
        ctx.save_for_backward(phi, zero_point, A, B, scale)
        ctx.constants = constants
        return low_rank.dense(w, w.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, ...]:
        phi, zero_point, A, B, scale = ctx.saved_tensors
        w = LowRankWeight(phi=phi, zero_point=zero_point, A=A, B=B, scale=scale, **ctx.constants)
        needed = ctx.needs_input_grad[2:5]
        totals = (
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if n else None
            for p, n in zip((A, B, scale), needed, strict=True)
        )
        sums = Gradients(None, *totals)
        # The sums spoil it, and autograd may use it elsewhere.
        gradient = grad_weight.to(torch.promote_types(grad_weight.dtype, torch.float32), copy=True)
        with torch.autocast(phi.device.type, enabled=False):
            columns = slice(0, w.format.in_features)
            add_from_weight(sums, w, gradient, columns, with_scale=sums.scale is not None)
        grads = (
            None if total is None else total.to(p.dtype)
            for total, p in zip(sums[1:], (A, B, scale), strict=True)
        )
        return None, None, *grads, None


def fake_quant_weight(weight: LowRankWeight) -> Tensor:
    """W_hat (out, in) in the deployed dtype, differentiable in A, B and scale; for few rows."""
    w = weight
    with torch.autocast(w.phi.device.type, enabled=False):
        return _FakeQuantWeight.apply(w.phi, w.zero_point, w.A, w.B, w.scale, _constants(w))
