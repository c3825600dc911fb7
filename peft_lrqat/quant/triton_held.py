"""Triton kernel that finds on the device whether a held weight is still what its tensors make."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _renew(live_ptr, held_ptr, elements, BLOCK: tl.constexpr):
    """Whether any element of this program's share has other bits; copies those that have."""
    changed = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, elements, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < elements
        live = tl.load(live_ptr + at, mask=mask, other=0)
        differs = (live != tl.load(held_ptr + at, mask=mask, other=0)) & mask
        tl.store(held_ptr + at, live, mask=differs)
        changed |= differs.to(tl.int32)
    return tl.max(changed)


@triton.jit
def renew_kernel(
    changed_ptr,  # written: (programs,) int32
    A_ptr,
    B_ptr,
    scale_ptr,
    held_A_ptr,  # updated, as the next two are
    held_B_ptr,
    held_scale_ptr,
    elements_of_A,
    elements_of_B,
    elements_of_scale,
    BLOCK: tl.constexpr,
):
    """Brings the held tensors up to date; ``changed`` is 1 where a program found a difference.

    All tensors are given as integers of the same width: a NaN equals itself.
    """
    changed = _renew(A_ptr, held_A_ptr, elements_of_A, BLOCK)
    changed |= _renew(B_ptr, held_B_ptr, elements_of_B, BLOCK)
    changed |= _renew(scale_ptr, held_scale_ptr, elements_of_scale, BLOCK)
    tl.store(changed_ptr + tl.program_id(0), changed)
