"""This package's own format: integers of any width and group size, densely packed; `load_quantized` reads it.

``config.json`` has ``"quantization_config": {"quant_method": "lrqat", "format_version": 1, ...}``, and a target's weight becomes:

    codes        (out, ceil(in * bits / 8)) uint8: codes - qmin, rows packed as in quant/packing.py, little-endian
    scale        (out, groups) in the dtype that training rounded it to
    zero_points  (out, ceil(groups * bits / 8)) uint8, packed like the codes; only on asymmetric grids
    bits         in the configuration, by module, with the group size and the width ``in``

and the weight is ``scale * (codes - zero_point)`` in float32, rounded once to the model's dtype. All else is stored as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..quant.grid import SCALE_DTYPES, Grid
from ..quant.packing import pack, packed_bytes, unpack
from .linears import QuantizedLinear


METHOD, FORMAT_VERSION = "lrqat", 1
CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)


def tensors_of(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    """What is stored of a weight."""
    grid = linear.grid
    yield "codes", pack((linear.codes.to(torch.int16) - grid.qmin).to(torch.uint8), grid.bits)
    yield "scale", linear.scale
    if linear.zero_point is not None:
        yield "zero_points", pack(linear.zero_point, grid.bits)


def describe(linear: QuantizedLinear) -> dict[str, Any]:
    """What the configuration says of a weight."""
    return {
        "bits": linear.grid.bits,
        "symmetric": linear.grid.symmetric,
        "group_size": linear.grid.group_size,
        "shape": list(linear.codes.shape),
        "scale_dtype": str(linear.scale.dtype).removeprefix("torch."),
        "transposed": linear.is_conv1d,
    }


def quantization_config(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The entry of config.json."""
    return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": modules}


def load_quantized(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that `export_model(..., format="packed")` wrote, with plain weights ``scale * (codes - zero_point)``.

    ``dtype`` left out: that of the export, in which the weights are bit for bit what was trained; another one is rounded to.
    ValueError for a directory that is not whole or not of this format or version.
    """
    path = Path(path)
    config, modules = _read_config(path)
    model_class = _model_class(config)
    dtype = config.dtype if dtype is None else dtype
    state = {}
    stored = _Stored(path)
    for name, fields in modules.items():
        tensors = {
            kind: stored.take(f"{name}.{kind}") for kind in ("codes", "scale", "zero_points")
        }
        try:
            weight = _weight(fields, tensors, config.dtype)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`{name}` in {path} is damaged: {error}") from None
        state[f"{name}.weight"] = weight.to(dtype)
    for name in stored.left():
        tensor = stored.take(name)
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    # Through transformers' own loader, which ties, initialises buffers and reports what is missing.
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        wrong = sorted(
            map(
                str,
                {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]},
            )
        )
        raise ValueError(
            f"the weights in {path} do not fit its {CONFIG_NAME}: {', '.join(wrong[:3])}"
        )
    return model.eval()


def _read_config(path: Path) -> tuple[PretrainedConfig, dict[str, dict[str, Any]]]:
    try:
        written = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        quantization = written["quantization_config"]
        method, version, modules = (
            quantization[key] for key in ("quant_method", "format_version", "modules")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no model that `export_model(..., format='packed')` wrote ({error!r})"
        ) from error
    if method != METHOD:
        raise ValueError(
            f"the model in {path} is quantised by {method}; load it with `AutoModelForCausalLM.from_pretrained`"
        )
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is of version {version!r} of the format, but this peft_lrqat reads {FORMAT_VERSION}; run `pip install -U "
            "peft-lrqat`"
        )
    config = AutoConfig.from_pretrained(path)
    # What is loaded is no quantised model of transformers.
    del config.quantization_config
    return config, modules


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"this transformers has no model class {config.architectures}; install the version of the export"
    )


class _Stored:
    """The tensors in the safetensors files of a directory, each read when it is taken."""

    def __init__(self, path: Path) -> None:
        names = [WEIGHTS_NAME]
        try:
            if (path / INDEX_NAME).exists():
                names = sorted(
                    set(
                        json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))[
                            "weight_map"
                        ].values()
                    )
                )
            self._files = [safe_open(path / name, framework="pt") for name in names]
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ValueError(f"the weights in {path} are not whole ({error})") from error
        self._where = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 (no dict)

    def take(self, name: str) -> Tensor | None:
        """A tensor, once; None where there is none."""
        file = self._where.pop(name, None)
        return None if file is None else file.get_tensor(name)

    def left(self) -> list[str]:
        return sorted(self._where)


def _weight(
    fields: dict[str, Any], tensors: dict[str, Tensor | None], dtype: torch.dtype
) -> Tensor:
    grid = Grid(bits=fields["bits"], symmetric=fields["symmetric"], group_size=fields["group_size"])
    rows, columns = fields["shape"]
    groups = grid.num_groups(columns)
    wanted = {
        "codes": ((rows, packed_bytes(columns, grid.bits)), torch.uint8),
        "scale": ((rows, groups), SCALE_DTYPES[fields["scale_dtype"]]),
        "zero_points": ((rows, packed_bytes(groups, grid.bits)), torch.uint8),
    }
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
                f"the {kind} must be {shape} of {kind_dtype}, but are {tuple(tensor.shape)} of {tensor.dtype}"
            )
    scale = tensors["scale"].float()
    if not torch.isfinite(scale).all() or not (scale > 0).all():
        raise ValueError("scales must be finite and above 0")
    codes = unpack(tensors["codes"], grid.bits, columns).float() + grid.qmin
    zero_point = None if grid.symmetric else unpack(tensors["zero_points"], grid.bits, groups)
    weight = grid.values(codes, scale, zero_point).to(dtype)
    return weight.T if fields["transposed"] else weight
