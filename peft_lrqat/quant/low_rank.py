"""The integers of a weight with low-rank factors (LR-QAT, equation 6) and the dense weight they
make.

    Z     = phi + gamma * B @ A            in units of the grid
    Q     = clip(round(Z), qmin, qmax)
    W_hat = s * (Q - zero_point)           on a balanced grid s * (Q + 1/2)

One function decides the integers on a device, in forward, backward, merge and export: `rounded`, or
on a GPU the kernels' `rounded_tile`. Both compute Z in float32, but in another order, each within
(r + 4) * 2^-24 * (|phi| + gamma * |B| @ |A|) of its exact value. So an integer can depend on the
device only where Z lies within this bound of the middle between two integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import triton_ops
from .blocks import row_blocks
from .grid import effective_scale
from .storage import WeightFormat


@dataclass(frozen=True, kw_only=True)
class LowRankWeight:
    """One quantised weight, W_hat: the frozen storage of a layer and the tensors that one adapter
    trains.
    """

    format: WeightFormat
    phi: Tensor  # (out, row_elements), stored
    zero_point: Tensor | None  # (out, groups) uint8; None on a symmetric grid
    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: Tensor  # (out, groups), before its straight-through rounding to the format's scale dtype
    gamma: float  # lora_alpha / r
    dtype: torch.dtype  # of the deployed weight: W_hat is rounded to it once
    pass_through: bool = False  # clipped weights pass their gradient on to Z, too; changes no value

    @property
    def shape(self) -> tuple[int, int]:
        return self.phi.shape[0], self.format.in_features

    def step(self, rows: slice | Tensor | None = None, groups: slice | None = None) -> Tensor:
        """The step that is used and shipped, (rows, groups), in float32 or wider; default: all."""
        scale = self.scale[slice(None) if rows is None else rows, groups or slice(None)]
        dtype = torch.promote_types(torch.float32, scale.dtype)
        return effective_scale(scale.to(dtype), self.format.scale_dtype)

    @property
    def layer(self) -> triton_ops.Layer:
        """This weight as the kernels take it."""
        fmt = self.format
        return triton_ops.Layer(
            phi=self.phi,
            zero_point=self.zero_point,
            A=self.A,
            B=self.B,
            scale=self.scale,
            gamma=self.gamma,
            downcast=fmt.downcast,
            bits=fmt.grid.bits,
            balanced=fmt.grid.balanced,
            scale_dtype=fmt.scale_dtype,
            deployed=self.dtype,
        )


@contextmanager
def _ieee_matmul(device: torch.device) -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products: the integers must be the same in training,
    merge and export.

    Inside a graph of ``torch.compile`` the setting of the process holds; it cannot be changed
    there.
    """
    if torch.compiler.is_compiling():
        yield
        return
    # PyTorch replaces these modules by objects, whose attributes no type checker sees.
    backends: Any = torch.backends
    products = {"cuda": backends.cuda.matmul, "cpu": backends.mkldnn.matmul}
    backend = products.get(device.type)
    precision = "none" if backend is None else backend.fp32_precision
    if backend is None or precision in ("ieee", "none"):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        # "none" follows the setting of all backends.
        backend.fp32_precision = "none" if precision == backends.fp32_precision else precision


