"""`export_model`: a trained LR-QAT model as a directory that a runtime loads, bit for bit."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from ..formats.base import DeployedModel, Format
from ..formats.linear import QuantizedLinear, Target, widened
from ..formats.runtimes import RUNTIMES
from ..formats.sizes import stored_bits
from ..formats.table import format_named
from ..lrqat.layer import LRQATLayer
from ..shared.checks import check_choice
from ..shared.staging import check_target, whole_directory
from ..shared.tasks import class_name
from .card import write_card
from .layout import CheckpointLayout
from .linears import base_of, config_of, lrqat_layers, quantized_linear, target_of
from .tensors import is_parted, model_tensors, plain_linears, plain_modules


logger = logging.get_logger(__name__)


def export_model(
    model: PeftModel,
    path: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter_name: str | None = None,
    max_shard_size: int | str = "5GB",
    container_bits: int | None = None,
    activations: Literal["write", "ignore"] = "write",
    progress: bool = True,
) -> Path:
    """Writes the deployed model, integers and scales, into the directory ``path``; returns it.

    Layers are quantised and written one after another, so this needs the memory of the model and
    of one more layer. ``path`` appears when everything in it is on the disk. What the format cannot
    hold without changing a weight is refused before anything is written.

    Args:
        model: a `PeftModel` with an LR-QAT adapter, merged or not; it does not change. An untrained
            adapter ships round-to-nearest.
        path: a directory that does not exist, or is empty.
        format: ``compressed-tensors``, ``gguf``, ``gptq``, ``packed`` or ``dequantized``.
        tokenizer: saved with the model; a GGUF file holds one and needs it.
        adapter_name: which adapter; by default the active one.
        max_shard_size: bytes of tensors in a file, or a string such as "5GB"; GGUF is one file.
        container_bits: the width at which integers are stored, which may be greater than theirs;
            for runtimes that read 4 bits, but not 3.
        activations: what becomes of ``activation_bits`` and ``kv_cache_bits``. ``write``: they are
            part of the export, or it is refused. ``ignore``: the export holds the weights alone,
            for a runtime that computes with 16-bit activations or rounds them its own way.
        progress: whether a bar on stderr shows how far it is.

    Raises:
        ValueError: settings or a model that the format cannot hold; the message says which it can.
        FileExistsError: ``path`` is not empty.
    """
    check_target(path)
    writer = format_named(format)
    layers, adapter_name = _check(model, writer, adapter_name, container_bits, activations)
    shard_size = convert_file_size_to_int(max_shard_size)
    config = config_of(model, adapter_name)
    deployed = replace(
        deployed_model(model, adapter_name, container_bits),
        activations=config.activation_grid if activations == "write" else None,
        tokenizer=tokenizer,
    )
    writer.check(deployed)
    base = base_of(model)
    generation = base.generation_config if base.can_generate() else None
    sizes = stored_bits(deployed.targets.values(), writer, deployed.activations)
    if writer.is_small and sizes.wasteful:
        logger.warning(f"{sizes.remark(writer)}; `lrqat recipe` finds settings that take less")
    _warn_of_runtimes(writer, deployed)
    bar = tqdm(total=len(layers), desc=f"exporting {format}", unit="layer", disable=not progress)
    with whole_directory(path) as directory:
        if generation is not None:
            _save_generation_config(generation, directory)
        with bar:
            figures = writer.write(deployed, directory, max_shard_size=shard_size, done=bar.update)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(directory))
        loader = type(base).__name__ if config.task_type is None else class_name(config)
        write_card(directory, config, writer, figures, sizes, loader, activations)
    return Path(path)


def is_untrained(model: PeftModel, adapter_name: str) -> bool:
    """Whether an adapter ships round-to-nearest: B is zero and no scale has moved."""
    return all(
        not layer.lrqat_B[adapter_name].any()
        and bool((layer.lrqat_scale[adapter_name].float() == layer.base_layer.scale0.float()).all())
        for layer in lrqat_layers(model).values()
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
    model: PeftModel, adapter_name: str, container_bits: int | None = None
) -> DeployedModel:
    """``model`` under an adapter as formats see it, its integers stored at ``container_bits``."""
    layers = lrqat_layers(model)
    targets = {
        name: replace(target, grid=widened(target.grid, container_bits))
        for name, layer in layers.items()
        for target in [target_of(name, layer)]
    }

    def tensors() -> Iterator[tuple[str, Tensor | Target]]:
        for name, value in model_tensors(model, adapter_name):
            yield name, targets[name] if isinstance(value, LRQATLayer) else value

    def quantize(target: Target) -> QuantizedLinear:
        linear = quantized_linear(target.name, layers[target.name], adapter_name)
        # Packed integers are counted from the lowest of the wider grid.
        return replace(linear, grid=target.grid)

    @cache
    def layout() -> CheckpointLayout:
        return CheckpointLayout(base_of(model), tensors)

    return DeployedModel(
        config=_config(model, adapter_name),
        targets=targets,
        tensors=tensors,
        checkpoint_tensors=lambda: layout().tensors(),
        quantize=quantize,
        plain_linears=lambda: _plain_linears(model, adapter_name, layout()),
    )


def _plain_linears(
    model: PeftModel, adapter_name: str, layout: CheckpointLayout
) -> tuple[str, ...]:
    """The linear layers that stay, by their names in memory and in checkpoints.

    A runtime sees each expert and each router as a linear layer, whatever they are in memory.
    """
    names = plain_linears(model, adapter_name)
    modules = plain_modules(base_of(model), adapter_name)
    embeddings = {name for name, module in modules if isinstance(module, nn.Embedding)}
    known = {*names, *embeddings, *layout.target_names}
    return (*names, *(name for name in layout.linears if name not in known))


def _check(
    model: PeftModel,
    format: Format,
    adapter_name: str | None,
    container_bits: int | None,
    activations: str,
) -> tuple[dict[str, LRQATLayer], str]:
    """The target layers and the adapter's name; ValueError for what can be refused at once."""
    check_choice("activations", activations, ("write", "ignore"))
    layers = lrqat_layers(model) if isinstance(model, PeftModel) else {}
    if not layers:
        raise ValueError(
            "only a PeftModel with an LR-QAT adapter can be exported, but this is a"
            f" {type(model).__name__} without one; a model that was merged and unloaded"
            " no longer has integers"
        )
    active = [name for name in model.active_adapters if name in model.peft_config]
    adapter_name = adapter_name or next(iter(active), "")
    missing = [name for name, layer in layers.items() if adapter_name not in layer.lrqat_A]
    if missing:
        raise ValueError(
            f"the adapter {adapter_name!r} has no factors for {len(missing)} of the model's low-bit"
            f" layers, such as `{missing[0]}`; give `adapter_name`, one of"
            f" {sorted(model.peft_config)} that covers them all"
        )
    if container_bits is not None and not format.takes_container_bits:
        raise ValueError(
            f"`container_bits` is not for {format.name}, whose blocks are chosen by the integers"
            " they must hold; leave it out"
        )
    config = config_of(model, adapter_name)
    for name, layer in layers.items():
        base = layer.base_layer
        grid = widened(base.format.grid, container_bits)
        reason = format.why_not(grid, base.format.scale_dtype, layer.in_features, base.is_conv1d)
        if reason is not None:
            raise ValueError(f"`{name}`: {reason}")
        if activations == "write":
            reason = format.why_not_activations(grid, config.activation_grid, config.kv_cache_grid)
            if reason is not None:
                raise ValueError(
                    f"`{name}`: {reason}. To export the weights alone, use activations='ignore'"
                )
    if is_untrained(model, adapter_name):
        logger.warning(
            f"the adapter `{adapter_name}` is untrained: what is exported equals round-to-nearest"
        )
    return layers, adapter_name


def _config(model: PeftModel, adapter_name: str) -> PretrainedConfig:
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
