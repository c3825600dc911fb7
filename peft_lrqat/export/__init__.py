"""LR-QAT models in the formats that runtimes load; not one weight is changed on the way."""

from .exporter import export_model
from .packed import load_quantized
from .verify import verify_export


__all__ = ["export_model", "load_quantized", "verify_export"]