def groups_of(w: LowRankWeight, columns: slice) -> slice:
    """The groups that ``columns`` lie in; with several groups, ``columns`` split none."""
    groups = w.scale.shape[1]
    size = w.shape[1] // groups
    return slice(0, 1) if groups == 1 else slice(columns.start // size, columns.stop // size)


def served(w: LowRankWeight, *dtypes: torch.dtype) -> bool:
    """Whether Triton's kernels make this weight, with tensors of ``dtypes`` beside it."""
    # The compiler makes its own kernels, and cannot include these (PyTorch 2.11, on a GPU).
    return not torch.compiler.is_compiling() and triton_ops.serves(w.layer, *dtypes)


def rounded(w: LowRankWeight, rows: slice | Tensor, columns: slice) -> Tensor:
    """Returns round(Z) of some rows and columns, as a new tensor in float32 or wider.

    A kernel gives it limited to one step beyond the grid. ``columns`` start at a multiple of 8.
    """
    if served(w):
        fmt = w.format
        settings = (w.gamma, fmt.downcast, fmt.grid.bits, fmt.grid.symmetric)
        phi, B = w.phi[rows].contiguous(), w.B[rows]
        return triton_ops.rounded(phi, w.A, B, *settings, columns.start, columns.stop).float()
    dtype = torch.promote_types(torch.float32, torch.promote_types(w.A.dtype, w.scale.dtype))
    phi = w.format.decode(w.phi[rows], columns).to(dtype)
    with _ieee_matmul(phi.device), torch.autocast(phi.device.type, enabled=False):
        z = phi.addmm_(w.B[rows].to(dtype), w.A[:, columns].to(dtype), alpha=w.gamma)
    return z.round_()


def tile(
    w: LowRankWeight, rows: slice | Tensor, columns: slice | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns round(Z), Q - zero_point and the step of some rows and columns, as new tensors.

    On a balanced grid, Q + 1/2 is the second. All in float32 or wider, (rows, columns) or
    broadcastable to it. ``columns`` start at a multiple of 8 and split no group, where a row has
    several.
    """
    grid = w.format.grid
    columns = slice(0, w.format.in_features) if columns is None else columns
    groups, width = groups_of(w, columns), columns.stop - columns.start
    integers = rounded(w, rows, columns)
    zero_point = None if w.zero_point is None else w.zero_point[rows, groups]
    codes = grid.centered(integers.clamp(grid.qmin, grid.qmax), zero_point)
    return integers, codes, grid.expand(w.step(rows, groups).to(integers.dtype), width)


def deploy(codes: Tensor, step: Tensor, dtype: torch.dtype, to: Tensor) -> None:
    """Writes the product, rounded to ``dtype``, into ``to``; overwrites ``codes``."""
    codes.mul_(step)
    to.copy_(codes if to.dtype == dtype else codes.to(dtype))


def dense(
    w: LowRankWeight,
    dtype: torch.dtype,
    rows: slice | None = None,
    columns: slice | None = None,
    *,
    count: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """W_hat rounded to the deployed dtype, handed over in ``dtype``: (out, in), or a part of it.

    Where Triton's kernels make the weight, ``count`` and ``places`` take the clipped weights, as in
    `triton_ops.weight`.
    """
    out, width = w.shape
    rows = slice(0, out) if rows is None else rows
    columns = slice(0, width) if columns is None else columns
    if served(w, dtype):
        part = (rows.start, rows.stop, columns.start, columns.stop)
        return triton_ops.weight(w.layer, dtype, *part, count, places)
    shape = rows.stop - rows.start, columns.stop - columns.start
    weight = torch.empty(shape, dtype=dtype, device=w.phi.device)
    for block in row_blocks(*shape, weight.device):
        some = slice(rows.start + block.start, rows.start + block.stop)
        _, codes, step = tile(w, some, columns)
        deploy(codes, step, w.dtype, weight[block])
    return weight


@torch.no_grad()
def quantized_weight(weight: LowRankWeight) -> Tensor:
    """W_hat (out, in) in the deployed dtype: bit for bit what :func:`fake_quant_linear` multiplies
    with.
    """
    return dense(weight, weight.dtype)


@torch.no_grad()
def quantized_codes(weight: LowRankWeight) -> Tensor:
    """The integers Q that ship, (out, in): int8 on a symmetric grid, uint8 on an asymmetric one."""
    grid = weight.format.grid
    dtype = torch.int8 if grid.symmetric else torch.uint8
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.phi.device)
    for rows in row_blocks(*weight.shape, codes.device):
        codes[rows] = tile(weight, rows)[0].clamp_(grid.qmin, grid.qmax).to(dtype)
    return codes


@torch.no_grad()
def inspect_rows(weight: LowRankWeight, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For the rows with the given indices: the integers Q as in :func:`quantized_codes`, and which
    of them were clipped.
    """
    grid = weight.format.grid
    rounded, _, _ = tile(weight, rows)
    clipped = (rounded < grid.qmin).logical_or_(rounded > grid.qmax)
    return rounded.clamp_(grid.qmin, grid.qmax).to(
        torch.int8 if grid.symmetric else torch.uint8
    ), clipped
