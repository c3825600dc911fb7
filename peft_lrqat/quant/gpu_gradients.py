"""The gradients of a fake-quantised linear layer on a GPU: few launches and a single wait.

The formulas and the two ways are those of `gradients`; here the kernels of `triton_ops` work on
whole weights between a few products. Which way the factors take depends on the number of clipped
weights. The forward pass counts them and sends the number to the host, where it has arrived when
the backward pass asks for it: the one wait. Where nothing may wait for the device, because a CUDA
graph is captured or torch.compile traces, nothing is counted and the gradients come by weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import low_rank, triton_ops
from .blocks import column_chunks
from .gradients import Gradients, Needed, least_share_of_bias, smallest_step
from .low_rank import LowRankWeight


# Beyond this share of the weights, all of ``gy.T @ x`` is cheaper. A single entry costs some 300
# times its part of a product by matrix units.
MAX_SHARE = 1 / 1024


class ClippedCount:
    """The number of clipped weights of a layer, on its way from a kernel to the host."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = torch.zeros(1, dtype=torch.int32, device=device)

    def send(self) -> None:
        """Starts the copy, behind the kernels that count; the host goes on."""
        device, self._arrived = self.on_device.device, None
        if device.type in ("cpu", "meta"):
            self._on_host = self.on_device.clone()
            return
        self._on_host = torch.empty(1, dtype=torch.int32, device="cpu", pin_memory=True)
        self._on_host.copy_(self.on_device, non_blocking=True)
        with triton_ops.on(device):
            self._arrived = getattr(torch, device.type).Event()
            self._arrived.record()

    def read(self) -> int:
        """The number; waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._on_host)


def count_clipped(w: LowRankWeight, needed: Needed, y_is_kept: bool) -> ClippedCount | None:
    """A counter for the forward pass, if the way of the factors depends on the number."""
    by_rank = w.scale.shape[1] == 1 and (y_is_kept or not needed.scale)
    matters = by_rank and needed.factors and not w.pass_through
    if not matters or torch.compiler.is_compiling() or triton_ops.capturing():
        return None
    return ClippedCount(w.phi.device)


def gradients(
    w: LowRankWeight,
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    needed: Needed,
    count: ClippedCount | None,
) -> Gradients:
    """As `gradients.gradients`; ``count`` is what the forward pass counted, if it did."""
    grad_y, x = _with_rows(grad_y), _with_rows(x)
    y = None if y is None else _with_rows(y)
    by_rank = w.scale.shape[1] == 1 and (y is not None or not needed.scale)
    clipped = 0
    if by_rank and needed.factors and not w.pass_through:
        clipped = -1 if count is None else count.read()  # -1: not counted
        by_rank = 0 <= clipped <= MAX_SHARE * w.shape[0] * w.shape[1]
    if by_rank or not (needed.factors or needed.scale):
        return _by_rank(w, grad_y, x, y, bias, needed, clipped)
    return _by_weight(w, grad_y, x, needed)


def _with_rows(tensor: Tensor) -> Tensor:
    """The tensor with rows of adjacent elements."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _columns(w: LowRankWeight, x: Tensor) -> list[slice]:
    out, width = w.shape
    groups = w.scale.shape[1]
    unit = width // groups if groups > 1 else 1
    return list(column_chunks(out, width, x.dtype, unit, x.device))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, not rounded to the dtype of the factors where the device can."""
    if a.dtype == torch.float32:
        return a @ b
    # Meta tensors count launches for CUDA (benchmarks/gpu.py).
    cuda = a.device.type in ("cuda", "meta") and torch.version.hip is None
    if cuda and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _by_weight(w: LowRankWeight, grad_y: Tensor, x: Tensor, needed: Needed) -> Gradients:
    """All gradients from G, for every grid."""
    grad_x, grad_A, sums = [], [], []
    grad_B = None
    if needed.factors:
        # As in `weight_gradient`: float16 might underflow.
        dtype = torch.bfloat16 if x.dtype == torch.float16 else x.dtype
        A, B = triton_ops.cast_factors(w.A, w.B, None, "", w.gamma, dtype)
    for columns in _columns(w, x):
        gradient = grad_y.T @ x[:, columns]
        weight, tiles = triton_ops.weight_gradient(
            w.layer,
            gradient,
            columns.start,
            needed.factors,
            needed.x,
            needed.scale,
            w.pass_through,
        )
        if needed.x:
            grad_x.append(grad_y @ weight)
        if needed.scale:
            sums.append(tiles)
        if needed.factors:
            grad_z = triton_ops.as_grad_z(gradient)
            if needed.A:
                grad_A.append(_product(B.T, grad_z))
            if needed.B:
                part = _product(grad_z, A[:, columns].T)
                grad_B = part if grad_B is None else grad_B.add_(part)
    return Gradients(
        x=_joined(grad_x),
        A=_joined(grad_A),
        B=grad_B,
        scale=_sums_of_groups(w, _joined(sums)),
    )


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Chunks of columns beside each other."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    return torch.cat(parts, dim=1)


def _sums_of_groups(w: LowRankWeight, tiles: Tensor | None) -> Tensor | None:
    """Sums over the tiles of each group: (out, groups)."""
    if tiles is None or tiles.shape[1] == w.scale.shape[1]:
        return tiles
    return tiles.unflatten(1, (w.scale.shape[1], -1)).sum(-1)


def _by_rank(
    w: LowRankWeight,
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    needed: Needed,
    clipped: int,
) -> Gradients:
    """All gradients without G, for one scale per row; ``clipped`` weights give the factors none."""
    scale_dtype = w.format.scale_dtype
    places = count = None
    if clipped:
        places = torch.empty(clipped, dtype=torch.int64, device=x.device)
        count = torch.zeros(1, dtype=torch.int32, device=x.device)
    grad_x = []
    if needed.x or clipped:
        for columns in _columns(w, x):
            weight = low_rank.dense(w, x.dtype, columns=columns, count=count, places=places)
            if needed.x:
                grad_x.append(grad_y @ weight)
    grad_A = grad_B = sums = largest = None
    if needed.factors:
        A, B = triton_ops.cast_factors(w.A, w.B, w.scale, scale_dtype, 1.0, x.dtype)
        if needed.B:
            grad_B = _product(grad_y.T, x @ A.T)
        if needed.A:
            grad_A = _product((grad_y @ B).T, x)
    if needed.scale:
        sums, largest = triton_ops.scale_sums(grad_y, y, bias)
    grad_scale = None
    if needed.scale or needed.factors:
        limits = smallest_step(w), 0.0 if y is None else least_share_of_bias(y)
        tokens = (grad_y, x) if needed.scale else (None, None)
        found = triton_ops.finish_rows(
            w.layer, *limits, sums, largest, bias, *tokens, grad_A, grad_B
        )
        grad_scale = found if needed.scale else None
    if places is not None:
        _leave_out_clipped(w, grad_y, x, places, grad_A, grad_B)
    return Gradients(x=_joined(grad_x), A=grad_A, B=grad_B, scale=grad_scale)


def _leave_out_clipped(
    w: LowRankWeight,
    grad_y: Tensor,
    x: Tensor,
    places: Tensor,
    grad_A: Tensor | None,
    grad_B: Tensor | None,
) -> None:
    """Takes what the weights at ``places`` contributed out of the gradients of the factors."""
    places = places.sort().values
    values, by_column = triton_ops.sampled_product(
        places, grad_y.T.contiguous(), x.T.contiguous(), w.scale, w.format.scale_dtype, -w.gamma
    )
    if grad_B is not None:
        triton_ops.add_sparse_product(grad_B, places, None, values, w.A.T)
    if grad_A is not None:
        by_column, order = by_column.sort()
        triton_ops.add_sparse_product(grad_A.T, by_column, order, values, w.B)
