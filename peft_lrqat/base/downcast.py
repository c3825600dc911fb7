"""The frozen, downcast weight of one linear layer: what stands where the original module stood."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quant import WeightFormat, estimate_range
from ..quant.blocks import row_blocks
from ..shared.casts import keep_values


def range_name(estimator: str, p: float) -> str:
    """The range estimation in words; the exponent only where it plays a part."""
    return f"lp, p = {float(p)}" if estimator == "lp" else estimator


class DowncastLinear(nn.Module):
    """``phi``, its first scales and zero points, and the bias of a linear layer; computes with ``scale0 * (phi - zero_point)``.

    The stored tensors are parameters that need no gradient, not buffers: DDP would send buffers again at every forward pass
    and FSDP2 would not shard them. ``.half()`` and ``.to(dtype)`` leave them alone; only ``dtype``, that of the weight this layer
    stands for, follows.

    Args:
        linear: `nn.Linear`, or transformers' `Conv1D`, whose weight is (in, out).
        format: how to store the weight.
        estimator, p: range estimation, see :func:`peft_lrqat.quant.estimate_range`.
        base_dtype: the weight is rounded to it before anything else, where it is wider.
    """

    # Made from real weights even where PEFT creates the adapter's own parameters on the meta device.
    @skip_init_on_device
    def __init__(
        self,
        linear: nn.Linear | Conv1D,
        format: WeightFormat,
        *,
        estimator: str,
        p: float,
        base_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.is_conv1d = isinstance(linear, Conv1D)
        weight = linear.weight.detach().T if self.is_conv1d else linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.format = format
        self.dtype = weight.dtype
        self.bias = linear.bias
        # The dense weight while an adapter is merged; not part of the state.
        self.merged_weight: Tensor | None = None
        if base_dtype.itemsize < weight.dtype.itemsize:
            weight = weight.to(base_dtype)
        # What the frozen weight was made from and how: all adapters on it must agree.
        self.base_dtype, self.range = weight.dtype, range_name(estimator, p)
        scale0, zero_point = estimate_range(
            weight, format.grid, estimator=estimator, scale_dtype=format.scale_dtype, p=p
        )
        blocks = list(row_blocks(*weight.shape, weight.device))
        phi = torch.cat(
            [
                format.encode(self._in_units(weight[r].float(), scale0[r], zero_point[r]))
                for r in blocks
            ]
        )
        self.phi = nn.Parameter(phi, requires_grad=False)
        self.scale0 = nn.Parameter(scale0, requires_grad=False)
        self.zero_point = (
            None if format.grid.symmetric else nn.Parameter(zero_point, requires_grad=False)
        )
        self.fingerprint = self._fingerprint()

    def _in_units(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        grid = self.format.grid
        phi = weight / grid.expand(scale, self.in_features)
        return (
            phi if grid.symmetric else phi.add_(grid.expand(zero_point.float(), self.in_features))
        )

    def _fingerprint(self) -> int:
        """63 bits that change whenever anything that the integers are made from does."""
        grid = self.format.grid
        fields = (
            grid.bits,
            grid.symmetric,
            grid.group_size,
            self.format.downcast,
            self.format.scale_dtype,
            self.in_features,
        )
        digest = hashlib.blake2b(repr(fields).encode(), digest_size=8)
        for tensor in (self.phi, self.scale0, self.zero_point):
            if tensor is not None:
                digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy())
        return int.from_bytes(digest.digest(), "little") >> 1

    def _load_from_state_dict(self, *args: Any) -> None:
        """A whole model's state dict brings another frozen weight, and with it that weight's fingerprint."""
        super()._load_from_state_dict(*args)
        # What FSDP2 shards, no rank sees as a whole; the fingerprint stays that of the base it was made from.
        if type(self.phi) is nn.Parameter and self.phi.device.type != "meta":
            self.fingerprint = self._fingerprint()

    def stored_weight(self) -> Tensor:
        """``scale0 * (phi - zero_point)``, (out, in) in ``dtype``: the base weight as far as it is still known."""
        grid = self.format.grid
        weight = torch.empty(
            self.out_features, self.in_features, dtype=self.dtype, device=self.phi.device
        )
        for rows in row_blocks(*weight.shape, weight.device):
            zero_point = None if self.zero_point is None else self.zero_point[rows]
            phi = grid.centered(self.format.decode(self.phi[rows]), zero_point)
            weight[rows] = phi.mul_(grid.expand(self.scale0[rows], self.in_features)).to(self.dtype)
        return weight

    @property
    def weight(self) -> Tensor:
        """The dense weight this layer computes with, in the original module's layout; made anew at every access."""
        weight = self.stored_weight() if self.merged_weight is None else self.merged_weight
        return weight.T if self.is_conv1d else weight

    def to_plain(self, weight: Tensor) -> nn.Linear | Conv1D:
        """A module of the original kind with ``weight`` (out, in) and this layer's bias."""
        if self.is_conv1d:
            plain = Conv1D(0, 0)
            plain.nf, plain.nx, plain.bias = self.out_features, self.in_features, self.bias
            # The transposed view, not a copy: its product adds up in the same order as the unmerged layer's.
            weight = weight.T
        else:
            plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            plain.bias = self.bias
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        weight = self.stored_weight() if self.merged_weight is None else self.merged_weight
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, weight, self.bias)
        return nn.functional.linear(x.to(self.dtype), weight, self.bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DowncastLinear:
        protected = {id(t) for t in (self.phi, self.scale0, self.zero_point)}
        keep = keep_values(fn)
        super()._apply(lambda t: keep(t) if id(t) in protected else fn(t), recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.merged_weight is not None:
            self.merged_weight = fn(self.merged_weight)
        return self

    def extra_repr(self) -> str:
        grid = self.format.grid
        kind = "symmetric" if grid.symmetric else "asymmetric"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={grid.bits}, group_size={grid.group_size}, {kind}, downcast={self.format.downcast}"
        )
