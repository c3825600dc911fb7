"""The formats of compressed-tensors that vLLM and transformers load; that library packs, too.

``pack-quantized`` holds weights alone. Where inputs are rounded as well, it is ``int-quantized``:
one int8 for each integer of any width, which is how vLLM reads weights for its kernels of 4 and 8
bits with 8-bit activations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.utils import logging

from ..quant.grid import Grid
from .base import (
    CONFIG_NAME,
    DeployedModel,
    Loaded,
    Outline,
    SafetensorsFormat,
    from_pretrained,
)
from .linear import QuantizedLinear, Target


logger = logging.get_logger(__name__)
EXPERT = re.compile(r"\.experts\.\d+\.")
INSTALL = (
    "writing compressed-tensors needs the package of that name; run"
    " `pip install 'peft-lrqat[export]'`"
)


class CompressedTensors(SafetensorsFormat):
    """For vLLM and transformers."""

    name = "compressed-tensors"
    experts = "apart"
    # The loader computes in the model's dtype and rounds scales to it.
    scale_dtypes = ("bfloat16", "float16")
    tags = ("compressed-tensors",)
    snippet = """from transformers import {auto_class}

# Needs `pip install compressed-tensors`.
model = {auto_class}.from_pretrained("this repository or folder")"""
    # transformers loads zero points in this way only, and T5's layers, whose weights are read
    # before the first forward pass makes them.
    plain_snippet = """from transformers import {auto_class}, CompressedTensorsConfig

