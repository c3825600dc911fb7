"""The GPTQ layout, version 1: integers packed along the inputs, zero points stored minus one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from ..quant.grid import Grid
from ..quant.packing import pack, unpack
from .base import DeployedModel, Loaded, Outline, SafetensorsFormat
from .linear import QuantizedLinear, Target
from .stored import StoredTensors, build


class Gptq(SafetensorsFormat):
    """For servers that read GPTQ; scales in float16."""

    name = "gptq"
    symmetric_bits = asymmetric_bits = (2, 3, 4, 8)
    group_multiple = 32
    scale_dtypes = ("bfloat16", "float16")
    tags = ("gptq",)
    snippet = """from transformers import {auto_class}

# Needs a GPTQ backend such as gptqmodel.
model = {auto_class}.from_pretrained("this repository or folder")"""

    def why_not_target(self, target: Target) -> str | None:
        if target.out_features * target.grid.bits % 32 and not target.experts:
            return (
                "gptq packs the zero points of all outputs into words of 32 bits, but the"
                f" {target.out_features} zero points of {target.grid.bits} bits do not fill whole"
                " words; use another format"
            )
        return super().why_not_target(target)

    def check(self, model: Outline) -> None:
        kinds = {(target.grid.bits, target.group_size) for target in model.targets.values()}
        if len(kinds) > 1:
            raise ValueError(
                "gptq has one width and group size for the whole model, but this one has"
                f" {sorted(kinds)}"
            )

    def tensors_of(
        self, linear: QuantizedLinear, activations: Grid | None
    ) -> Iterator[tuple[str, Tensor]]:
        """qweight (in * bits / 32, out), qzeros (groups, out * bits / 32), scales, g_idx (in,).

        ``scales`` is (groups, out).
        """
        grid, in_features = linear.grid, linear.codes.shape[1]
        codes = linear.codes.to(torch.int16) - grid.qmin
        zero_point = linear.zero_point
        if zero_point is None:
            zero_point = codes.new_full(linear.scale.shape, -grid.qmin)
        if not zero_point.all():
            # Stored minus one it would be -1, which some readers take for the highest integer and
            # some for 0.
            raise ValueError(
                f"{int((zero_point == 0).sum())} groups of `{linear.name}` have the zero point 0,"
                " which GPTQ v1 cannot store; use another format, or train with symmetric=True"
            )
        yield "qweight", _words(codes, grid.bits).T.contiguous()
        yield "qzeros", _words(zero_point.T.to(torch.int16) - 1, grid.bits)
        yield "scales", linear.scale_as(torch.float16).T.contiguous()
        yield "g_idx", (torch.arange(in_features) // linear.group_size).to(torch.int32)

    def stored_bytes(self, target: Target, activations: Grid | None = None) -> int:
        bits = (target.num_weights + target.out_features * target.num_groups) * target.grid.bits
        return bits // 8 + target.scale_bytes + 4 * target.in_features

    def config_entry(self, model: DeployedModel) -> dict[str, Any]:
        target = next(iter(model.targets.values()))
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": target.grid.bits,
            "group_size": target.group_size,
            "sym": target.grid.symmetric,
            "desc_act": False,
            "modules_in_block_to_quantize": None,
            "modules_to_not_convert": list(model.plain_linears()),
        }

    def load(self, path: Path, model_class: type[PreTrainedModel], dtype: torch.dtype) -> Loaded:
        """The plain model, by the layout's definition: no reader is installed with this package."""
        stored = StoredTensors(path, checked=False)
        config = AutoConfig.from_pretrained(path)
        del config.quantization_config
        weights = {}
        for key in stored.left():
            name, _, kind = key.rpartition(".")
            if kind == "qweight":
                kinds = ("qweight", "qzeros", "scales", "g_idx")
                tensors = {kind: stored.take(f"{name}.{kind}") for kind in kinds}
                if lacking := [kind for kind, tensor in tensors.items() if tensor is None]:
                    raise ValueError(f"`{name}` in {path} has no {lacking[0]}")
                weights[f"{name}.weight"] = _weight(tensors, dtype)
        model, report = build(path, config, weights, stored, dtype)
        return Loaded(model=model, loader="this package", report=report)


def _words(values: Tensor, bits: int) -> Tensor:
    """(rows, n) -> (rows, n * bits / 32) int32: dense and little-endian; 3 bits cross words."""
    return pack(values.to(torch.uint8), bits).view(torch.int32)


def _unworded(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`, int16."""
    count = 32 * words.shape[1] // bits
    return unpack(words.contiguous().view(torch.uint8), bits, count).to(torch.int16)


def _weight(tensors: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The weight of one module, (out, in) in ``dtype``."""
    scale, groups = tensors["scales"].float(), tensors["g_idx"].long()
    bits = 32 * len(tensors["qweight"]) // len(groups)
    codes = _unworded(tensors["qweight"].T, bits).T
    zeros = _unworded(tensors["qzeros"], bits) + 1
    return ((codes - zeros[groups]) * scale[groups]).T.to(dtype)
