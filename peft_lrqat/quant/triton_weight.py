"""Triton kernels that make W_hat, its integers, and dZ from the gradient of W_hat.

One program makes one tile, which lies in one block of rows and in one group of columns: each row
of it has one step and one zero point. All kernels get their integers from `rounded_tile`, which
adds up B @ A in IEEE float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def start_of_tile(first, span, COLUMNS: tl.constexpr):
    """The first column of this program's tile, and of the tile's part of the weight after it.

    From ``first`` on, each ``span`` of columns lies in one group; tiles start anew in each.
    Programs count (tile of a span, row block, span).
    """
    start = first + tl.program_id(2) * span
    return start + tl.program_id(0) * COLUMNS, start + span


@triton.jit
def _woven(even, odd):
    """Two tiles as one of twice the columns: even, odd, even, odd, ..."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def _unpacked(phi_ptr, row_mask, start, row_elements, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The packed values of a tile whose first one starts a byte; ``phi_ptr``: of each row, (rows,
    1).

    What lies beyond the end of a row is 0.
    """
    field: tl.constexpr = (1 << BITS) - 1
    if BITS == 8:
        byte = start + tl.arange(0, COLUMNS)
        mask = row_mask[:, None] & (byte < row_elements)[None, :]
        values = tl.load(phi_ptr + byte[None, :], mask=mask, other=0)
    elif 8 % BITS == 0:
        byte = start * BITS // 8 + tl.arange(0, COLUMNS * BITS // 8)
        mask = row_mask[:, None] & (byte < row_elements)[None, :]
        byte = tl.load(phi_ptr + byte[None, :], mask=mask, other=0)
        if BITS == 4:
            values = _woven(byte & field, byte >> 4)
        else:
            even = _woven(byte & field, (byte >> 4) & field)
            values = _woven(even, _woven((byte >> 2) & field, byte >> 6))
    else:
        # Eight values fill BITS bytes.
        octet = start // 8 + tl.arange(0, COLUMNS // 8)
        word = tl.zeros((row_mask.shape[0], COLUMNS // 8), tl.int32 if BITS == 3 else tl.int64)
        for i in tl.static_range(BITS):
            byte = octet * BITS + i
            mask = row_mask[:, None] & (byte < row_elements)[None, :]
            word |= tl.load(phi_ptr + byte[None, :], mask=mask, other=0).to(word.dtype) << (8 * i)
        by_4 = _woven(word & field, (word >> (4 * BITS)) & field)
        by_2 = _woven(by_4, _woven((word >> (2 * BITS)) & field, (word >> (6 * BITS)) & field))
        odd = _woven((word >> BITS) & field, (word >> (5 * BITS)) & field)
        odd = _woven(odd, _woven((word >> (3 * BITS)) & field, (word >> (7 * BITS)) & field))
        values = _woven(by_2, odd)
    return values.to(tl.float32)


@triton.jit
def _unpacked_one_by_one(phi_ptr, mask, column, BITS: tl.constexpr):
    """The same for a tile that starts anywhere."""
    bit = (column * BITS)[None, :]
    shift = bit & 7
    value = tl.load(phi_ptr + (bit >> 3), mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        # The upper bits of some values lie in the next byte.
        parted = mask & (shift + BITS > 8)
        value |= tl.load(phi_ptr + (bit >> 3) + 1, mask=parted, other=0).to(tl.int32) << 8
    return ((value >> shift) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _decoded(
    phi_ptr,
    row,
    row_mask,
    start,
    end,
    row_elements,
    DOWNCAST: tl.constexpr,
    BITS: tl.constexpr,
    QMIN: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """phi of a tile as `WeightFormat.decode` gives it, float32. Beyond ``end``: within the grid."""
    phi_ptr += row.to(tl.int64)[:, None] * row_elements
    column = start + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (column < end)[None, :]
    if DOWNCAST == "int":
        if ALIGNED:
            phi = _unpacked(phi_ptr, row_mask, start, row_elements, BITS, COLUMNS)
        else:
            phi = _unpacked_one_by_one(phi_ptr, mask, column, BITS)
        phi += QMIN
    else:
        phi = tl.load(phi_ptr + column[None, :], mask=mask, other=0).to(tl.float32)
        if DOWNCAST == "fixed8":
            phi *= 1.0 / (1 << (8 - BITS))
            if QMIN == 0:
                phi += 1 << (BITS - 1)
    return phi


@triton.jit
def rounded_tile(
    phi_ptr,
    A_ptr,
    B_ptr,
    row,
    row_mask,
    start,
    end,
    width,
    row_elements,
    gamma,
    RANK: tl.constexpr,
    DOWNCAST: tl.constexpr,
    BITS: tl.constexpr,
    QMIN: tl.constexpr,
    RANKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """round(phi + gamma * B @ A) from column ``start`` on, float32; exact where less than 2^22.

    Columns from ``end`` on hold integers of the grid, as rows that do not exist do.
    """
    column = start + tl.arange(0, COLUMNS)
    product = tl.zeros((row.shape[0], COLUMNS), tl.float32)
    for first in range(0, RANK, RANKS):
        k = first + tl.arange(0, RANKS)
        b_mask = row_mask[:, None] & (k < RANK)[None, :]
        a_mask = (k < RANK)[:, None] & (column < end)[None, :]
        b = tl.load(B_ptr + row[:, None] * RANK + k[None, :], mask=b_mask, other=0.0)
        a = tl.load(A_ptr + k[:, None] * width + column[None, :], mask=a_mask, other=0.0)
        product = tl.dot(b.to(tl.float32), a.to(tl.float32), product, input_precision="ieee")
    phi = _decoded(
        phi_ptr,
        row,
        row_mask,
        start,
        end,
        row_elements,
        DOWNCAST,
        BITS,
        QMIN,
        ALIGNED,
        COLUMNS,
    )
    z = tl.fma(product, tl.zeros_like(product) + gamma, phi)
    # Near 1.5 * 2^23, the steps of float32 are 1, and sums are rounded half to even. Beyond 2^22,
    # far outside every grid, more than that is rounded away.
    return (z + 12582912.0) - 12582912.0


@triton.jit
def effective_step(scale_ptr, at, mask, SCALE: tl.constexpr):
    """`effective_scale` of the scales at some places, float32; SCALE: the dtype that ships."""
    step = tl.load(scale_ptr + at, mask=mask, other=1.0).to(tl.float32)
    smallest: tl.constexpr = 6.103515625e-05 if SCALE == "float16" else 1.1754943508222875e-38
    widest: tl.constexpr = 3.3895313892515355e38 if SCALE == "bfloat16" else 3.4028234663852886e38
    largest: tl.constexpr = 65504.0 if SCALE == "float16" else widest
    step = tl.where(step < smallest, smallest, step)
    step = tl.where(step > largest, largest, step)
    if SCALE == "float16":
        step = step.to(tl.float16).to(tl.float32)
    elif SCALE == "bfloat16":
        step = step.to(tl.bfloat16).to(tl.float32)
    return step


@triton.jit
def limited(rounded, lowest: tl.constexpr, highest: tl.constexpr):
    """The integers of a tile within limits; a NaN stays one."""
    rounded = tl.maximum(rounded, lowest * 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(rounded, highest * 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clipped_to_grid(rounded, BITS: tl.constexpr, QMIN: tl.constexpr):
    """Q of a tile."""
    return limited(rounded, QMIN, QMIN + (1 << BITS) - 1)


@triton.jit
def is_clipped(codes, rounded):
    """Where Q differs from the integer it comes from; a NaN is not clipped."""
    return tl.abs(rounded - codes) > 0.0


@triton.jit
def centered(codes, zero_point_ptr, at, mask, BALANCED: tl.constexpr):
    """Q - zero_point of a tile, or Q + 1/2; ``at``: where the zero point of each row is."""
    if BALANCED:
        codes += 0.5
    if zero_point_ptr is not None:
        codes -= tl.load(zero_point_ptr + at, mask=mask, other=0).to(tl.float32)[:, None]
    return codes


@triton.jit
def weight_kernel(
    weight_ptr,  # written: (rows, columns) of W_hat, contiguous
    changed_ptr,  # (CHANGED,) int32, or None: do nothing where all are 0
    count_ptr,  # (1,) int32, or None: the number of clipped weights is added to it
    places_ptr,  # (room,) int64, or None: row * width + column of the clipped weights, any order
    phi_ptr,
    zero_point_ptr,
    A_ptr,
    B_ptr,
    scale_ptr,
    first_row,
    rows,
    first_column,
    columns,
    room,
    width,
    row_elements,
    span,
    first_group,
    groups,
    gamma,
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
    DEPLOYED: tl.constexpr,
    CHANGED: tl.constexpr,
):
    """W_hat, rounded to DEPLOYED and handed over in the dtype of ``weight_ptr``."""
    if changed_ptr is not None:
        if tl.max(tl.load(changed_ptr + tl.arange(0, CHANGED))) == 0:
            return
    row_in_chunk = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, row_mask = first_row + row_in_chunk, row_in_chunk < rows
    start, end = start_of_tile(first_column, span, COLUMNS)
    rounded = rounded_tile(
        phi_ptr,
        A_ptr,
        B_ptr,
        row,
        row_mask,
        start,
        end,
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
    column = start + tl.arange(0, COLUMNS)
    if count_ptr is not None:
        outside = is_clipped(codes, rounded)
        number = tl.sum(outside.to(tl.int32))
        if number > 0:
            if places_ptr is None:
                tl.atomic_add(count_ptr, number)
            else:
                ones = outside.to(tl.int32)
                place = tl.atomic_add(count_ptr + tl.zeros_like(ones), ones, mask=outside)
                at = row.to(tl.int64)[:, None] * width + column[None, :]
                tl.store(places_ptr + place, at, mask=outside & (place < room))
    at = row.to(tl.int64) * groups + first_group + tl.program_id(2)
    codes = centered(codes, zero_point_ptr, at, row_mask, BALANCED)
    step = effective_step(scale_ptr, at, row_mask, SCALE)
    value = (codes * step[:, None]).to(DEPLOYED).to(weight_ptr.dtype.element_ty)
    at = row_in_chunk.to(tl.int64)[:, None] * columns + (column - first_column)[None, :]
    tl.store(weight_ptr + at, value, mask=row_mask[:, None] & (column < end)[None, :])


@triton.jit
def rounded_kernel(
    rounded_ptr,  # written: (rows, columns) int16, contiguous
    phi_ptr,
    A_ptr,
    B_ptr,
    rows,
    first_column,
    columns,
    width,
    row_elements,
    gamma,
    RANK: tl.constexpr,
    DOWNCAST: tl.constexpr,
    BITS: tl.constexpr,
    QMIN: tl.constexpr,
    BALANCED: tl.constexpr,
    RANKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """round(Z), limited to one step beyond the grid."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    start, end = start_of_tile(first_column, columns, COLUMNS)
    rounded = rounded_tile(
        phi_ptr,
        A_ptr,
        B_ptr,
        row,
        row_mask,
        start,
        end,
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
    column = start + tl.arange(0, COLUMNS)
    at = row.to(tl.int64)[:, None] * columns + (column - first_column)[None, :]
    beyond = limited(rounded, QMIN - 1, QMIN + (1 << BITS))
    mask = row_mask[:, None] & (column < end)[None, :]
    tl.store(rounded_ptr + at, beyond.to(tl.int16), mask=mask)


@triton.jit
def gradient_kernel(
    gradient_ptr,  # read: G, (out, columns), contiguous
    grad_z_ptr,  # written: dZ, or None; may share the memory of G
    weight_ptr,  # written: these columns of W_hat, or None
    scale_sums_ptr,  # written: (out, tiles) float32, sums of G * (Q - zero_point), or None
    phi_ptr,
    zero_point_ptr,
    A_ptr,
    B_ptr,
    scale_ptr,
    out,
    first_column,
    columns,
    width,
    row_elements,
    span,
    first_group,
    groups,
    gamma,
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
    DEPLOYED: tl.constexpr,
    PASS_THROUGH: tl.constexpr,
):
    """dZ = G * s where Q is not clipped, W_hat, and the sums over each tile for the scales."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < out
    start, end = start_of_tile(first_column, span, COLUMNS)
    rounded = rounded_tile(
        phi_ptr,
        A_ptr,
        B_ptr,
        row,
        row_mask,
        start,
        end,
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
    at = row.to(tl.int64) * groups + first_group + tl.program_id(2)
    integers = clipped_to_grid(rounded, BITS, QMIN)
    codes = centered(integers, zero_point_ptr, at, row_mask, BALANCED)
    step = effective_step(scale_ptr, at, row_mask, SCALE)[:, None]
    column = start + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (column < end)[None, :]
    at = row.to(tl.int64)[:, None] * columns + (column - first_column)[None, :]
    if weight_ptr is not None:
        value = (codes * step).to(DEPLOYED).to(weight_ptr.dtype.element_ty)
        tl.store(weight_ptr + at, value, mask=mask)
    gradient = tl.load(gradient_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if scale_sums_ptr is not None:
        sums = tl.sum(gradient * codes, axis=1)
        tile = row.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
        tile = tile * tl.num_programs(0) + tl.program_id(0)
        tl.store(scale_sums_ptr + tile, sums, mask=row_mask)
    if grad_z_ptr is not None:
        if not PASS_THROUGH:
            gradient = tl.where(is_clipped(integers, rounded), 0.0, gradient)
        tl.store(grad_z_ptr + at, (gradient * step).to(grad_z_ptr.dtype.element_ty), mask=mask)