# Needs `pip install compressed-tensors`.
model = {auto_class}.from_pretrained(
    "this repository or folder", quantization_config=CompressedTensorsConfig(dequantize=True)
)"""

    def code(self, auto_class: str, symmetric: bool) -> str:
        plain = not symmetric or auto_class == "AutoModelForSeq2SeqLM"
        snippet = self.plain_snippet if plain else self.snippet
        return snippet.format(auto_class=auto_class)

    def why_not_inputs(self, grid: Grid, activations: Grid, name: str) -> str | None:
        if activations.bits != 8:
            return (
                f"{name} is written for inputs of 8 bits, which vLLM has kernels for, but"
                f" `activation_bits` is {activations.bits}"
            )
        per_row = grid.bits == 8 and grid.group_size == -1
        if grid.symmetric and (grid.bits == 4 or per_row):
            return None
        return (
            f"{name} holds 8-bit inputs beside symmetric weights of 4 bits, or of 8 bits with one"
            f" scale per row, which vLLM has kernels for, but these weights are {grid.kind},"
            f" {grid.bits} bits, group size {grid.group_size}"
        )

    def check(self, model: Outline) -> None:
        schemes = {_scheme(target) for target in model.targets.values()}
        if len(schemes) > 1 and not all(symmetric for _, symmetric, _ in schemes):
            raise ValueError(
                "transformers loads asymmetric compressed-tensors of one width and group size"
                " only, but this model has several; export it as 'packed' or 'dequantized', or"
                " train with symmetric=True"
            )

        inside = {
            _scheme(target)
            for name, target in model.targets.items()
            if target.experts or EXPERT.search(name)
        }
        plain = [name for name in model.plain_linears() if EXPERT.search(name)]
        several = len(inside) > 1 or len({bits for bits, _, _ in schemes}) > 1
        if inside and (plain or several):
            what = "they have several widths or group sizes"
            what = f"`{plain[0]}` stays plain" if plain else what
            raise ValueError(
                "transformers loads low-bit experts from compressed-tensors only where all of them"
                f" are low-bit, with one group size and the width of all layers, but {what}; export"
                " it as 'packed' or 'dequantized', or train all layers with the same settings"
            )
        if plain:
            logger.warning(
                f"`{plain[0]}` and other experts stay plain: vLLM loads them beside low-bit"
                " layers, but transformers 5.23 does not"
            )

    def tensors_of(
        self, linear: QuantizedLinear, activations: Grid | None
    ) -> Iterator[tuple[str, Tensor]]:
        if activations is not None:
            yield "weight", linear.codes.to(torch.int8)
            yield "weight_scale", linear.scale_as(linear.dtype)
            return
        try:
            from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
        except ImportError as error:
            raise ImportError(INSTALL) from error
        bits = linear.grid.bits
        # The library's grids are signed: an asymmetric one is moved down by half its length.
        middle = 0 if linear.grid.symmetric else 2 ** (bits - 1)
        codes = (linear.codes.to(torch.int16) - middle).to(torch.int8)
        yield "weight_packed", pack_to_int32(codes, bits)
        yield "weight_scale", linear.scale_as(linear.dtype)
        if linear.zero_point is not None:
            zero_point = (linear.zero_point.to(torch.int16) - middle).to(torch.int8)
            yield "weight_zero_point", pack_to_int32(zero_point, bits, packed_dim=0).contiguous()
        yield "weight_shape", torch.tensor(linear.codes.shape)

    def stored_bytes(self, target: Target, activations: Grid | None = None) -> int:
        scales = target.out_features * target.num_groups * target.dtype.itemsize
        if activations is not None:
            return target.num_weights + scales
        words = target.out_features * -(-target.in_features * target.grid.bits // 32)
        if not target.grid.symmetric:
            words += target.num_groups * -(-target.out_features * target.grid.bits // 32)
        return 4 * words + scales + 16  # of the shape

    def config_entry(self, model: DeployedModel) -> dict[str, Any]:
        try:
            from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
        except ImportError as error:
            raise ImportError(INSTALL) from error

        groups: dict[tuple[int, bool, int], list[str]] = {}
        for name, target in model.targets.items():
            groups.setdefault(_scheme(target), []).append(name)
        format = "pack-quantized" if model.activations is None else "int-quantized"
        schemes = {
            f"group_{number}": QuantizationScheme(
                # Names only where they are needed: more runtimes read "Linear".
                targets=["Linear"] if len(groups) == 1 else names,
                weights=_weight_args(*scheme),
                input_activations=_input_args(model.activations),
                format=format,
            )
            for number, (scheme, names) in enumerate(groups.items())
        }
        config = QuantizationConfig(
            config_groups=schemes,
            format=format,
            quantization_status="compressed",
            ignore=list(model.plain_linears()),
        )
        return config.model_dump(mode="json", exclude_none=True)

    def load(self, path: Path, model_class: type[PreTrainedModel], dtype: torch.dtype) -> Loaded:
        written = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        entry = written["quantization_config"]
        options = {}
        symmetric = all(group["weights"]["symmetric"] for group in entry["config_groups"].values())
        if not symmetric or written.get("is_encoder_decoder"):
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        loader = f"transformers ({self.name})"
        try:
            return from_pretrained(path, model_class, dtype, loader, **options)
        except AttributeError:
            if options:
                raise
            # The code of Falcon and Mamba initialises weights that packed layers do not have yet.
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
            loader += ", dequantize=True"
            return from_pretrained(path, model_class, dtype, loader, **options)
        except RuntimeError:
            if options:
                raise
            # transformers 5.23 takes all experts of a checkpoint for quantised ones.
            with _experts_as_stored():
                loader += ", experts read as they are stored"
                return from_pretrained(path, model_class, dtype, loader)


@contextmanager
def _experts_as_stored() -> Iterator[None]:
    """Lets transformers read plain experts beside quantised layers; runtimes such as vLLM do."""
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    inherited = CompressedTensorsHfQuantizer.get_load_operations
    setattr(CompressedTensorsHfQuantizer, "get_load_operations", lambda self: {})  # noqa: B010
    try:
        yield
    finally:
        setattr(CompressedTensorsHfQuantizer, "get_load_operations", inherited)  # noqa: B010


def _scheme(target: Target) -> tuple[int, bool, int]:
    """What layers of one group have in common: bits, symmetric, group size."""
    return target.grid.bits, target.grid.symmetric, target.group_size


def _weight_args(bits: int, symmetric: bool, group_size: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )


def _input_args(activations: Grid | None) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    if activations is None:
        return None
    return QuantizationArgs(
        num_bits=activations.bits,
        type="int",
        symmetric=activations.symmetric,
        strategy="token",
        dynamic=True,
    )
