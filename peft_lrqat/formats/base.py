"""What a file format is: what it holds, what it writes, and how its files are loaded."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..quant.grid import Grid
from ..shared.adapter_files import read_config
from ..shared.model_files import check_model, split_settings
from .linear import QuantizedLinear, Target, widened
from .shards import ShardWriter


ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is known of a model before its weights are."""

    config: PretrainedConfig  # of the plain model
    targets: dict[str, Target]  # by the module's name
    # The linear layers that stay, by every name they go by.
    plain_linears: Callable[[], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class DeployedModel(Outline):
    """A model as a format writes it: plain tensors, and quantised weights made one at a time."""

    tensors: Callable[[], Iterable[tuple[str, Tensor | Target]]]  # each call starts anew
    # The same by the names and in the shapes that a checkpoint of the architecture has.
    checkpoint_tensors: Callable[[], Iterable[tuple[str, Tensor | Target]]]
    quantize: Callable[[Target], QuantizedLinear]
    activations: Grid | None = None  # of the targets' inputs, where the files should say it
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An export as its loader built it."""

    model: PreTrainedModel
    loader: str  # in words
    report: dict[str, Any]  # what `from_pretrained(..., output_loading_info=True)` says


class Format(ABC):
    """A file format. A new one is a subclass in its own file and a row in ``table.py``.

    The class attributes say what the format holds without changing a weight.
    """

    name: ClassVar[str]
    symmetric_bits: ClassVar[tuple[int, ...]] = ALL_BITS
    asymmetric_bits: ClassVar[tuple[int, ...]] = ALL_BITS
    group_multiple: ClassVar[int] = 1  # it divides group sizes, and the width of a weight
    scale_dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    holds_conv1d: ClassVar[bool] = False
    holds_embeddings: ClassVar[bool] = False
    # How it holds the weights of experts: "whole", as they are in memory; "apart", each as the
    # linear layer that it is in checkpoints; "plain", without integers; None: not at all.
    experts: ClassVar[str | None] = None
    balanced_bits: ClassVar[tuple[int, ...]] = ()  # others take a bit more, as odd half steps
    is_small: ClassVar[bool] = True  # the point of its files
    takes_container_bits: ClassVar[bool] = True  # integers may be stored at a greater width
    library_name: ClassVar[str] = "transformers"  # in the metadata of the card
    tags: ClassVar[tuple[str, ...]] = ()  # likewise
    snippet: ClassVar[str]  # Python code for the card that loads an export, with {auto_class}

    def why_not(
        self, grid: Grid, scale_dtype: str, in_features: int | None = None, is_conv1d: bool = False
    ) -> str | None:
        """Why this format cannot hold weights on ``grid`` exactly, and what it can; None if it can.

        ``in_features`` None: the width of the weight is not known yet.
        """
        try:
            grid = self.stored_grid(grid)
        except ValueError as error:
            return str(error)
        bits = self.symmetric_bits if grid.symmetric else self.asymmetric_bits
        if is_conv1d and not self.holds_conv1d:
            return (
                f"{self.name} cannot hold transformers' Conv1D layers; use format='packed' or"
                " 'dequantized'"
            )
        if grid.bits not in bits:
            return (
                f"{self.name} holds {grid.kind} weights of {in_words(bits)} bits, but these have"
                f" {grid.bits}"
            )
        if scale_dtype not in self.scale_dtypes:
            return (
                f"{self.name} cannot hold scales in {scale_dtype}; train with"
                f" scale_dtype={self.scale_dtypes[0]!r}, which every format holds exactly"
            )
        sizes = (("`group_size`", grid.group_size), ("the width of the weight", in_features))
        for what, size in sizes:
            multiple = self.multiple_for(grid)
            if size is not None and size != -1 and size % multiple:
                return f"{what} must be a multiple of {multiple} for {self.name}, but is {size}"
        return None

    def multiple_for(self, grid: Grid) -> int:
        """What divides group sizes, and the width of a weight, on a grid."""
        return self.group_multiple

    def stored_grid(self, grid: Grid, bits: int | None = None) -> Grid:
        """The grid that the integers of ``grid`` are stored on.

        Args:
            grid: of the weights.
            bits: the width in the files, if it is to be greater than that of the integers.

        Raises:
            ValueError: the integers do not fit.
        """
        if grid.balanced and grid.bits not in self.balanced_bits:
            if grid.bits == 8:
                raise ValueError(
                    f"{self.name} holds values of half steps up to 7 bits; use"
                    " format='packed' or 'dequantized', or train with balanced=False"
                )
            grid = grid.whole
        return widened(grid, bits)

    def why_not_target(self, target: Target) -> str | None:
        """The same for one weight of a model."""
        if target.is_embedding and not self.holds_embeddings:
            return (
                f"{self.name} holds no low-bit embeddings, as its runtimes read them in 16 bits;"
                " export them as plain weights with embeddings='plain', or use format='packed' or"
                " 'gguf'"
            )
        if target.experts and self.experts is None:
            return (
                f"{self.name} holds no weights of experts; use format='compressed-tensors', 'gguf',"
                " 'packed' or 'dequantized'"
            )
        shape = target.in_features, target.is_conv1d and not target.experts
        return self.why_not(target.grid, target.scale_dtype, *shape)

    def why_not_activations(
        self, grid: Grid, activations: Grid | None, kv_cache: Grid | None, name: str | None = None
    ) -> str | None:
        """Why this format cannot say that inputs, keys and values are rounded; None if it can.

        Args:
            grid: of the weights.
            activations, kv_cache: of each token; None: not rounded.
            name: what the reader calls the format; by default its own name.
        """
        if kv_cache is not None:
            return (
                f"{name or self.name} cannot carry `kv_cache_bits`={kv_cache.bits}: vLLM's low-bit"
                " cache holds 8-bit floats with a fixed scale for a whole layer, and the other"
                " formats have no field for it"
            )
        if activations is None:
            return None
        return self.why_not_inputs(grid, activations, name or self.name)

    def why_not_inputs(self, grid: Grid, activations: Grid, name: str) -> str | None:
        """The part of `why_not_activations` that formats differ in: the inputs of the targets."""
        return (
            f"{name} stores weights alone and cannot carry `activation_bits`={activations.bits};"
            " compressed-tensors can"
        )

    def code(self, auto_class: str, symmetric: bool) -> str:
        """Python code for the card that loads an export by a class of transformers."""
        return self.snippet.format(auto_class=auto_class)

    def check(self, model: Outline) -> None:  # noqa: B027 (most hold every model)
        """ValueError for what the format cannot hold of the whole model. Nothing is written yet."""

    def config_for(self, config: PretrainedConfig) -> PretrainedConfig:
        """The config that transformers needs to load the files."""
        return config

    @abstractmethod
    def write(
        self,
        model: DeployedModel,
        directory: Path,
        *,
        max_shard_size: int,
        done: Callable[[int], object],
    ) -> dict[str, int]:
        """Writes the weights and ``config.json`` into ``directory``; returns figures for the card.

        ``done(1)`` is called after each quantised layer.
        """

    @abstractmethod
    def stored_bytes(self, target: Target, activations: Grid | None = None) -> int:
        """Bytes that the files hold for the weight of a target, padding included."""

    def load(self, path: Path, model_class: type[PreTrainedModel], dtype: torch.dtype) -> Loaded:
        """The export in ``path``, loaded as its users load it; in eval mode."""
        return from_pretrained(path, model_class, dtype, "transformers")

    def unpack(self, model: PreTrainedModel) -> None:  # noqa: B027 (most load plain weights)
        """Gives plain weights to the layers of a loaded model that unpack theirs at every call."""

    def problems(self, path: Path) -> list[str]:
        """What else the export in ``path`` says differently from the directory around it."""
        return []


class SafetensorsFormat(Format):
    """A format in transformers' own layout: safetensors files, and an entry in ``config.json``."""

    checkpoint_names: ClassVar[bool] = True  # False: names and shapes are those in memory

    @abstractmethod
    def tensors_of(
        self, linear: QuantizedLinear, activations: Grid | None
    ) -> Iterator[tuple[str, Tensor]]:
        """What is stored of a weight, under names that follow the module's.

        ``activations`` is the grid of its input, if the files should say it.
        """

    def config_entry(self, model: DeployedModel) -> dict[str, Any] | None:
        """``quantization_config`` of ``config.json``; None: no such entry."""
        return None

    def write(
        self,
        model: DeployedModel,
        directory: Path,
        *,
        max_shard_size: int,
        done: Callable[[int], object],
    ) -> dict[str, int]:
        tensors = model.checkpoint_tensors if self.checkpoint_names else model.tensors
        # The entry of a tensor has its name, the longest ending, and some numbers; a target has
        # up to four.
        entries = (
            4 * (len(name) + 220) if isinstance(value, Target) else len(name) + 200
            for name, value in tensors()
        )
        write_config(directory, self.config_for(model.config), self.config_entry(model))
        settings = split_settings(read_config(directory / CONFIG_NAME))
        weights = 0
        with ShardWriter(directory, max_shard_size, 4096 + sum(entries), settings) as writer:
            for name, value in tensors():
                if isinstance(value, Tensor):
                    writer.write(name, value)
                    continue
                before = writer.total
                for kind, tensor in self.tensors_of(model.quantize(value), model.activations):
                    writer.write(f"{name}.{kind}", tensor)
                weights += writer.total - before
                done(1)
        return {"bytes of the quantised weights": weights, "bytes of all tensors": writer.total}

    def problems(self, path: Path) -> list[str]:
        """Damage that the digests show; runtimes do not look at them."""
        try:
            check_model(path, sorted(path.glob("*.safetensors")))
        except ValueError as error:
            return [str(error)]
        return []


def from_pretrained(
    path: Path, model_class: Any, dtype: torch.dtype, loader: str, **options: Any
) -> Loaded:
    """Loads with transformers; ``options`` go to `from_pretrained`."""
    model, report = model_class.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **options
    )
    return Loaded(model=model.eval(), loader=loader, report=report)


def write_config(directory: Path, config: PretrainedConfig, entry: dict[str, Any] | None) -> None:
    """Writes ``config.json``, with ``entry`` as its ``quantization_config``."""
    config.save_pretrained(str(directory))
    if entry is None:
        return
    path = directory / CONFIG_NAME
    written = json.loads(path.read_text(encoding="utf-8"))
    written["quantization_config"] = entry
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def in_words(values: Iterable[object]) -> str:
    """Values for a message: ``2, 3, 4``."""
    return ", ".join(map(str, values))
