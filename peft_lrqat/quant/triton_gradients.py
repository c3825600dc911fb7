"""Triton kernels of the backward pass that work on the factors, the scales and the clipped weights.

Sums are in float32 and in a fixed order, so that the same inputs always give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_weight import centered, clipped_to_grid, effective_step, rounded_tile


@triton.jit
def cast_factors_kernel(
    cast_A_ptr,  # written
    cast_B_ptr,  # written
    A_ptr,
    B_ptr,
    scale_ptr,  # (out, 1), or None: B is not multiplied with the steps
    elements_of_A,
    elements_of_B,
    factor,
    RANK: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """factor * A and factor * B (or factor * s * B) in the dtype of the results."""
    blocks_of_A = tl.cdiv(elements_of_A, BLOCK)
    block = tl.program_id(0)
    if block < blocks_of_A:
        at = block * BLOCK + tl.arange(0, BLOCK)
        mask = at < elements_of_A
        value = tl.load(A_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(cast_A_ptr + at, value.to(cast_A_ptr.dtype.element_ty), mask=mask)
    else:
        at = (block - blocks_of_A) * BLOCK + tl.arange(0, BLOCK)
        mask = at < elements_of_B
        value = tl.load(B_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
        if scale_ptr is not None:
            value *= effective_step(scale_ptr, at // RANK, mask, SCALE)
        tl.store(cast_B_ptr + at, value.to(cast_B_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_sums_kernel(
    sums_ptr,  # written: (parts, out) float32, sums of gy * y0 over some tokens
    largest_ptr,  # written: (parts, out) float32, the largest |y0|; None without a bias
    grad_y_ptr,  # (tokens, out)
    y_ptr,  # (tokens, out)
    bias_ptr,  # (out,), or None
    tokens,
    tokens_per_part,
    out,
    stride_of_grad_y,
    stride_of_y,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the gradient of one scale per row needs from the output, with y0 = y - bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < out
    part = tl.program_id(1)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    largest = tl.zeros((TOKENS, ROWS), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    for start in range(part * tokens_per_part, (part + 1) * tokens_per_part, TOKENS):
        token = start + tl.arange(0, TOKENS)
        mask = (token < tokens)[:, None] & row_mask[None, :]
        token = token.to(tl.int64)[:, None]
        y0 = tl.load(y_ptr + token * stride_of_y + row[None, :], mask=mask, other=0.0)
        y0 = y0.to(tl.float32)
        if bias_ptr is not None:
            y0 = tl.where(mask, y0 - bias, 0.0)
            largest = tl.maximum(largest, tl.abs(y0))
        grad_y = tl.load(grad_y_ptr + token * stride_of_grad_y + row[None, :], mask=mask, other=0.0)
        sums += y0 * grad_y.to(tl.float32)
    tl.store(sums_ptr + part * out + row, tl.sum(sums, axis=0), mask=row_mask)
    if bias_ptr is not None:
        tl.store(largest_ptr + part * out + row, tl.max(largest, axis=0), mask=row_mask)


@triton.jit
def finish_rows_kernel(
    grad_scale_ptr,  # written: (out, 1) float32
    sums_ptr,  # (parts, out) float32, or None: there is no gradient of the scales
    largest_ptr,  # (parts, out) float32, or None
    bias_ptr,  # (out,), or None
    grad_y_ptr,  # (tokens, out)
    x_ptr,  # (tokens, in)
    grad_A_ptr,  # (RANK, in) float32, or None: multiplied with gamma in place
    grad_B_ptr,  # (out, RANK) float32, or None: multiplied with gamma * s in place
    phi_ptr,
    zero_point_ptr,
    A_ptr,
    B_ptr,
    scale_ptr,
    out,
    elements_of_A,
    parts,
    tokens,
    width,
    row_elements,
    stride_of_grad_y,
    stride_of_x,
    gamma,
    smallest_step,
    bias_share,
    RANK: tl.constexpr,
    DOWNCAST: tl.constexpr,
    BITS: tl.constexpr,
    QMIN: tl.constexpr,
    BALANCED: tl.constexpr,
    RANKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of B, A and one scale per row from their products and sums."""
    blocks_of_rows = tl.cdiv(out, ROWS)
    if tl.program_id(0) >= blocks_of_rows:
        if grad_A_ptr is not None:
            at = (tl.program_id(0) - blocks_of_rows) * BLOCK + tl.arange(0, BLOCK)
            mask = at < elements_of_A
            tl.store(grad_A_ptr + at, tl.load(grad_A_ptr + at, mask=mask) * gamma, mask=mask)
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < out
    step = effective_step(scale_ptr, row, row_mask, SCALE)
    if grad_B_ptr is not None:
        for first in range(0, RANK, RANKS):
            k = first + tl.arange(0, RANKS)
            at = row[:, None] * RANK + k[None, :]
            mask = row_mask[:, None] & (k < RANK)[None, :]
            value = tl.load(grad_B_ptr + at, mask=mask, other=0.0) * (step * gamma)[:, None]
            tl.store(grad_B_ptr + at, value, mask=mask)
    if sums_ptr is None:
        return
    total = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        total += tl.load(sums_ptr + part * out + row, mask=row_mask, other=0.0)
    lost = row_mask & (step < smallest_step)
    if bias_ptr is not None:
        largest = tl.zeros((ROWS,), tl.float32)
        for part in range(parts):
            found = tl.load(largest_ptr + part * out + row, mask=row_mask, other=0.0)
            largest = tl.maximum(largest, found)
        bias = tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)
        lost = lost | (largest < bias_share * tl.abs(bias))
    tl.store(grad_scale_ptr + row, total / step, mask=row_mask & (lost == 0))
    if tl.max(lost.to(tl.int32)) == 0:
        return
    # Too little of these rows is left in the output: so their rows of G are made.
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_mask = column < width
        gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, tokens, TOKENS):
            token = first + tl.arange(0, TOKENS)
            token_mask = token < tokens
            token = token.to(tl.int64)
            at = token[None, :] * stride_of_grad_y + row[:, None]
            mask = lost[:, None] & token_mask[None, :]
            grad_y = tl.load(grad_y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            at = token[:, None] * stride_of_x + column[None, :]
            mask = token_mask[:, None] & column_mask[None, :]
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.dot(grad_y, x, gradient, input_precision="ieee")
        rounded = rounded_tile(
            phi_ptr,
            A_ptr,
            B_ptr,
            row,
            row_mask,
            start,
            width,
            width,
            row_elements,
            gamma,
            RANK,
            DOWNCAST,
            BITS,
            QMIN,
            RANKS,
            ALIGNED,
            COLUMNS,
        )
        codes = clipped_to_grid(rounded, BITS, QMIN)
        # Columns that do not exist have a gradient of 0.
        total += tl.sum(gradient * centered(codes, zero_point_ptr, row, row_mask, BALANCED), 1)
    tl.store(grad_scale_ptr + row, total, mask=lost)


@triton.jit
def sampled_product_kernel(
    values_ptr,  # written: (n,) float32
    places_by_column_ptr,  # written: (n,) int64, column * out + row
    places_ptr,  # (n,) int64, row * in + column
    grad_y_ptr,  # (out, tokens): the transpose of gy
    x_ptr,  # (in, tokens): the transpose of x
    scale_ptr,  # (out, 1)
    tokens,
    out,
    width,
    factor,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """factor * s * (gy.T @ x) at one place."""
    entry = tl.program_id(0)
    place = tl.load(places_ptr + entry)
    row, column = place // width, place % width
    sums = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        mask = token < tokens
        grad_y = tl.load(grad_y_ptr + row * tokens + token, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + column * tokens + token, mask=mask, other=0.0).to(tl.float32)
        sums += grad_y * x
    step = effective_step(scale_ptr, row, True, SCALE)
    tl.store(values_ptr + entry, tl.sum(sums) * step * factor)
    tl.store(places_by_column_ptr + entry, column * out + row)


@triton.jit
def add_sparse_product_kernel(
    total_ptr,  # (keys, RANK) by its strides, float32: added to
    places_ptr,  # (n,) int64, sorted: key * others + other
    order_ptr,  # (n,) int64, where the value of each place is, or None: in the same order
    values_ptr,  # (n,) float32
    factor_ptr,  # (others, RANK) by its strides
    n,
    others,
    total_stride,
    total_stride_of_rank,
    factor_stride,
    factor_stride_of_rank,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """total += S @ factor, where S holds the values at (key, other). One program per entry.

    The first entry of a key adds up all entries of this key; the programs of the others end.
    """
    first = tl.program_id(0)
    key = tl.load(places_ptr + first) // others
    if first > 0:
        if tl.load(places_ptr + first - 1) // others == key:
            return
    k = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    k_mask = k < RANK
    at = total_ptr + key * total_stride + k * total_stride_of_rank
    total = tl.load(at, mask=k_mask, other=0.0)
    start = first
    more = True
    while more:
        entry = start + tl.arange(0, ENTRIES)
        place = tl.load(places_ptr + entry, mask=entry < n, other=-1)
        ours = (place >= 0) & (place // others == key)
        other = tl.where(ours, place % others, 0)
        if order_ptr is None:
            where = entry.to(tl.int64)
        else:
            where = tl.load(order_ptr + entry, mask=ours, other=0)
        value = tl.load(values_ptr + where, mask=ours, other=0.0)
        factor = tl.load(
            factor_ptr + other[:, None] * factor_stride + k[None, :] * factor_stride_of_rank,
            mask=ours[:, None] & k_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(value[:, None] * factor, axis=0)
        start += ENTRIES
        more = tl.sum(ours.to(tl.int32)) == ENTRIES
    tl.store(at, total, mask=k_mask)
