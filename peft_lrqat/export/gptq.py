"""The GPTQ layout, version 1: integers packed along the inputs, zero points stored less one, scales in float16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..quant.packing import pack, unpack
from .compressed_tensors import exact_scale
from .linears import QuantizedLinear


def tensors_of(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    """qweight (in * bits / 32, out), qzeros (groups, out * bits / 32), scales (groups, out), g_idx (in,)."""
    grid, (out_features, in_features) = linear.grid, linear.codes.shape
    if out_features * grid.bits % 32:
        raise ValueError(
            f"GPTQ packs the zero points of the outputs into words of 32 bits, which {out_features} times {grid.bits} bits of "
            f"`{linear.name}` do not fill; use another format"
        )
    codes = linear.codes.to(torch.int16) - grid.qmin
    zero_point = linear.zero_point
    if zero_point is None:
        zero_point = codes.new_full(linear.scale.shape, -grid.qmin)
    if not zero_point.all():
        # Stored less one it would be -1, which readers take for the highest integer or for 0, as they like.
        raise ValueError(
            f"{int((zero_point == 0).sum())} groups of `{linear.name}` have the zero point 0, for which GPTQ v1 has no place; use "
            "another format, or train with symmetric=True"
        )
    yield "qweight", _words(codes, grid.bits).T.contiguous()
    yield "qzeros", _words(zero_point.T.to(torch.int16) - 1, grid.bits)
    yield "scales", exact_scale(linear, torch.float16).T.contiguous()
    yield "g_idx", (torch.arange(in_features) // linear.group_size).to(torch.int32)


def _words(values: Tensor, bits: int) -> Tensor:
    """(rows, n) -> (rows, n * bits / 32) int32: dense and little-endian, 3 bits across words as well."""
    return pack(values.to(torch.uint8), bits).view(torch.int32)


def quantization_config(
    bits: int, group_size: int, symmetric: bool, skipped: list[str]
) -> dict[str, Any]:
    """The entry of config.json; of one width and group size for the whole model, as the layout has it."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "modules_in_block_to_quantize": None,
        "modules_to_not_convert": skipped,
    }


def read_weight(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    """The weight of one module in an exported directory, (out, in) in ``dtype``, read by the layout's definition."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in set(stored.keys()) & {
                f"{name}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx")
            }:
                tensors[key.removeprefix(f"{name}.")] = stored.get_tensor(key)
    scale, groups = tensors["scales"].float(), tensors["g_idx"].long()
    bits = 32 * len(tensors["qweight"]) // len(groups)
    codes = _unworded(tensors["qweight"].T, bits).T
    zeros = _unworded(tensors["qzeros"], bits) + 1
    return ((codes - zeros[groups]) * scale[groups]).T.to(dtype)


def _unworded(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`, int16."""
    return unpack(words.contiguous().view(torch.uint8), bits, 32 * words.shape[1] // bits).to(
        torch.int16
    )
