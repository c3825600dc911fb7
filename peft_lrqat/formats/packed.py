"""This package's own format: integers of any width and group size, densely packed.

``config.json`` has ``"quantization_config": {"quant_method": "lrqat", "format_version": 1, ...}``,
and a target's weight becomes:

    codes        (out, ceil(in * bits / 8)) uint8: codes - qmin, rows packed as in
                 quant/packing.py, little-endian
    scale        (out, groups) in the dtype that training rounded it to
    zero_points  (out, ceil(groups * bits / 8)) uint8, packed like the codes; asymmetric grids only
    bits         in the configuration, by module, with the group size and the width ``in``

With ``"experts": E`` it stands for the weights of E experts below one another, under the name of
their parameter (version 7).

The weight is ``scale * (codes - zero_point)`` in float32, on a balanced grid
``scale * (codes + 1/2)``, rounded once to the model's dtype. All other tensors are stored as they
are. The metadata of each file have digests of its tensors and of ``config.json``, as those of
adapters; damage by chance is refused. Who changes a file on purpose calls `sign_model`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..quant.grid import SCALE_DTYPES, Grid
from ..quant.packing import pack, packed_bytes, unpack
from ..shared.names import PACKED_VERSIONS
from .base import ALL_BITS, CONFIG_NAME, DeployedModel, Loaded, SafetensorsFormat
from .linear import QuantizedLinear, Target
from .stored import StoredTensors, build


METHOD = "lrqat"
WHOLE_VERSION, BALANCED_VERSION, EXPERTS_VERSION = PACKED_VERSIONS


class Packed(SafetensorsFormat):
    """For `load_quantized`."""

    name = "packed"
    holds_conv1d = holds_embeddings = True
    experts = "whole"
    balanced_bits = ALL_BITS
    tags = ("packed",)
    checkpoint_names = False
    snippet = """from peft_lrqat.export import load_quantized

model = load_quantized("this folder")"""

    def tensors_of(
        self, linear: QuantizedLinear, activations: Grid | None
    ) -> Iterator[tuple[str, Tensor]]:
        grid = linear.grid
        yield "codes", pack((linear.codes.to(torch.int16) - grid.qmin).to(torch.uint8), grid.bits)
        yield "scale", linear.scale
        if linear.zero_point is not None:
            yield "zero_points", pack(linear.zero_point, grid.bits)

    def stored_bytes(self, target: Target, activations: Grid | None = None) -> int:
        rows, bits, groups = target.out_features, target.grid.bits, target.num_groups
        total = rows * packed_bytes(target.in_features, bits)
        total += rows * groups * SCALE_DTYPES[target.scale_dtype].itemsize
        return total + (0 if target.grid.symmetric else rows * packed_bytes(groups, bits))

    def config_entry(self, model: DeployedModel) -> dict[str, Any]:
        modules = {name: _describe(target) for name, target in model.targets.items()}
        halves = any(target.grid.balanced for target in model.targets.values())
        version = BALANCED_VERSION if halves else WHOLE_VERSION
        if any(target.experts for target in model.targets.values()):
            version = EXPERTS_VERSION
        return {"quant_method": METHOD, "format_version": version, "modules": modules}

    def load(self, path: Path, model_class: type[PreTrainedModel], dtype: torch.dtype) -> Loaded:
        # `problems` says what is damaged, and the comparison where.
        model, report = _load(path, dtype, checked=False)
        return Loaded(model=model, loader="peft_lrqat.export.load_quantized", report=report)


def load_quantized(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that `export_model(..., format="packed")` wrote, with plain weights.

    Args:
        path: the directory of the export.
        dtype: of the weights. By default that of the export, in which they are bit for bit what
            was trained; they are rounded to any other.

    Raises:
        ValueError: the directory is not whole, or not of this format or version.
    """
    return _load(Path(path), dtype)[0]


