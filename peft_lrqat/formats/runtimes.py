"""The table of runtimes: which format each loads, and which of its settings each runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..quant.grid import Grid, k_group
from ..shared.checks import check_choice
from .base import Format, in_words
from .linear import Target
from .sizes import StoredBits, stored_bits
from .table import FORMATS


# A width that every group size divides, for a model that is not known yet.
WIDTH = 4096


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a program runs of the format it loads."""

    name: str
    format: Format
    group_sizes: tuple[int, ...] | None = None  # None: all that the format holds; -1: a row
    presets: tuple[int, ...]  # group sizes, the best first
    small_groups: int | None = None  # the smallest without K blocks; None: it has no K blocks
    # Layers that the runtime joins into one, which must be quantised alike.
    fused: tuple[tuple[str, ...], ...] = ()

    def why_not(self, grid: Grid, scale_dtype: str, *, is_conv1d: bool = False) -> str | None:
        """Why the runtime does not run weights on ``grid``, and what it runs; None if it does."""
        return self._why_not_groups(grid) or self.format.why_not(
            grid, scale_dtype, is_conv1d=is_conv1d
        )

    def why_not_target(self, target: Target) -> str | None:
        """The same for one weight of a model."""
        return self._why_not_groups(target.grid) or self.format.why_not_target(target)

    def _why_not_groups(self, grid: Grid) -> str | None:
        if self.group_sizes is None or grid.group_size in self.group_sizes:
            return None
        return (
            f"{self.name} runs group sizes {in_words(self.group_sizes)} (-1: one scale per"
            f" row), but `group_size` is {grid.group_size}"
        )

    def why_not_activations(
        self, grid: Grid, activations: Grid | None, kv_cache: Grid | None
    ) -> str | None:
        """Why the runtime does not round inputs, keys and values so; None if it does."""
        return self.format.why_not_activations(grid, activations, kv_cache, name=self.name)

    def why_not_fused(self, schemes: Mapping[str, object]) -> str | None:
        """Why the runtime cannot join layers that it joins; None if it can.

        ``schemes``: by module name, what is the same for layers that are quantised alike; None for
        one that is not quantised.
        """
        for parts in self.fused:
            for name in schemes:
                parent, _, part = name.rpartition(".")
                names = [f"{parent}.{other}" if parent else other for other in parts]
                found = {other: schemes[other] for other in names if other in schemes}
                if part == parts[0] and len(set(found.values())) > 1:
                    joined = in_words(f"`{other}`" for other in found)
                    return (
                        f"{self.name} joins {joined} into one layer, which must be quantised"
                        " alike, but their bits or group sizes differ, or some are not quantised;"
                        " choose all of them or none, with the same settings"
                    )
        return None

    def stored_bits(
        self,
        grid: Grid,
        shapes: Iterable[tuple[int, int]] = ((WIDTH, WIDTH),),
        activations: Grid | None = None,
    ) -> StoredBits:
        """Bits per weight of layers of some shapes, (out, in), in a file for the runtime."""
        targets = [
            Target(
                name="", grid=grid, scale_dtype="bfloat16", out_features=rows, in_features=columns
            )
            for rows, columns in shapes
        ]
        return stored_bits(targets, self.format, activations)

    def preset(
        self,
        bits: int = 4,
        symmetric: bool | None = None,
        shapes: Iterable[tuple[int, int]] = ((WIDTH, WIDTH),),
        *,
        balanced: bool = False,
        k_quant: bool | None = None,
    ) -> dict[str, Any]:
        """Fields of `LRQATConfig` that the runtime runs; the width of integers is given.

        The group size is the first that fits all ``shapes``, (out, in), and is stored at about the
        bits that are trained; where none is, the one that takes the least. K blocks are chosen
        where they hold small groups in fewer bits than other blocks, unless ``k_quant`` says.
        ``symmetric`` None: without zero points, except at 2 bits in K blocks that are not
        ``balanced``.
        """
        shapes = list(shapes)
        in_k_blocks = balanced or bits > 2 if symmetric is None else symmetric
        if k_quant or (k_quant is None and self._gains(bits, in_k_blocks, balanced, shapes)):
            scales = {"scale_dtype": "float16", "k_quant": True}
            return {"group_size": -1, "symmetric": in_k_blocks, **scales}
        symmetric = symmetric is not False
        fitting: dict[int, StoredBits] = {}
        for size in self.presets:
            grid = Grid(bits=bits, symmetric=symmetric, group_size=size, balanced=balanced)
            if all(
                (size == -1 or columns % size == 0)
                and self.format.why_not(grid, "bfloat16", columns) is None
                for _, columns in shapes
            ):
                fitting[size] = self.stored_bits(grid, shapes)
        frugal = [size for size, found in fitting.items() if not found.wasteful]
        least = sorted(fitting, key=lambda size: fitting[size].stored)
        group_size = next(iter([*frugal, *least]), self.presets[0])
        return {"group_size": group_size, "symmetric": symmetric, "scale_dtype": "bfloat16"}

    def _gains(
        self, bits: int, symmetric: bool, balanced: bool, shapes: list[tuple[int, int]]
    ) -> bool:
        """Whether K blocks hold small groups in fewer bits than other blocks."""
        if self.small_groups is None or bits > 4 or any(columns % 256 for _, columns in shapes):
            return False
        unit = k_group(bits, symmetric and not balanced)
        kind: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "balanced": balanced}
        grid = Grid(**kind, group_size=unit or -1, k_quant=unit is not None)
        plain = Grid(**kind, group_size=self.small_groups)
        return self.stored_bits(grid, shapes).stored < self.stored_bits(plain, shapes).stored


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="transformers", format=FORMATS["compressed-tensors"], presets=(128, 64, 32, -1)
        ),
        # By the source of release 0.33: on NVIDIA's GPUs, 4 and 8 bits in its own kernels, which
        # take one scale per row or per 32, 64 or 128 weights, and all other widths by Humming.
        Runtime(
            name="vllm",
            format=FORMATS["compressed-tensors"],
            group_sizes=(-1, 32, 64, 128),
            presets=(128, 64, 32, -1),
            fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
        ),
        # A block of 32 weights has a scale of its own there, whether it is used or not; 256
        # integers of 2 bits share one.
        Runtime(name="llama.cpp", format=FORMATS["gguf"], presets=(32, 256, -1), small_groups=32),
    )
}


def runtime_named(name: str) -> Runtime:
    """A runtime by its name; ValueError names the known ones."""
    check_choice("runtime", name, RUNTIMES)
    return RUNTIMES[name]
