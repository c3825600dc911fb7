"""The frozen, downcast weight of one linear layer, in place of the original module."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, cast, overload

import torch
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quant import WeightFormat, estimate_range
from ..quant.blocks import row_blocks
from ..shared.casts import keep_values
from .read_weight import ReadWeight


def range_name(estimator: str, p: float) -> str:
    """The range estimation in words; the exponent only if it plays a part."""
    return f"lp, p = {float(p)}" if estimator == "lp" else estimator


class DowncastLinear(nn.Module):
    """A frozen linear layer on an integer grid: ``y = x @ (scale0 * (phi - zero_point)).T + bias``.

    ``phi`` (out, row_elements), ``scale0`` (out, groups) float32 and ``zero_point`` (out, groups)
    uint8, None on a symmetric grid, are parameters that need no gradient, not buffers: DDP would
    send buffers again at every forward pass and FSDP2 would not shard them. ``.half()`` and
    ``.to(dtype)`` leave them alone; only ``dtype``, that of the weight this layer stands for,
    follows.

    Args:
        in_features, out_features: the shape of the weight is (out, in).
        format: how the weight is stored.
        bias: the bias of the layer, (out,), or None.
        dtype: of the weight this layer stands for.
        base_dtype: of the weight that the integers were made from.
        first_range: how the first scales were found, in words; adapters on it must agree.
        is_conv1d: whether it stands for transformers' `Conv1D`, whose weight is (in, out).
        device: where the empty parameters are.
    """

    experts: int = 0  # whose weights these are the rows of; 0: it is one weight
    FROZEN = ("phi", "scale0", "zero_point")
    UNLISTED = ("mark", *FROZEN)  # while an adapter is merged
    # The layer computes with `_held`, by name, as long as the parameters are the objects `_own`:
    # the parameters may be written into by averages of weights, which truncate integers. In the
    # original the two share their memory; a copy holds what the original holds, and its
    # parameters are copies. Whoever puts other parameters here, as FSDP2 does, means them.
    _held: dict[str, Tensor]
    _own: dict[str, nn.Parameter]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: WeightFormat,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        base_dtype: torch.dtype,
        first_range: str,
        is_conv1d: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.is_conv1d = in_features, out_features, is_conv1d
        self.format, self.dtype, self.bias = format, dtype, bias
        self.base_dtype, self.range = base_dtype, first_range
        groups = (out_features, format.grid.num_groups(in_features))
        phi = torch.empty(
            out_features, format.row_elements, dtype=format.storage_dtype, device=device
        )
        self.phi = nn.Parameter(phi, requires_grad=False)
        scale0 = torch.empty(groups, dtype=torch.float32, device=device)
        self.scale0 = nn.Parameter(scale0, requires_grad=False)
        self.zero_point = None
        if not format.grid.symmetric:
            zero_point = torch.empty(groups, dtype=torch.uint8, device=device)
            self.zero_point = nn.Parameter(zero_point, requires_grad=False)
        # The dense weight while an adapter is merged; not part of the state.
        self._merged_weight: Tensor | None = None
        self._hold()
        self._known_fingerprint: int | None = None
        self.generation = 0  # counts the frozen weights that were loaded into this layer

    # Real weights, even if PEFT creates the adapter's own parameters on the meta device.
    @classmethod
    @skip_init_on_device
    def from_linear(
        cls,
        linear: nn.Linear | Conv1D | nn.Embedding,
        format: WeightFormat,
        *,
        estimator: str,
        p: float,
        base_dtype: torch.dtype,
    ) -> Self:
        """The layer that stands for ``linear``; the two share the bias.

        Args:
            linear: `nn.Linear`, or transformers' `Conv1D`, whose weight is (in, out).
            format: how to store the weight.
            estimator, p: range estimation, see :func:`peft_lrqat.quant.estimate_range`.
            base_dtype: a weight in a wider dtype is rounded to it before anything else.
        """
        is_conv1d = isinstance(linear, Conv1D)
        weight = linear.weight.detach().T if is_conv1d else linear.weight.detach()
        narrower = base_dtype.itemsize < weight.dtype.itemsize
        out_features, in_features = weight.shape
        made = cls(
            in_features,
            out_features,
            format,
            bias=getattr(linear, "bias", None),
            dtype=weight.dtype,
            base_dtype=base_dtype if narrower else weight.dtype,
            first_range=range_name(estimator, p),
            is_conv1d=is_conv1d,
            device=weight.device,
        )
        made.stand_for(linear)
        made._quantize(weight.to(base_dtype) if narrower else weight, estimator, p)
        return made

    def _quantize(self, weight: Tensor, estimator: str, p: float) -> None:
        grid = self.format.grid
        scale0, zero_point = estimate_range(
            weight, grid, estimator=estimator, scale_dtype=self.format.scale_dtype, p=p
        )
        height, width = weight.shape
        for rows in row_blocks(height, width, weight.device):
            offset = None if grid.symmetric else zero_point[rows]
            phi = grid.units(weight[rows].float(), scale0[rows], offset)
            self.phi.data[rows] = self.format.encode(phi)
        self.fill(self.phi.data, scale0, zero_point)

    def stand_for(self, plain: nn.Module) -> None:
        """Takes over what only the kind of ``plain`` has; linear layers have nothing more."""

    @property
    def transposed(self) -> bool:
        """Whether the weight of the plain model is (in, out)."""
        return self.is_conv1d

    def fill(self, phi: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        """Takes a stored weight, (out, row_elements), with its scales and zero points."""
        self.phi.data, self.scale0.data = phi, scale
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.data = zero_point
        self._hold()

    @torch.no_grad()
    def resize(self, rows: int) -> None:
        """Cuts rows off the end, or adds rows that are the mean of all rows, on the grid."""
        more = rows - self.out_features
        found = {name: t for name in self.FROZEN if (t := self.frozen(name)) is not None}
        if more > 0:
            mean = self.stored_weight().float().mean(0, keepdim=True).to(self.dtype)
            row = DowncastLinear(
                self.in_features,
                1,
                self.format,
                bias=None,
                dtype=self.dtype,
                base_dtype=self.base_dtype,
                first_range=self.range,
                device=mean.device,
            )
            row._quantize(mean, "minmax", 2.0)
            new = {name: cast(Tensor, row.frozen(name)).expand(more, -1) for name in found}
            found = {name: torch.cat([tensor, new[name]]) for name, tensor in found.items()}
        else:
            found = {name: tensor[:rows].clone() for name, tensor in found.items()}
        if self.bias is not None:
            self.bias.data = nn.functional.pad(self.bias.data[:rows], (0, max(0, more)))
        self.out_features = rows
        self.fill(found["phi"], found["scale0"], found.get("zero_point"))
        self._known_fingerprint = None
        self.generation += 1

    def _hold(self) -> None:
        """Takes the parameters as they are for the frozen weight."""
        found = {name: self._frozen_parameter(name) for name in self.FROZEN}
        self._own = {name: p for name, p in found.items() if p is not None}
        self._held = {name: p.data for name, p in self._own.items() if type(p) is nn.Parameter}

    def _frozen_parameter(self, name: str) -> nn.Parameter | None:
        # While an adapter is merged, it is a plain attribute.
        return self._parameters.get(name, vars(self).get(name))

    @property
    def merged_weight(self) -> Tensor | None:
        """(out, in) in ``dtype`` while an adapter is merged.

        It is then the parameter ``weight``, in the original module's layout, for whoever reads
        ``named_parameters()``; what is frozen is not listed. State dicts and casts are as before.
        """
        return self._merged_weight

    @merged_weight.setter
    def merged_weight(self, weight: Tensor | None) -> None:
        self._merged_weight = weight
        if weight is not None:
            own = weight.T if self.is_conv1d else weight
            self._parameters["weight"] = nn.Parameter(own, requires_grad=False)
            for name in self.UNLISTED:
                if name in self._parameters:
                    vars(self)[name] = self._parameters.pop(name)
        elif "weight" in self._parameters:
            del self._parameters["weight"]
            listed = {"mark": None, **self._parameters}  # the order is that of before
            for name in self.UNLISTED:
                if isinstance(vars(self).get(name), nn.Parameter):
                    listed[name] = vars(self).pop(name)
            self._parameters.clear()
            self._parameters.update(
                (name, p) for name, p in listed.items() if name != "mark" or p is not None
            )

    @contextmanager
    def _listed_as_unmerged(self) -> Iterator[None]:
        merged, self.merged_weight = self.merged_weight, None
        try:
            yield
        finally:
            self.merged_weight = merged

    @overload
    def frozen(self, name: Literal["phi", "scale0"]) -> Tensor: ...

    @overload
    def frozen(self, name: str) -> Tensor | None: ...

    def frozen(self, name: str) -> Tensor | None:
        """``phi``, ``scale0`` or ``zero_point`` as the layer computes with it."""
        if torch.compiler.is_compiling():
            return self._held[name] if name in self._held else getattr(self, name)
        parameter = self._frozen_parameter(name)
        # ZeRO-3 leaves the objects here, and takes their data.
        if parameter is not self._own.get(name) or hasattr(parameter, "ds_id"):
            self._held.clear()
        return self._held.get(name, parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> DowncastLinear:
        """A copy that shares the frozen weight, and has parameters of its own."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            if name not in ("_held", "_own"):
                vars(copied)[name] = copy.deepcopy(value, memo)
        held = {name: t for name in self.FROZEN if (t := self.frozen(name)) is not None}
        copied._own = {n: p for n in self.FROZEN if (p := copied._frozen_parameter(n)) is not None}
        copied._held = {name: held[name] for name in copied._own if name in self._held}
        return copied

    @property
    def fingerprint(self) -> int:
        """63 bits that change with anything that the integers are made from."""
        if self._known_fingerprint is None:
            self._known_fingerprint = self._fingerprint()
        return self._known_fingerprint

    def trust(self, fingerprint: int) -> None:
        """Takes ``fingerprint`` for that of the frozen weight, whose bytes were compared."""
        self._known_fingerprint = fingerprint

    def _fingerprint(self) -> int:
        grid = self.format.grid
        fields = (
            grid.bits,
            grid.symmetric,
            grid.group_size,
            self.format.downcast,
            self.format.scale_dtype,
            self.in_features,
            # As before there were other kinds of grids.
            *(["balanced"] if grid.balanced else []),
            *(["k_quant"] if grid.k_quant else []),
        )
        digest = hashlib.blake2b(repr(fields).encode(), digest_size=8)
        for tensor in map(self.frozen, self.FROZEN):
            if tensor is not None:
                digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data)
        return int.from_bytes(digest.digest(), "little") >> 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes another frozen weight from a whole model's state dict, with its fingerprint."""
        brought = any(f"{prefix}{name}" in state_dict for name in self.FROZEN)
        if brought and self._held:
            for name, parameter in self._own.items():  # copies of this layer may hold it
                parameter.data = self._held[name].clone()
        with self._listed_as_unmerged():
            super()._load_from_state_dict(state_dict, prefix, *args)
        if brought:
            self._hold()
        # No rank sees as a whole what FSDP2 shards; the fingerprint stays that of the base.
        if brought and type(self.phi) is nn.Parameter and self.phi.device.type != "meta":
            self._known_fingerprint = None
            self.generation += 1

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        with self._listed_as_unmerged():
            super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in self._own:
                held = self.frozen(name)
                assert held is not None
                destination[f"{prefix}{name}"] = held.detach()

    def stored_weight(self) -> Tensor:
        """``scale0 * (phi - zero_point)``, (out, in) in ``dtype``: what is left of the base's
        weight.
        """
        return self._dense(*map(self.frozen, self.FROZEN))

    def _dense(self, phi: Any, scale: Any, zero_point: Tensor | None) -> Tensor:
        """The rows of the weight that are stored in these tensors, in ``dtype``."""
        grid, height = self.format.grid, len(phi)
        weight = torch.empty(height, self.in_features, dtype=self.dtype, device=phi.device)
        for rows in row_blocks(height, self.in_features, weight.device):
            offset = None if zero_point is None else zero_point[rows]
            units = self.format.decode(phi[rows])
            weight[rows] = grid.values(units, scale[rows], offset).to(self.dtype)
        return weight

    @property
    def weight(self) -> Tensor:
        """The dense weight in the original module's layout; made if its values are used."""
        if (merged := self._parameters.get("weight")) is not None:
            return merged
        if torch.compiler.is_compiling():
            return self.dense_weight()
        shape = (self.out_features, self.in_features)
        return ReadWeight(
            self.dense_weight,
            shape[::-1] if self.is_conv1d else shape,
            self.dtype,
            self.phi.device,
            requires_grad=False,
        )

    def dense_weight(self) -> Tensor:
        """The dense weight in the original module's layout, made anew."""
        weight = self.stored_weight() if self.merged_weight is None else self.merged_weight
        return weight.T if self.is_conv1d else weight

    def to_plain(self, weight: Tensor) -> nn.Linear | Conv1D | nn.Embedding:
        """A module of the original kind with ``weight`` (out, in) and this layer's bias."""
        if self.is_conv1d:
            plain: Any = Conv1D(0, 0)
            plain.nf, plain.nx, plain.bias = self.out_features, self.in_features, self.bias
            # A transposed view, not a copy: its product adds up in the unmerged layer's order.
            weight = weight.T
        else:
            plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            plain.bias = self.bias
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        weight = self.stored_weight() if self.merged_weight is None else self.merged_weight
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, weight, self.bias)
        return nn.functional.linear(x.to(self.dtype), weight, self.bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DowncastLinear:
        merged, self.merged_weight = self.merged_weight, None
        protected = {id(t) for t in (self.phi, self.scale0, self.zero_point)}
        keep = keep_values(fn)
        found = {name: self.frozen(name) for name in self.FROZEN if name in self._held}
        held = {name: tensor for name, tensor in found.items() if tensor is not None}
        apart = {
            name: keep(tensor)
            for name, tensor in held.items()
            if tensor.data_ptr() != self._own[name].data_ptr()
        }
        super()._apply(lambda t: keep(t) if id(t) in protected else fn(t), recurse)
        self._hold()
        self._held |= apart
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.merged_weight = None if merged is None else fn(merged)
        return self

    def extra_repr(self) -> str:
        grid = self.format.grid
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={grid.bits}, group_size={grid.group_size}, "
            f"{grid.kind}, "
            f"downcast={self.format.downcast}"
        )
