"""Gradients of a fake-quantised linear layer, a chunk of columns at a time.

    G = gy.T @ x,  dZ = s * G * inside
    dB = gamma * dZ @ A.T,  dA = gamma * B.T @ dZ,  ds = sum_group G * (Q - zero_point)

`inside` is 1 where round(Z) lies in the grid, else 0; under `pass_through` it is 1 everywhere.
There are two ways to the gradients of the factors:

by weight   forms G; works for every grid
by rank     for one scale per row: dB = gamma * s * gy.T @ (x @ A.T) and
            dA = gamma * (gy @ (s * B)).T @ x, less G at the clipped entries

With one scale per row, ds = sum_n gy * y0 / s, where y0 is the output without bias, needs no G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import low_rank
from .blocks import block_elements, column_chunks, row_blocks
from .clipped import MAX_COUNT, MAX_SHARE, add_sparse_product, find_clipped, sampled_product
from .low_rank import LowRankWeight


class Needed(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    A: bool
    B: bool
    scale: bool

    @property
    def factors(self) -> bool:
        return self.A or self.B


class Gradients(NamedTuple):
    """All gradients but that of the bias; None where none is needed."""

    x: Tensor | None  # (tokens, in), in the dtype of x
    A: Tensor | None  # (r, in), float32 or wider, as are the next two
    B: Tensor | None  # (out, r)
    scale: Tensor | None  # (out, groups)


def gradients(
    w: LowRankWeight,
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    needed: Needed,
) -> Gradients:
    """Returns the gradients that are needed.

    ``grad_y`` (tokens, out) is the gradient of the output, ``x`` (tokens, in) the input. ``y``
    (tokens, out) is the output if the gradient of the scales can be computed from it, and ``bias``
    (out,) what was added to it.
    """
    totals = (
        torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) if asked else None
        for p, asked in zip((w.A, w.B, w.scale), needed[1:], strict=True)
    )
    sums = Gradients(torch.empty_like(x) if needed.x else None, *totals)
    out, width = w.shape
    groups = w.scale.shape[1]
    scale_by_weight = needed.scale and y is None
    # A graph of torch.compile cannot branch on the number of clipped weights.
    rank_allowed = groups == 1 and not scale_by_weight and not torch.compiler.is_compiling()
    chunks_by_rank, clipped, room = [], [], MAX_COUNT
    for columns in column_chunks(
        out, width, x.dtype, width // groups if groups > 1 else 1, x.device
    ):
        weight, places = None, None
        if rank_allowed and needed.factors:
            most = min(int(MAX_SHARE * out * (columns.stop - columns.start)), room)
            weight, places = weight_and_clipped(w, columns, x.dtype, most)
        if places is not None:
            chunks_by_rank.append(columns)
            clipped += places
            room -= sum(map(len, places))
        else:
            with_weight = needed.x and weight is None
            made = by_weight(
                sums,
                w,
                grad_y,
                x,
                columns,
                with_scale=scale_by_weight,
                with_weight=with_weight,
            )
            weight = made if with_weight else weight
        if sums.x is not None:
            assert weight is not None  # made by one of the two ways
            sums.x[:, columns] = grad_y @ weight
    if chunks_by_rank:
        by_rank(sums, w, grad_y, x, chunks_by_rank, clipped)
    if sums.scale is not None and y is not None:
        sums.scale.add_(scale_gradient(w, grad_y, x, y, bias))
    return sums


def by_weight(
    sums: Gradients,
    w: LowRankWeight,
    grad_y: Tensor,
    x: Tensor,
    columns: slice,
    *,
    with_scale: bool,
    with_weight: bool,
) -> Tensor | None:
    """Adds what ``columns`` contribute to the factors and, ``with_scale``, to the scales, from G.

    Returns these columns of W_hat, (out, columns) in the dtype of x, if asked ``with_weight``.
    """
    out, width = w.shape[0], columns.stop - columns.start
    weight = x.new_empty(out, width) if with_weight else None
    needed = with_scale or sums.A is not None or sums.B is not None
    chunk_gradient = grad_y.T @ x[:, columns] if needed else None
    add_from_weight(sums, w, chunk_gradient, columns, with_scale=with_scale, weight=weight)
    return weight


def add_from_weight(
    sums: Gradients,
    w: LowRankWeight,
    chunk_gradient: Tensor | None,
    columns: slice,
    *,
    with_scale: bool,
    weight: Tensor | None = None,
) -> None:
    """Adds what the gradient of these columns of W_hat, (out, columns), contributes to ``sums``.

    Writes the columns into ``weight``, if it is given.
    """
    grid, groups = w.format.grid, low_rank.groups_of(w, columns)
    out, width = w.shape[0], columns.stop - columns.start
    of_scale = sums.scale if with_scale else None
    with_factors = sums.A is not None or sums.B is not None
    for rows in row_blocks(out, width, w.phi.device):
        rounded, codes, step = low_rank.tile(w, rows, columns)
        if chunk_gradient is not None:
            gradient = chunk_gradient[rows].to(codes.dtype)
        if of_scale is not None:
            products = (codes * gradient).unflatten(1, (groups.stop - groups.start, -1))
            of_scale[rows, groups] += products.sum(-1)
        if weight is not None:
            low_rank.deploy(codes, step, w.dtype, weight[rows])
        if not with_factors:
            continue
        if not w.pass_through:
            # Integers outside the grid differ from their clipped ones by at least 1.
            outside = rounded.sub_(rounded.clamp(grid.qmin, grid.qmax)).abs_().clamp_(max=1)
            gradient.addcmul_(gradient, outside, value=-1)
        gradient.mul_(step)
        if sums.B is not None:
            sums.B[rows].addmm_(gradient, w.A[:, columns].to(gradient.dtype).T, alpha=w.gamma)
        if sums.A is not None:
            sums.A[:, columns].addmm_(w.B[rows].to(gradient.dtype).T, gradient, alpha=w.gamma)


def by_rank(
    sums: Gradients,
    w: LowRankWeight,
    grad_y: Tensor,
    x: Tensor,
    chunks: list[slice],
    clipped: list[Tensor],
) -> None:
    """Adds what the columns in ``chunks`` contribute to the factors, without G.

    ``clipped`` holds the places ``row * in + column`` of the clipped weights there, in parts.
    Needs one scale per row.
    """
    step = w.step()
    if sums.B is not None:
        tokens_r = sum(x[:, c] @ w.A[:, c].to(x.dtype).T for c in chunks)
        sums.B.add_((grad_y.T @ tokens_r).to(sums.B.dtype).mul_(step), alpha=w.gamma)
    if sums.A is not None:
        tokens_r = grad_y @ (step * w.B).to(grad_y.dtype)
        for columns in chunks:
            product = (tokens_r.T @ x[:, columns]).to(sums.A.dtype)
            sums.A[:, columns].add_(product, alpha=w.gamma)
    if any(map(len, clipped)):
        places = torch.cat(clipped).sort().values
        row, column = places // w.shape[1], places % w.shape[1]
        excess = sampled_product(grad_y, x, row, column).mul_(step[row, 0]).mul_(-w.gamma)
        if sums.B is not None:
            add_sparse_product(sums.B, excess, row, column, w.A.T)
        if sums.A is not None:
            add_sparse_product(sums.A.T, excess, column, row, w.B)


def weight_and_clipped(
    w: LowRankWeight, columns: slice, dtype: torch.dtype, most: int
) -> tuple[Tensor, list[Tensor] | None]:
    """Returns ``columns`` of W_hat in ``dtype`` and the places of their clipped weights.

    The places ``row * in + column`` come in parts, only of weights that pass on no gradient; None
    if there are more than ``most`` of them.
    """
    grid, (out, width) = w.format.grid, w.shape
    shape = out, columns.stop - columns.start
    weight = torch.empty(shape, dtype=dtype, device=w.phi.device)
    places: list[Tensor] | None = []
    for rows in row_blocks(*shape, weight.device):
        rounded, codes, step = low_rank.tile(w, rows, columns)
        low_rank.deploy(codes, step, w.dtype, weight[rows])
        if w.pass_through or places is None:
            continue
        row, column = find_clipped(rounded, grid.qmin, grid.qmax)
        places.append((row + rows.start) * width + column + columns.start)
        most -= len(row)
        if most < 0:
            places = None
    return weight, places


def smallest_step(w: LowRankWeight) -> float:
    """Steps below this one, such as those of zeros, leave too little of their row in the output."""
    return max(torch.finfo(w.dtype).tiny, 2**20 * torch.finfo(torch.float32).tiny)


def least_share_of_bias(y: Tensor) -> float:
    """Outputs below this share of their bias are drowned by it."""
    return 2**10 * torch.finfo(y.dtype).eps


def scale_gradient(
    w: LowRankWeight, grad_y: Tensor, x: Tensor, y: Tensor, bias: Tensor | None
) -> Tensor:
    """Returns ``sum_n gy * y0 / s`` for one scale per row, (out, 1).

    Rows whose output keeps too little of it get the gradient from their rows of G instead.
    """
    step = w.step()
    dtype = torch.promote_types(y.dtype, step.dtype)
    total = torch.zeros(y.shape[1], dtype=dtype, device=y.device)
    largest = torch.zeros_like(total)
    for tokens in row_blocks(y.shape[0], y.shape[1], y.device):
        y0 = y[tokens].to(total.dtype)
        if bias is not None:
            y0 = y0 - bias
            largest = torch.maximum(largest, y0.abs().amax(0))
        total += (y0 * grad_y[tokens]).sum(0)
    gradient = total.unsqueeze(1) / step
    lost = step.squeeze(1) < smallest_step(w)
    if bias is not None:
        lost |= largest < least_share_of_bias(y) * bias.abs()
    for rows in lost.nonzero().squeeze(1).split(max(1, block_elements(x.device) // w.shape[1])):
        _, codes, _ = low_rank.tile(w, rows)
        grad_weight = grad_y[:, rows].T @ x
        products = codes.mul_(grad_weight.to(codes.dtype))
        gradient[rows] = products.sum(1, keepdim=True).to(gradient.dtype)
    return gradient
