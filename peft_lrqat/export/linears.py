"""The deployed weights of an LR-QAT model, a layer at a time: integers, scales and zero points as they ship."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..lrqat.layer import LRQATLayer
from ..quant import quantized_codes, quantized_weight
from ..quant.grid import SCALE_DTYPES, Grid


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """One target: ``weight = scale * (codes - zero_point)``, rounded once to ``dtype``."""

    name: str  # of the module in the base model
    grid: Grid
    codes: Tensor  # (out, in), int8 on a symmetric grid, uint8 on an asymmetric one
    scale: Tensor  # (out, groups) in the dtype that training rounded it to
    zero_point: Tensor | None  # (out, groups) uint8; None on a symmetric grid
    weight: Tensor  # (out, in) in ``dtype``: what the model computes with
    is_conv1d: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def group_size(self) -> int:
        """Weights that share a scale; the whole row where the grid says -1."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def centered(self) -> Tensor:
        """``codes - zero_point``, (out, in) int16."""
        codes = self.codes.to(torch.int16)
        return codes if self.zero_point is None else self.grid.centered(codes, self.zero_point)


def widened(grid: Grid, bits: int | None) -> Grid:
    """The grid with more bits, on which all its integers lie, too; ValueError for fewer. None: as it is."""
    if bits is None:
        return grid
    if not grid.bits <= bits <= 8:
        raise ValueError(
            f"`container_bits` must be {grid.bits}, the bits of the weights, to 8, but is {bits!r}"
        )
    return replace(grid, bits=bits)


def lrqat_layers(model: PeftModel) -> dict[str, LRQATLayer]:
    """The target layers by their names in the base model."""
    layers = model.get_base_model().named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, LRQATLayer)}


@torch.no_grad()
def quantized_linear(name: str, layer: LRQATLayer, adapter_name: str) -> QuantizedLinear:
    """What one layer ships under one adapter."""
    weight = layer.low_rank_weight(adapter_name)
    format = weight.format
    return QuantizedLinear(
        name=name,
        grid=format.grid,
        codes=quantized_codes(weight),
        scale=weight.step().float().to(SCALE_DTYPES[format.scale_dtype]),
        zero_point=weight.zero_point,
        weight=quantized_weight(weight),
        is_conv1d=layer.base_layer.is_conv1d,
    )


def model_tensors(model: PeftModel, adapter_name: str) -> Iterator[tuple[str, Tensor | LRQATLayer]]:
    """Everything that the deployed model is made of, by its names in the plain base model, one after another.

    A target's weight comes as its layer under the module's name, for `quantized_linear`; all else as tensors: biases, embeddings,
    norms, buffers, and the trained copies of ``modules_to_save``. Tensors that are tied to one that came before are left out, as
    transformers does.
    """
    base = model.get_base_model()
    seen: set[int] = set()
    for name, module in base.named_modules():
        if isinstance(module, LRQATLayer):
            yield name, module
            if module.base_layer.bias is not None:
                yield f"{name}.bias", module.base_layer.bias.detach()
            continue
        inside = any(isinstance(parent, LRQATLayer) for parent in _parents(base, name))
        if inside or _is_other_copy(base, name, adapter_name):
            continue
        tensors = {
            **module._parameters,
            **{n: b for n, b in module._buffers.items() if n not in _not_saved(module)},
        }
        for kind, tensor in tensors.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            plain = _plain_name(base, name)
            yield f"{plain}.{kind}" if plain else kind, tensor.detach()


def _not_saved(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _parents(base: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [base.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]


def _is_other_copy(base: nn.Module, name: str, adapter_name: str) -> bool:
    """Whether a module lies in a copy that ``modules_to_save`` keeps beside the one that runs."""
    parts = name.split(".")
    for i, parent in enumerate(_parents(base, name), start=1):
        if isinstance(parent, ModulesToSaveWrapper):
            runs = adapter_name in parent.modules_to_save
            own = ["modules_to_save", adapter_name] if runs else ["original_module"]
            rest = parts[i:]
            if rest[: len(own)] != own[: len(rest)]:
                return True
    return False


def _plain_name(base: nn.Module, name: str) -> str:
    """A module's name without what PEFT put around it."""
    parts, plain = name.split("."), []
    skip = 0
    for i, part in enumerate(parts):
        if skip:
            skip -= 1
            continue
        plain.append(part)
        if isinstance(base.get_submodule(".".join(parts[: i + 1])), ModulesToSaveWrapper):
            skip = 1 if parts[i + 1 : i + 2] == ["original_module"] else 2
    return ".".join(plain)
