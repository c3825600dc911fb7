"""`export_model`: a trained LR-QAT model as a directory that a runtime loads, bit for bit."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, cast

from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from ..formats.base import DeployedModel, Format
from ..formats.linear import QuantizedLinear, Target
from ..formats.runtimes import RUNTIMES
from ..formats.sizes import stored_bits
from ..formats.table import format_named
from ..lrqat.config import LRQATConfig
from ..lrqat.low_bit import is_low_bit
from ..quant.grid import Grid
from ..shared.checks import check_choice
from ..shared.staging import check_target, whole_directory
from ..shared.tasks import class_name
from .card import write_card
from .layout import CheckpointLayout
from .linears import (
    NO_ADAPTER,
    Layer,
    Model,
    adapter_to_export,
    base_of,
    config_of,
    frozen_of,
    has_factors,
    low_bit_layers,
    lrqat_layers,
    quantized_linear,
    target_of,
)
from .tensors import is_parted, model_tensors, plain_linears, plain_modules


logger = logging.get_logger(__name__)


def export_model(
    model: Model,
    path: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str | None = None,
    max_shard_size: int | str = "5GB",
    container_bits: int | None = None,
    activations: Literal["write", "ignore"] = "write",
    embeddings: Literal["low-bit", "plain"] = "low-bit",
    progress: bool = True,
) -> Path:
    """Writes the deployed model, integers and scales, into the directory ``path``; returns it.

    Layers are quantised and written one after another, so this needs the memory of the model and
    of one more layer. ``path`` appears when everything in it is on the disk. What the format cannot
    hold without changing a weight is refused before anything is written.

    Args:
        model: a `PeftModel` with an LR-QAT adapter, merged or not, or a low-bit base alone; it does
            not change. An untrained adapter ships round-to-nearest. Layers of a low-bit base
            that the adapter does not cover ship the integers of the base.
        path: a directory that does not exist, or is empty.
        format: ``compressed-tensors``, ``gguf``, ``gptq``, ``gemma``, ``packed`` or
            ``dequantized``.
        tokenizer: saved with the model; a GGUF file holds one and needs it.
        adapter_name: which adapter; by default the active one.
        max_shard_size: bytes of tensors in a file, or a string such as "5GB"; GGUF is one file.
        container_bits: the width at which integers are stored, which may be greater than theirs;
            for runtimes that read 4 bits, but not 3.
        activations: what becomes of ``activation_bits`` and ``kv_cache_bits``. ``write``: they are
            part of the export, or it is refused. ``ignore``: the export holds the weights alone,
            for a runtime that computes with 16-bit activations or rounds them its own way.
        embeddings: how the embedding and output layer of ``embedding_bits`` are written. ``plain``:
            as the weights that they compute with, in the dtype of the model; for formats that
            hold no low-bit embeddings.
        progress: whether a bar on stderr shows how far it is.

    Raises:
        ValueError: settings or a model that the format cannot hold; the message says which it can.
        FileExistsError: ``path`` is not empty.
    """
    check_target(path)
    writer = format_named(format)
    check_choice("embeddings", embeddings, ("low-bit", "plain"))
    plain = _ends(model) if embeddings == "plain" else ()
    layers, adapter_name = _check(model, writer, adapter_name, container_bits, activations, plain)
    shard_size = convert_file_size_to_int(max_shard_size)
    config = _config_to_show(config_of(model, adapter_name), plain)
    deployed = replace(
        deployed_model(
            model,
            adapter_name,
            lambda grid: writer.stored_grid(grid, container_bits),
            plain,
            writer.experts,
        ),
        activations=config.activation_grid if activations == "write" else None,
        tokenizer=tokenizer,
    )
    writer.check(deployed)
    base = base_of(model)
    generation = base.generation_config if base.can_generate() else None
    # The experts of a format that holds plain ones are none of its targets.
    targets = list(deployed.targets.values()) or [target_of(n, m) for n, m in layers.items()]
    sizes = stored_bits(targets, writer, deployed.activations)
    if writer.is_small and sizes.wasteful:
        logger.warning(f"{sizes.remark(writer)}; `lrqat recipe` finds settings that take less")
    _warn_of_runtimes(writer, deployed)
    bar = tqdm(total=len(targets), desc=f"exporting {format}", unit="layer", disable=not progress)
    with whole_directory(path) as directory:
        if generation is not None:
            _save_generation_config(generation, directory)
        with bar:
            figures = writer.write(deployed, directory, max_shard_size=shard_size, done=bar.update)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        loader = type(base).__name__ if config.task_type is None else class_name(config)
        trained = isinstance(model, PeftModel)
        write_card(directory, config, writer, figures, sizes, loader, activations, trained)
    return Path(path)


def is_untrained(model: PeftModel, adapter_name: str) -> bool:
    """Whether an adapter ships round-to-nearest: B is zero and no scale has moved."""
    return all(
        not layer.lrqat_B[adapter_name].any()
        and bool((layer.lrqat_scale[adapter_name].float() == layer.base_layer.scale0.float()).all())
        for layer in lrqat_layers(model).values()
        if adapter_name in layer.lrqat_A
    )


def _save_generation_config(generation: GenerationConfig, directory: Path) -> None:
    """ValueError for one that transformers does not save, before any layer is written."""
    try:
        generation.save_pretrained(str(directory))
    except ValueError as error:
        raise ValueError(
            "transformers refuses to save the `generation_config` of this model; change its fields,"
            f" or set it to None: {error}"
        ) from error


def _warn_of_runtimes(format: Format, model: DeployedModel) -> None:
    """Names the runtimes that load the format, but not this model."""
    runtimes = [runtime for runtime in RUNTIMES.values() if runtime.format is format]
    if not runtimes:
        return
    schemes = {name: (t.grid.bits, t.grid.group_size) for name, t in model.targets.items()}
    others = dict.fromkeys(model.plain_linears())
    for runtime in runtimes:
        if reason := runtime.why_not_fused({**others, **schemes}):
            logger.warning(reason)


def deployed_model(
    model: Model,
    adapter_name: str,
    stored_grid: Callable[[Grid], Grid] = lambda grid: grid,
    plain: Collection[str] = (),
    experts: str | None = "plain",
) -> DeployedModel:
    """``model`` under an adapter as formats see it, its integers on grids that hold them.

    The layers named in ``plain`` are plain weights; ``experts`` is how a `Format` holds those of
    experts.
    """
    layers = low_bit_layers(model)
    if experts == "plain":
        plain = (*plain, *(name for name, layer in layers.items() if frozen_of(layer).experts))
    targets = {
        name: replace(target, grid=stored_grid(target.grid))
        for name, layer in layers.items()
        if name not in plain
        for target in [target_of(name, layer)]
    }

    def tensors() -> Iterator[tuple[str, Tensor | Target]]:
        for name, value in model_tensors(model, adapter_name):
            if isinstance(value, Tensor):
                yield name, value
            elif name in plain:
                weight = quantized_linear(name, value, adapter_name).parameter
                yield target_of(name, value).parameter_name, weight
            else:
                yield name, targets[name]

    @lru_cache(maxsize=1)  # experts of one layer follow one another
    def whole(name: str) -> QuantizedLinear:
        return quantized_linear(name, layers[name], adapter_name)

    def quantize(target: Target) -> QuantizedLinear:
        if target.experts:
            linear = whole(target.name)
        elif target.name in layers:
            linear = quantized_linear(target.name, layers[target.name], adapter_name)
        else:
            name, rows = layout().parts[target.name]
            linear = whole(name).rows(target.name, rows)
        # Packed integers are counted from the lowest of the wider grid.
        return linear.on(target.grid)

    @cache
    def layout() -> CheckpointLayout:
        return CheckpointLayout(base_of(model), tensors)

    deployed = targets
    if experts == "apart" and any(target.experts for target in targets.values()):
        found = (value for _, value in layout().tensors() if isinstance(value, Target))
        deployed = {target.name: target for target in found}
    return DeployedModel(
        config=_config(model, adapter_name),
        targets=deployed,
        tensors=tensors,
        checkpoint_tensors=lambda: layout().tensors(),
        quantize=quantize,
        plain_linears=lambda: (*plain, *_plain_linears(model, adapter_name, layout())),
    )


def _plain_linears(model: Model, adapter_name: str, layout: CheckpointLayout) -> tuple[str, ...]:
    """The linear layers that stay, by their names in memory and in checkpoints.

    A runtime sees each expert and each router as a linear layer, whatever they are in memory.
    """
    names = plain_linears(model, adapter_name)
    modules = plain_modules(base_of(model), adapter_name)
    embeddings = {name for name, module in modules if isinstance(module, nn.Embedding)}
    known = {*names, *embeddings, *layout.target_names}
    return (*names, *(name for name in layout.linears if name not in known))


def _check(
    model: Model,
    format: Format,
    adapter_name: str | None,
    container_bits: int | None,
    activations: str,
    plain: Collection[str],
) -> tuple[dict[str, Layer], str]:
    """The target layers and the adapter's name; ValueError for what can be refused at once."""
    check_choice("activations", activations, ("write", "ignore"))
    holds = isinstance(model, PeftModel) or is_low_bit(model)
    layers = low_bit_layers(model) if holds else {}
    layers = {name: layer for name, layer in layers.items() if name not in plain}
    if not layers:
        raise ValueError(
            "only a PeftModel with an LR-QAT adapter, or a low-bit base, can be exported, but this"
            f" is a {type(model).__name__} without either; a model that was merged and unloaded no"
            " longer has integers"
        )
    adapter_name = adapter_to_export(model, adapter_name)
    frozen = [name for name, layer in layers.items() if not has_factors(layer, adapter_name)]
    if len(frozen) == len(layers) and adapter_name != NO_ADAPTER:
        raise ValueError(
            f"the adapter {adapter_name!r} has no factors for any of the model's low-bit layers;"
            f" give `adapter_name`, one of {sorted(cast(PeftModel, model).peft_config)} that is an"
            " LR-QAT adapter"
        )
    for name in frozen:
        kind = frozen_of(layers[name]).format.downcast
        if kind != "int":
            raise ValueError(
                f"the adapter {adapter_name!r} has no factors for {len(frozen)} of the model's"
                f" low-bit layers, such as `{name}`, which compute with unrounded weights there"
                f" (downcast={kind!r}); give `adapter_name` of one that covers them all, or start"
                " from a base with downcast='int'"
            )
    if container_bits is not None and not format.takes_container_bits:
        raise ValueError(
            f"`container_bits` is not for {format.name}, whose blocks are chosen by the integers"
            " they must hold; leave it out"
        )
    config = config_of(model, adapter_name)
    for name, layer in layers.items():
        target = target_of(name, layer)
        try:
            grid = format.stored_grid(target.grid, container_bits)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None
        reason = format.why_not_target(replace(target, grid=grid))
        if reason is not None:
            raise ValueError(f"`{name}`: {reason}")
        if activations == "write":
            reason = format.why_not_activations(grid, config.activation_grid, config.kv_cache_grid)
            if reason is None and config.activation_grid is not None:
                plain_input = name in frozen or target.is_embedding
                reason = "its input is not rounded, but that of other layers is"
                reason = reason if plain_input else None
            if reason is not None:
                raise ValueError(
                    f"`{name}`: {reason}. To export the weights alone, use activations='ignore'"
                )
    if adapter_name != NO_ADAPTER and is_untrained(cast(PeftModel, model), adapter_name):
        logger.warning(
            f"the adapter `{adapter_name}` is untrained: what is exported equals round-to-nearest"
        )
    return layers, adapter_name


def _ends(model: Model) -> tuple[str, ...]:
    """The names of the low-bit embedding and output layer; none if the embedding is plain."""
    base = base_of(model)
    found = low_bit_layers(model)
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if not isinstance(ends[0], Layer):
        return ()
    return tuple(name for name, layer in found.items() if any(layer is end for end in ends))


def _config_to_show(config: LRQATConfig, plain: Collection[str]) -> LRQATConfig:
    """The config for the card, without the bits of weights that are written as plain ones."""
    if not plain:
        return config
    names = {re.escape(name) for name in plain}
    shown = copy.copy(config)
    shown.embedding_bits = None
    shown.bits_pattern = {k: bits for k, bits in config.bits_pattern.items() if k not in names}
    return shown


def _config(model: Model, adapter_name: str) -> PretrainedConfig:
    """The config of the deployed model."""
    base = base_of(model)
    config = copy.deepcopy(base.config)
    # Some loaders trust the config.
    if is_parted(model, adapter_name):
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):  # of a GGUF file that the base was made from
        del config.quantization_config
    config.architectures = [type(base).__name__]
    config.dtype = base.dtype
    return config
