"""Plain weights in the dtype of the model, which everything loads: no integers, no saving."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..quant.grid import Grid
from .base import ALL_BITS, SafetensorsFormat
from .linear import QuantizedLinear, Target


class Dequantized(SafetensorsFormat):
    """The weights that the model computes with."""

    name = "dequantized"
    holds_conv1d = holds_embeddings = True
    experts = "plain"
    balanced_bits = ALL_BITS
    is_small = False
    snippet = """from transformers import {auto_class}

model = {auto_class}.from_pretrained("this repository or folder")"""

    def tensors_of(
        self, linear: QuantizedLinear, activations: Grid | None
    ) -> Iterator[tuple[str, Tensor]]:
        yield "weight", linear.parameter

    def stored_bytes(self, target: Target, activations: Grid | None = None) -> int:
        return target.num_weights * target.dtype.itemsize
