"""The fake-quantised linear (LR-QAT, equation 6) at about the price of a frozen one: forward and backward.

    y  = x @ W_hat.T + bias,  W_hat = s * (Q - zero_point),  Q = clip(round(Z), qmin, qmax),  Z = phi + gamma * B @ A

    dZ = s * G * inside,  G = gy.T @ x;  dB = gamma * dZ @ A.T;  dA = gamma * B.T @ dZ;  ds = sum_group G * (Q - zero_point)

``round`` is straight-through; ``inside`` marks where round(Z) lies in the grid, and is 1 everywhere under ``pass_through``.
``phi`` does not depend on ``s``, so the scale has no further term (unlike LSQ). W_hat is made, multiplied with and dropped a chunk
at a time: by rows in the forward pass, by columns in the backward pass, so that no result is a sum over chunks.

With one scale per row, G is not needed (exactly; y0 is the output without bias):

    dB = gamma * s * gy.T @ (x @ A.T),  dA = gamma * (gy @ (s * B)).T @ x,  less G at the clipped entries;  ds = sum_n gy * y0 / s

These take y, kept from the forward pass. G is formed, a chunk at a time, where rows are divided into groups; where many
weights are clipped; where y was overwritten since, or its bias is rounded into it in half precision; and inside a graph of
``torch.compile``, which cannot branch on how many are clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import linear

from . import low_rank
from .activations import quantized_tokens
from .blocks import MAX_BLOCK_ELEMENTS, column_chunks, row_blocks, row_chunks
from .clipped import MAX_COUNT, MAX_SHARE, add_sparse_product, find_clipped, sampled_product
from .grid import Grid, effective_scale
from .low_rank import LowRankWeight


def _multiply(x: Tensor, w: LowRankWeight, bias: Tensor | None) -> Tensor:
    """``x @ W_hat.T + bias``, a chunk of rows of W_hat at a time."""
    out, width = w.shape
    chunks = list(row_chunks(out, width, x.dtype))
    if len(chunks) == 1:
        return linear(x, low_rank.dense(w, x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], out)
    for rows in chunks:
        y[..., rows] = linear(x, low_rank.dense(w, x.dtype, rows), None if bias is None else bias[rows])
    return y


@dataclass(frozen=True)
class _Gradients:
    """To be added to, A, B and scale in float32 or wider; None for what needs no gradient."""

    x: Tensor | None  # (tokens, in)
    A: Tensor | None
    B: Tensor | None
    scale: Tensor | None


def _add_by_weight_gradient(
    to: _Gradients,
    w: LowRankWeight,
    tokens_y: Tensor,
    tokens_x: Tensor,
    columns: slice,
    *,
    with_scale: bool,
    weight: Tensor | None,
) -> None:
    """What some columns contribute, from G; and these columns of W_hat, for the gradient of x, into ``weight``."""
    grid, groups = w.format.grid, low_rank.groups_of(w, columns)
    with_factors = to.A is not None or to.B is not None
    grad_weight = tokens_y.T @ tokens_x[:, columns] if with_factors or with_scale else None
    for rows in row_blocks(w.shape[0], columns.stop - columns.start, tokens_x.device):
        rounded, codes, step = low_rank.tile(w, rows, columns)
        if grad_weight is not None:
            some = grad_weight[rows].to(codes.dtype)
        if with_scale:
            to.scale[rows, groups] += (codes * some).unflatten(1, (groups.stop - groups.start, -1)).sum(-1)
        if weight is not None:
            low_rank.deploy(codes, step, w.dtype, weight[rows])
        if with_factors and not w.pass_through:
            # Integers outside the grid differ from their clipped ones by 1 at least.
            outside = rounded.sub_(rounded.clamp(grid.qmin, grid.qmax)).abs_().clamp_(max=1)
            some.addcmul_(some, outside, value=-1)
        if with_factors:
            some.mul_(step)
        if to.B is not None:
            to.B[rows].addmm_(some, w.A[:, columns].to(some.dtype).T, alpha=w.gamma)
        if to.A is not None:
            to.A[:, columns].addmm_(w.B[rows].to(some.dtype).T, some, alpha=w.gamma)


def _add_by_factors(
    to: _Gradients, w: LowRankWeight, tokens_y: Tensor, tokens_x: Tensor, chunks: list[slice], clipped: list[Tensor]
) -> None:
    """What the columns in ``chunks`` contribute to the factors where one scale holds for a row: through the rank, less what
    is clipped, at the places ``row * in + column``, given in parts."""
    step = _step(w)
    if to.B is not None:
        tokens_r = sum(tokens_x[:, c] @ w.A[:, c].to(tokens_x.dtype).T for c in chunks)
        to.B.add_((tokens_y.T @ tokens_r).to(to.B.dtype).mul_(step), alpha=w.gamma)
    if to.A is not None:
        tokens_r = tokens_y @ (step * w.B).to(tokens_y.dtype)
        for columns in chunks:
            to.A[:, columns].add_((tokens_r.T @ tokens_x[:, columns]).to(to.A.dtype), alpha=w.gamma)
    if any(map(len, clipped)):
        places = torch.cat(clipped).sort().values
        row, column = places // w.shape[1], places % w.shape[1]
        excess = sampled_product(tokens_y, tokens_x, row, column).mul_(step[row, 0]).mul_(-w.gamma)
        if to.B is not None:
            add_sparse_product(to.B, excess, row, column, w.A.T)
        if to.A is not None:
            add_sparse_product(to.A.T, excess, column, row, w.B)


def _step(w: LowRankWeight) -> Tensor:
    """The step that was used, (out, groups), float32 or wider."""
    return effective_scale(w.scale.to(torch.promote_types(torch.float32, w.scale.dtype)), w.format.scale_dtype)


def _scale_gradient(w: LowRankWeight, tokens_y: Tensor, tokens_x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """``sum_n gy * y0 / s`` for one scale per row, (out, 1); of (tokens, out) twice, and of the input where a row needs G."""
    step = _step(w)
    total = torch.zeros(y.shape[1], dtype=torch.promote_types(y.dtype, step.dtype), device=y.device)
    largest = torch.zeros_like(total)
    for tokens in row_blocks(*y.shape, y.device):
        y0 = y[tokens].to(total.dtype)
        if bias is not None:
            y0 = y0 - bias
            largest = torch.maximum(largest, y0.abs().amax(0))
        total += (y0 * tokens_y[tokens]).sum(0)
    gradient = total.unsqueeze(1) / step
    # Rows of which too little is left in y: near zero, as of a row of zeros, or drowned by their bias.
    lost = step.squeeze(1) < max(torch.finfo(w.dtype).tiny, 2**20 * torch.finfo(torch.float32).tiny)
    if bias is not None:
        lost |= largest < 2**10 * torch.finfo(y.dtype).eps * bias.abs()
    for rows in lost.nonzero().squeeze(1).split(max(1, MAX_BLOCK_ELEMENTS // w.shape[1])):
        _, codes, _ = low_rank.tile(w, rows)
        grad_weight = tokens_y[:, rows].T @ tokens_x
        gradient[rows] = codes.mul_(grad_weight.to(codes.dtype)).sum(1, keepdim=True).to(gradient.dtype)
    return gradient


def _dense_columns(
    w: LowRankWeight, columns: slice, dtype: torch.dtype, max_places: int
) -> tuple[Tensor, list[Tensor] | None]:
    """Some columns of W_hat, and the places ``row * in + column`` of the clipped weights there that hand no gradient on, in
    parts; None instead where they are more than ``max_places``."""
    grid, (out, width) = w.format.grid, w.shape
    weight = torch.empty(out, columns.stop - columns.start, dtype=dtype, device=w.phi.device)
    places: list[Tensor] | None = []
    for rows in row_blocks(*weight.shape, weight.device):
        rounded, codes, step = low_rank.tile(w, rows, columns)
        low_rank.deploy(codes, step, w.dtype, weight[rows])
        if w.pass_through or places is None:
            continue
        row, column = find_clipped(rounded, grid.qmin, grid.qmax)
        places.append((row + rows.start) * width + column + columns.start)
        max_places -= len(row)
        if max_places < 0:
            places = None
    return weight, places


def _add_gradients(
    to: _Gradients, w: LowRankWeight, tokens_y: Tensor, tokens_x: Tensor, y: Tensor | None, bias: Tensor | None
) -> None:
    """The whole backward pass but for the gradient of the bias; ``y`` where the scales' can be taken from it."""
    out, width = w.shape
    groups = w.scale.shape[1]
    scale_by_weight = to.scale is not None and y is None
    factors = to.A is not None or to.B is not None
    by_factors = factors and groups == 1 and not scale_by_weight and not torch.compiler.is_compiling()
    chunks, places, room = [], [], MAX_COUNT
    for columns in column_chunks(out, width, tokens_x.dtype, unit=width // groups if groups > 1 else 1):
        weight = None
        if by_factors:
            most = min(int(MAX_SHARE * out * (columns.stop - columns.start)), room)
            weight, clipped = _dense_columns(w, columns, tokens_x.dtype, most)
            if clipped is not None:
                chunks.append(columns)
                places += clipped
                room -= sum(map(len, clipped))
            else:
                _add_by_weight_gradient(to, w, tokens_y, tokens_x, columns, with_scale=False, weight=None)
        else:
            if to.x is not None:
                weight = tokens_x.new_empty(out, columns.stop - columns.start)
            _add_by_weight_gradient(to, w, tokens_y, tokens_x, columns, with_scale=scale_by_weight, weight=weight)
        if to.x is not None:
            to.x[:, columns] = tokens_y @ weight
    if chunks:
        _add_by_factors(to, w, tokens_y, tokens_x, chunks, places)
    if to.scale is not None and y is not None:
        to.scale.add_(_scale_gradient(w, tokens_y, tokens_x, y, bias))


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
        # In half precision, a large bias would leave little of y0 in y.
        rounded_into = bias is not None and x.dtype.itemsize < 4
        kept = None
        if ctx.needs_input_grad[5] and scale.shape[1] == 1 and not rounded_into and not torch.compiler.is_compiling():
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
        sums = [
            torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if needed else None
            for p, needed in zip((A, B, scale), need_parameters, strict=True)
        ]
        grads = _Gradients(torch.empty_like(tokens_x) if need_x else None, *sums)
        with torch.autocast(x.device.type, enabled=False):
            _add_gradients(grads, w, tokens_y, tokens_x, None if y is None else y.reshape(tokens_y.shape), bias)
        grad_A, grad_B, grad_scale = (
            None if total is None else total.to(p.dtype) for total, p in zip(sums, (A, B, scale), strict=True)
        )
        grad_x = None if grads.x is None else grads.x.view(x.shape)
        grad_bias = tokens_y.sum(0) if need_bias else None
        return grad_x, None, None, grad_A, grad_B, grad_scale, grad_bias, None, None


def fake_quant_linear(
    x: Tensor, weight: LowRankWeight, bias: Tensor | None = None, activations: Grid | None = None
) -> Tensor:
    """``x @ W_hat.T + bias`` in the dtype of ``x`` (..., in) -> (..., out); differentiable in x, A, B, scale and bias (out,).

    With ``activations``, each token of ``x`` is rounded to that grid first, straight-through (`quantized_tokens`).
    """
    w = weight
    constants = {"format": w.format, "gamma": w.gamma, "dtype": w.dtype, "pass_through": w.pass_through}
    with torch.autocast(x.device.type, enabled=False):
        return _FakeQuantLinear.apply(x, w.phi, w.zero_point, w.A, w.B, w.scale, bias, constants, activations)
