"""The table of formats: what `export_model`, `verify_export` and the command line offer."""

from __future__ import annotations

from ..shared.checks import check_choice
from .base import Format
from .compressed_tensors import CompressedTensors
from .dequantized import Dequantized
from .gguf import Gguf
from .gptq import Gptq
from .packed import Packed


FORMATS: dict[str, Format] = {
    format.name: format for format in (CompressedTensors(), Gguf(), Gptq(), Packed(), Dequantized())
}


def format_named(name: str) -> Format:
    """A format by its name; ValueError names the known ones."""
    check_choice("format", name, FORMATS)
    return FORMATS[name]
