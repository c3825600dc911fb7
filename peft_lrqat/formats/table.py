"""The table of formats: what `export_model`, `verify_export` and the command line offer."""

from __future__ import annotations

from collections.abc import Sequence

from ..quant.grid import Grid
from ..shared.checks import check_choice
from .base import Format
from .compressed_tensors import CompressedTensors
from .dequantized import Dequantized
from .gemma import Gemma
from .gguf import Gguf
from .gptq import Gptq
from .linear import Target
from .packed import Packed
from .sizes import stored_bytes


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (CompressedTensors(), Gguf(), Gptq(), Gemma(), Packed(), Dequantized())
}


def bytes_by_format(
    targets: Sequence[Target], activations: Grid | None = None, kv_cache: Grid | None = None
) -> dict[str, int | str]:
    """Bytes of some targets in the files of each format, or why it cannot hold one of them.

    A format that cannot say how inputs are rounded may still hold the weights alone.
    """
    found: dict[str, int | str] = {}
    for name, format in FORMATS.items():
        reasons = (format.why_not_target(target) for target in targets)
        if (reason := next((r for r in reasons if r is not None), None)) is not None:
            found[name] = reason
            continue
        silent = format.why_not_activations(targets[0].grid, activations, kv_cache) is not None
        found[name] = stored_bytes(targets, format, None if silent else activations)
    return found


def format_named(name: str) -> Format:
    """A format by its name; ValueError names the known ones."""
    check_choice("format", name, FORMATS)
    return FORMATS[name]
