"""The table of runtimes: which format each loads, and which of its settings each runs."""

from __future__ import annotations

from dataclasses import dataclass

from ..quant.grid import Grid
from ..shared.checks import check_choice
from .base import ALL_BITS, Format, in_words
from .table import FORMATS


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a program runs of the format it loads."""

    name: str
    format: Format
    bits: tuple[int, ...] = ALL_BITS
    asymmetric_bits: tuple[int, ...] = ALL_BITS
    group_sizes: tuple[int, ...] | None = None  # None: all that the format holds; -1: a row
    group_size: int  # the preset

    def why_not(self, grid: Grid, scale_dtype: str) -> str | None:
        """Why the runtime does not run weights on ``grid``, and what it runs; None if it does."""
        if grid.bits not in self.bits:
            return (
                f"{self.name} runs weights of {in_words(self.bits)} bits, but `bits` is {grid.bits}"
            )
        if not grid.symmetric and grid.bits not in self.asymmetric_bits:
            return (
                f"{self.name} runs asymmetric weights of {in_words(self.asymmetric_bits)} bits,"
                f" but `bits` is {grid.bits}; use symmetric=True"
            )
        if self.group_sizes is not None and grid.group_size not in self.group_sizes:
            return (
                f"{self.name} runs group sizes {in_words(self.group_sizes)} (-1: one scale per"
                f" row), but `group_size` is {grid.group_size}"
            )
        return self.format.why_not(grid, scale_dtype)

    def why_not_activations(
        self, grid: Grid, activations: Grid | None, kv_cache: Grid | None
    ) -> str | None:
        """Why the runtime does not round inputs, keys and values so; None if it does."""
        return self.format.why_not_activations(grid, activations, kv_cache, name=self.name)

    def preset(self) -> dict[str, object]:
        """Fields of `LRQATConfig`; the width is the user's choice."""
        return {"group_size": self.group_size, "symmetric": True, "scale_dtype": "bfloat16"}


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(name="transformers", format=FORMATS["compressed-tensors"], group_size=128),
        # Its kernels: 4 and 8 bits (with zero points only 4), one scale per row or per 32, 64 or
        # 128 weights.
        Runtime(
            name="vllm",
            format=FORMATS["compressed-tensors"],
            bits=(4, 8),
            asymmetric_bits=(4,),
            group_sizes=(-1, 32, 64, 128),
            group_size=128,
        ),
        # A block of 32 weights has a scale of its own there, whether it is used or not.
        Runtime(name="llama.cpp", format=FORMATS["gguf"], group_size=32),
    )
}


def runtime_named(name: str) -> Runtime:
    """A runtime by its name; ValueError names the known ones."""
    check_choice("runtime", name, RUNTIMES)
    return RUNTIMES[name]