def _load(
    path: Path, dtype: torch.dtype | None, *, checked: bool = True
) -> tuple[PreTrainedModel, dict[str, Any]]:
    modules = _read_modules(path)
    stored = StoredTensors(path, checked=checked)
    config = AutoConfig.from_pretrained(path)
    # The loaded model has plain weights, which transformers does not count as quantised.
    del config.quantization_config
    if not isinstance(config.dtype, torch.dtype):
        raise ValueError(f"{path / CONFIG_NAME} must name the `dtype` of the weights")
    weights = {}
    for name, fields in modules.items():
        kinds = ("codes", "scale", "zero_points")
        tensors = {kind: stored.take(f"{name}.{kind}") for kind in kinds}
        try:
            key = name if fields.get("experts") else f"{name}.weight"
            weights[key] = _weight(fields, tensors, config.dtype)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{name}` in {path} is damaged: {error}") from None
    return build(path, config, weights, stored, config.dtype if dtype is None else dtype)


def _describe(target: Target) -> dict[str, Any]:
    """What the configuration says of a weight."""
    special: dict[str, Any] = {"embedding": True} if target.is_embedding else {}
    special |= {"balanced": True} if target.grid.balanced else {}
    special |= {"k_quant": True} if target.grid.k_quant else {}
    special |= {"experts": target.experts} if target.experts else {}
    return special | {
        "bits": target.grid.bits,
        "symmetric": target.grid.symmetric,
        "group_size": target.grid.group_size,
        "shape": [target.out_features, target.in_features],
        "scale_dtype": target.scale_dtype,
        "transposed": target.is_conv1d,
    }


def _read_modules(path: Path) -> dict[str, dict[str, Any]]:
    """What the configuration says of each quantised weight."""
    try:
        written = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        quantization = written["quantization_config"]
        keys = ("quant_method", "format_version", "modules")
        method, version, modules = (quantization[key] for key in keys)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no model that `export_model(..., format='packed')` wrote ({error!r})"
        ) from error
    if method != METHOD:
        raise ValueError(
            f"the model in {path} is quantised by {method}; load it with"
            " `AutoModelForCausalLM.from_pretrained`"
        )
    if version not in PACKED_VERSIONS:
        raise ValueError(
            f"{path} is of version {version!r} of the format, but this peft_lrqat reads"
            f" {', '.join(map(str, PACKED_VERSIONS))}; run `pip install -U peft-lrqat`"
        )
    if not isinstance(modules, dict):
        raise ValueError(f"`modules` in {path / CONFIG_NAME} must be an object, but is {modules!r}")
    return modules


def _weight(
    fields: dict[str, Any], tensors: dict[str, Tensor | None], dtype: torch.dtype
) -> Tensor:
    """The weight of one module in its own layout; ValueError where a tensor does not fit."""
    names = ("bits", "symmetric", "group_size")
    grid = Grid(**{n: fields[n] for n in names}, balanced=fields.get("balanced", False))
    rows, columns = fields["shape"]
    groups = grid.num_groups(columns)
    wanted = {
        "codes": ((rows, packed_bytes(columns, grid.bits)), torch.uint8),
        "scale": ((rows, groups), SCALE_DTYPES[fields["scale_dtype"]]),
        "zero_points": ((rows, packed_bytes(groups, grid.bits)), torch.uint8),
    }
    found: dict[str, Tensor] = {}
    for kind, (shape, kind_dtype) in wanted.items():
        tensor = tensors[kind]
        if kind == "zero_points" and grid.symmetric:
            if tensor is not None:
                raise ValueError("zero_points are stored, but a symmetric grid has none")
            continue
        if tensor is None:
            raise ValueError(f"the {kind} are missing")
        if tensor.shape != shape or tensor.dtype != kind_dtype:
            raise ValueError(
                f"the {kind} must be {shape} of {kind_dtype}, but are {tuple(tensor.shape)} of"
                f" {tensor.dtype}"
            )
        found[kind] = tensor
    scale = found["scale"].float()
    if not torch.isfinite(scale).all() or not (scale > 0).all():
        raise ValueError("scales must be finite and above 0")
    codes = unpack(found["codes"], grid.bits, columns).float() + grid.qmin
    zero_point = None if grid.symmetric else unpack(found["zero_points"], grid.bits, groups)
    weight = grid.values(codes, scale, zero_point).to(dtype)
    if experts := fields.get("experts"):
        weight = weight.unflatten(0, (experts, -1))
    return weight.mT if fields["transposed"] else weight
