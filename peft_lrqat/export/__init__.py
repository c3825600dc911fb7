"""LR-QAT models in the formats that runtimes load; the export changes no weight."""

from ..formats.packed import load_quantized
from .exporter import export_model
from .verify import verify_export


__all__ = ["export_model", "load_quantized", "verify_export"]
