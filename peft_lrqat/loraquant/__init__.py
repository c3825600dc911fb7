"""LORAQUANT as a PEFT adapter type: LoRA at a few bits (LoRAQuant, arXiv 2510.26690)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LoRAQuantConfig
from .layer import LoRAQuantEmbedding, LoRAQuantLayer, LoRAQuantLinear
from .model import LoRAQuantModel


if TYPE_CHECKING:
    from .convert import dequantize_adapter, quantize_adapter

__all__ = [
    "LoRAQuantConfig",
    "LoRAQuantEmbedding",
    "LoRAQuantLayer",
    "LoRAQuantLinear",
    "LoRAQuantModel",
    "dequantize_adapter",
    "quantize_adapter",
]


def __getattr__(name: str) -> Any:
    # Conversion is imported when it is first asked for: loading an adapter needs none of it.
    if name in ("dequantize_adapter", "quantize_adapter"):
        return getattr(import_module(".convert", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
