"""The packed layers that transformers itself runs (`quant_method: gemma`, from release 5.23).

Integers stay packed in memory, and each layer unpacks its own at every call. Any architecture whose
layers are `nn.Linear` is loaded, not Gemma alone.

    M.weight         2 and 4 bits: (out, in / 4 or in / 2) uint8 of unsigned integers, the first in
                     the lowest bits; 8 bits: (out, in) int8
    M.weight_scale   (out, 1) float32
    M.input_activation_scale, M.output_activation_scale   0: inputs and outputs are not rounded
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..quant.grid import Grid
from ..quant.packing import pack
from .base import DeployedModel, Outline, SafetensorsFormat
from .linear import QuantizedLinear, Target


# Bits of integers, and of the container they are stored in.
CONTAINERS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}

# Of a model's class: its loader leaves these modules alone.
KEPT = "_keep_in_fp32_modules"


class Gemma(SafetensorsFormat):
    """For transformers, with integers that stay packed in memory."""

    name = "gemma"
    symmetric_bits = (2, 4, 8)
    asymmetric_bits = ()
    # The layers compute in the model's dtype and round scales to it.
    scale_dtypes = ("bfloat16", "float16")
    tags = ("gemma-quant",)
    snippet = """from transformers import {auto_class}

# Needs transformers 5.23 or later; the integers stay packed in memory.
model = {auto_class}.from_pretrained("this repository or folder")"""

    def why_not(
        self, grid: Grid, scale_dtype: str, in_features: int | None = None, is_conv1d: bool = False
    ) -> str | None:
        if not grid.symmetric:
            return f"{self.name} holds weights without zero points only; train with symmetric=True"
        if grid.group_size not in (-1, in_features):
            return (
                f"{self.name} holds one scale per row (group_size=-1), but `group_size` is "
                f"{grid.group_size}"
            )
        return super().why_not(grid, scale_dtype, in_features, is_conv1d)

    def stored_grid(self, grid: Grid, bits: int | None = None) -> Grid:
        stored = super().stored_grid(grid, bits)
        if not stored.symmetric or bits is not None:
            return stored
        return replace(stored, bits=CONTAINERS[stored.bits])

    def tensors_of(
        self, linear: QuantizedLinear, activations: Grid | None
    ) -> Iterator[tuple[str, Tensor]]:
        bits = linear.grid.bits
        codes = linear.codes.to(torch.int8)
        if bits < 8:
            unsigned = (codes - linear.grid.qmin).to(torch.uint8)
            yield "weight", pack(unsigned, bits)
        else:
            yield "weight", codes
        yield "weight_scale", linear.scale_as(linear.dtype).float()
        for name in ("input_activation_scale", "output_activation_scale"):
            yield name, torch.zeros(())

    def stored_bytes(self, target: Target, activations: Grid | None = None) -> int:
        bits = target.grid.bits
        row = -(-target.in_features * bits // 8)
        return target.out_features * (row + 4) + 8

    def check(self, model: Outline) -> None:
        for architecture in model.config.architectures or ():
            kept = getattr(getattr(transformers, architecture, None), KEPT, None)
            for name in model.targets:
                if kept and not should_convert_module(name, list(kept)):
                    raise ValueError(
                        f"`{name}`: transformers keeps this layer of a {architecture} in float32 "
                        f"when it loads the {self.name} format; leave it out of `target_modules`, "
                        "or export another format"
                    )

    def config_entry(self, model: DeployedModel) -> dict[str, Any]:
        bits = {name: target.grid.bits for name, target in model.targets.items()}
        ((most, _),) = Counter(bits.values()).most_common(1)
        return {
            "quant_method": "gemma",
            "num_bits": most,
            "quantize_embeddings": False,
            "module_quant_configs": {
                f"^{re.escape(name)}$": {"num_bits": width}
                for name, width in bits.items()
                if width != most
            },
            "modules_to_not_convert": list(model.plain_linears()),
        }

    def unpack(self, model: PreTrainedModel) -> None:
        from transformers.integrations.gemma_quant import QuantizedLinear as PackedLinear

        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                weight = module._dequantize_weights(model.dtype)
                rows, columns = weight.shape
                plain = nn.Linear(columns, rows, bias=False, device="meta")
                plain.weight, plain.bias = nn.Parameter(weight), module.bias
                model.set_submodule(name, plain)
