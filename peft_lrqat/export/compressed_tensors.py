"""The formats of compressed-tensors that vLLM and transformers load, described by that library, which also packs.

``pack-quantized`` holds weights alone. Where inputs are rounded too, it is ``int-quantized``: one int8 for each integer, of
whatever width, which is how vLLM reads weights for its kernels of 4 and 8 bits with 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..quant.grid import Grid
from .linears import QuantizedLinear


INSTALL = "writing compressed-tensors needs the package of that name; run `pip install 'peft-lrqat[export]'`"


def tensors_of(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    """What is stored of a weight. The library's grids are signed: an asymmetric one is moved down by half its length."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError as error:
        raise ImportError(INSTALL) from error
    bits = linear.grid.bits
    middle = 0 if linear.grid.symmetric else 2 ** (bits - 1)
    yield (
        "weight_packed",
        pack_to_int32((linear.codes.to(torch.int16) - middle).to(torch.int8), bits),
    )
    yield "weight_scale", exact_scale(linear, linear.dtype)
    if linear.zero_point is not None:
        zero_point = (linear.zero_point.to(torch.int16) - middle).to(torch.int8)
        yield "weight_zero_point", pack_to_int32(zero_point, bits, packed_dim=0).contiguous()
    yield "weight_shape", torch.tensor(linear.codes.shape)


def integer_tensors_of(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    """What ``int-quantized`` stores of a weight on a symmetric grid."""
    yield "weight", linear.codes.to(torch.int8)
    yield "weight_scale", exact_scale(linear, linear.dtype)


def exact_scale(linear: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The scales in another dtype; ValueError where it cannot hold them."""
    scale = linear.scale.to(dtype)
    if not torch.equal(scale.double(), linear.scale.double()):
        lost = linear.scale.double() != scale.double()
        worst = float(linear.scale.double()[lost].abs().min())
        raise ValueError(
            f"{int(lost.sum())} of {lost.numel()} scales of `{linear.name}` (such as {worst:.3g}) are no numbers of {dtype}, in "
            "which this format keeps them; export in another format, or train in bfloat16 with scale_dtype='bfloat16'"
        )
    return scale


def quantization_config(
    linears: dict[str, dict[str, Any]], ignore: list[str], activations: Grid | None = None
) -> dict[str, Any]:
    """The entry of config.json. ``linears``: by module name, what `describe` says; ``ignore``: the other linear layers."""
    try:
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
        )
    except ImportError as error:
        raise ImportError(INSTALL) from error

    format, inputs = "pack-quantized", None
    if activations is not None:
        format = "int-quantized"
        inputs = QuantizationArgs(
            num_bits=activations.bits,
            type="int",
            symmetric=activations.symmetric,
            strategy="token",
            dynamic=True,
        )

    groups: dict[tuple, list[str]] = {}
    for name, fields in linears.items():
        groups.setdefault(tuple(fields.items()), []).append(name)
    schemes = {}
    for number, (fields, names) in enumerate(groups.items()):
        fields = dict(fields)
        # Names only where they are needed: those who read "Linear" include more runtimes.
        targets = ["Linear"] if len(groups) == 1 else names
        schemes[f"group_{number}"] = QuantizationScheme(
            targets=targets,
            weights=QuantizationArgs(
                num_bits=fields["bits"],
                type="int",
                symmetric=fields["symmetric"],
                strategy="channel" if fields["group_size"] == -1 else "group",
                group_size=None if fields["group_size"] == -1 else fields["group_size"],
            ),
            input_activations=inputs,
            format=format,
        )
    config = QuantizationConfig(
        config_groups=schemes, format=format, quantization_status="compressed", ignore=ignore
    )
    return config.model_dump(mode="json", exclude_none=True)


def describe(linear: QuantizedLinear) -> dict[str, Any]:
    """What layers of one scheme have in common."""
    grid = linear.grid
    group_size = -1 if linear.scale.shape[1] == 1 else linear.group_size
    return {"bits": grid.bits, "symmetric": grid.symmetric, "group_size": group_size}
