"""Entries of ``gy.T @ x`` at a few places: what the gradient of the factors must leave out where
weights are clipped.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


# Beyond this share of the weights, all of ``gy.T @ x`` is cheaper. A single entry costs as much as
# 10 of a whole bfloat16 product on a CPU without matrix units, and more where there are some.
MAX_SHARE = 0.02
# And beyond this number in one layer, their indices would take too much memory.
MAX_COUNT = 1 << 19
# What is gathered at a time: tokens of x and gy, or rows of the factors.
PART_BYTES = 1 << 23


def find_clipped(rounded: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries outside qmin .. qmax, in order; cheap where there are few."""
    rows = ((rounded.amax(1) > qmax) | (rounded.amin(1) < qmin)).nonzero().squeeze(1)
    some = rounded[rows]
    row, column = ((some > qmax) | (some < qmin)).nonzero(as_tuple=True)
    return rows[row], column


def sampled_product(grad_y: Tensor, x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """``(grad_y.T @ x)[row, column]`` of (tokens, out), (tokens, in) and places (n,) sorted by row:
    (n,), float32 or wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, row = row.unique(return_inverse=True)
    columns, column = column.unique(return_inverse=True)
    starts = torch.searchsorted(row, torch.arange(len(rows) + 1, device=x.device))
    values = torch.zeros(len(row), dtype=dtype, device=x.device)
    tokens = max(1, PART_BYTES // ((len(rows) + len(columns)) * dtype.itemsize))
    for some_y, some_x in zip(grad_y.split(tokens), x.split(tokens), strict=True):
        left = some_y[:, rows].T.contiguous().to(dtype)
        right = some_x[:, columns].T.contiguous().to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            places = torch.sparse_csr_tensor(
                starts, column, values, (len(rows), len(columns)), check_invariants=False
            )
            values = torch.sparse.sampled_addmm(places, left, right.T).values()
    return values


def add_sparse_product(
    to: Tensor, values: Tensor, row: Tensor, column: Tensor, other: Tensor
) -> None:
    """``to += S @ other``, S being ``values`` (n,) at the places (row, column); to (rows, r), other
    (columns, r).
    """
    part = max(1, PART_BYTES // (other.shape[1] * values.dtype.itemsize))
    for some, i, j in zip(values.split(part), row.split(part), column.split(part), strict=True):
        to.index_add_(0, i, (other[j].to(values.dtype) * some.unsqueeze(1)).to(to.dtype))
