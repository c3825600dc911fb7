"""The GPTQ layout, version 1: integers packed along the inputs, zero points stored less one, scales in float16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .compressed_tensors import exact_scale
from .linears import QuantizedLinear


def tensors_of(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    """qweight (in * bits / 32, out), qzeros (groups, out * bits / 32), scales (groups, out), g_idx (in,).

    A word of 32 bits holds 32 / bits neighbours, the first in its lowest bits.
    """
    bits = linear.grid.bits
    middle = 2 ** (bits - 1)
    out_features, in_features = linear.codes.shape
    if out_features * bits % 32:
        raise ValueError(
            f"GPTQ packs the outputs' zero points into words of {32 // bits}, but `{linear.name}` has {out_features} outputs; use "
            "another format"
        )
    yield "qweight", _words((linear.codes.to(torch.int64) + middle).T, bits)
    groups = linear.scale.shape[1]
    zeros = torch.full((groups, out_features), middle - 1)
    yield "qzeros", _words(zeros.T, bits).T.contiguous()
    yield "scales", exact_scale(linear, torch.float16).T.contiguous()
    yield "g_idx", (torch.arange(in_features) // linear.group_size).to(torch.int32)


def _words(values: Tensor, bits: int) -> Tensor:
    """(n, columns) -> (n * bits / 32, columns) int32."""
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits, device=values.device)[:, None]
    words = (values.unflatten(0, (-1, per_word)) << shifts).sum(1)
    # The highest bit is the sign of an int32.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def quantization_config(bits: int, group_size: int, skipped: list[str]) -> dict[str, Any]:
    """The entry of config.json; of one width and group size for the whole model, as the layout has it."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "modules_in_block_to_quantize": None,
        "modules_to_not_convert": skipped,
    }


def read_weight(path: Path, name: str, dtype: torch.dtype) -> Tensor:
    """The weight of one module in an exported directory, (out, in) in ``dtype``, read by the layout's definition."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in set(stored.keys()) & {f"{name}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx")}:
                tensors[key.removeprefix(f"{name}.")] = stored.get_tensor(key)
    scale = tensors["scales"].float()
    bits = 32 * len(tensors["qweight"]) // len(tensors["g_idx"])
    codes = _unworded(tensors["qweight"], bits)
    zeros = _unworded(tensors["qzeros"].T, bits).T + 1
    groups = tensors["g_idx"].long()
    return ((codes - zeros[groups]) * scale[groups]).T.to(dtype)


def _unworded(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_words`, int64."""
    shifts = torch.arange(0, 32, bits)[:, None]
    return ((words.long()[:, None] >> shifts) & (2**bits - 1)).flatten(0, 1)
