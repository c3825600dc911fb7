"""LORAQUANT, LoRA adapters stored at a few bits (LoRAQuant, arXiv 2510.26690), as a PEFT adapter type."""

from .config import LoRAQuantConfig
from .convert import dequantize_adapter, quantize_adapter
from .layer import LoRAQuantEmbedding, LoRAQuantLayer, LoRAQuantLinear
from .model import LoRAQuantModel


__all__ = [
    "LoRAQuantConfig",
    "LoRAQuantEmbedding",
    "LoRAQuantLayer",
    "LoRAQuantLinear",
    "LoRAQuantModel",
    "dequantize_adapter",
    "quantize_adapter",
]
