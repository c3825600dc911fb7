"""LORAQUANT as a PEFT adapter type: LoRA at a few bits (LoRAQuant, arXiv 2510.26690)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import LoRAQuantConfig
from .layer import LoRAQuantEmbedding, LoRAQuantLayer, LoRAQuantLinear
from .model import LoRAQuantModel


if TYPE_CHECKING:
    from .convert import dequantize_adapter, quantize_adapter
    from .gguf import adapter_to_gguf

# Imported when they are first asked for: loading an adapter needs none of them.
LATER = {
    "adapter_to_gguf": ".gguf",
    "dequantize_adapter": ".convert",
    "quantize_adapter": ".convert",
}

__all__ = [
    "LoRAQuantConfig",
    "LoRAQuantEmbedding",
    "LoRAQuantLayer",
    "LoRAQuantLinear",
    "LoRAQuantModel",
    "adapter_to_gguf",
    "dequantize_adapter",
    "quantize_adapter",
]


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
