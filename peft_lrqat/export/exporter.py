"""`export_model`: a trained LR-QAT model as a directory that a runtime loads, with not one weight changed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import convert_file_size_to_int

from ..formats.capabilities import FORMATS, why_not, why_not_activations
from ..quant import Grid
from ..shared.staging import check_target, whole_directory
from . import compressed_tensors, gguf, gptq, packed
from .card import write_card
from .linears import QuantizedLinear, lrqat_layers, model_tensors, quantized_linear, widened
from .stream import ShardWriter


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

    Layers are quantised and written one after another, so that the memory needed is the model's own and one layer more. ``path``
    appears when everything in it is on the disk; one that exists and is not empty is refused. So is, before anything is written,
    what the format cannot hold without changing a weight.

    Args:
        model: a `PeftModel` with an LR-QAT adapter, merged or not; left as it is. An untrained adapter ships round-to-nearest.
        format: ``compressed-tensors``, ``gguf``, ``gptq``, ``packed`` or ``dequantized``.
        tokenizer: saved with it; a GGUF file holds one and needs it.
        adapter_name: which adapter; left out, the active one.
        max_shard_size: bytes of tensors in a file, or a string such as "5GB"; GGUF is one file.
        container_bits: store integers at this width, which holds more than theirs; for runtimes that read 4 bits, but not 3.
        activations: what becomes of ``activation_bits`` and ``kv_cache_bits``. ``write``: part of the export, or it is refused.
            ``ignore``: the weights alone, for a runtime that computes with 16-bit activations or rounds them its own way.
        progress: whether a bar on stderr shows how far it is.

    Raises:
        ValueError: settings or a model that the format cannot hold; the message says which it could.
        FileExistsError: ``path`` is not empty.
    """
    check_target(path)
    layers, adapter_name = _check(model, format, adapter_name, container_bits, activations)
    shard_size = convert_file_size_to_int(max_shard_size)
    with whole_directory(path) as directory:
        bar = tqdm(
            total=len(layers), desc=f"exporting {format}", unit="layer", disable=not progress
        )
        with bar:
            if format == "gguf":
                summary = gguf.write(model, adapter_name, tokenizer, directory, bar.update)
                # For transformers: the file says nothing of generation, and not all of a configuration and a tokenizer.
                _write_config(model, adapter_name, format, {}, None, directory)
            else:
                summary = _write_safetensors(
                    model,
                    adapter_name,
                    format,
                    directory,
                    shard_size,
                    container_bits,
                    activations,
                    bar.update,
                )
            if tokenizer is not None:
                tokenizer.save_pretrained(str(directory))
        write_card(directory, model.peft_config[adapter_name], format, summary, activations)
    return Path(path)


def is_untrained(model: PeftModel, adapter_name: str) -> bool:
    """Whether the adapter's integers and scales are those of round-to-nearest: B is zero and no scale has moved."""
    layers = lrqat_layers(model).values()
    return all(
        not layer.lrqat_B[adapter_name].any()
        and torch.equal(layer.lrqat_scale[adapter_name].float(), layer.base_layer.scale0.float())
        for layer in layers
    )


def _check(
    model: PeftModel,
    format: str,
    adapter_name: str | None,
    container_bits: int | None,
    activations: str,
) -> tuple[dict[str, Any], str]:
    """The target layers and the adapter's name; ValueError for what can be refused before anything is computed."""
    if format not in FORMATS:
        raise ValueError(
            f"`format` must be one of {', '.join(map(repr, FORMATS))}, but is {format!r}"
        )
    if activations not in ("write", "ignore"):
        raise ValueError(f"`activations` must be one of 'write', 'ignore', but is {activations!r}")
    layers = lrqat_layers(model) if isinstance(model, PeftModel) else {}
    if not layers:
        raise ValueError(
            f"only a PeftModel with an LR-QAT adapter can be exported, but this is a {type(model).__name__} without one; a model "
            "that was merged and unloaded has no integers any more"
        )
    active = [name for name in model.active_adapters if name in model.peft_config]
    adapter_name = adapter_name or (active[0] if active else None)
    missing = [name for name, layer in layers.items() if adapter_name not in layer.lrqat_A]
    if missing:
        raise ValueError(
            f"the adapter {adapter_name!r} has no factors for {len(missing)} of the model's low-bit layers, such as `{missing[0]}`"
            f"; give `adapter_name`, one of {sorted(model.peft_config)} that covers them all"
        )
    for name, layer in layers.items():
        base = layer.base_layer
        grid = widened(base.format.grid, container_bits)
        reason = why_not(format, grid, base.format.scale_dtype, layer.in_features, base.is_conv1d)
        if reason is not None:
            raise ValueError(f"`{name}`: {reason}")
        if activations == "write":
            reason = why_not_activations(
                format,
                grid,
                layer.activations[adapter_name],
                model.peft_config[adapter_name].kv_cache_grid,
            )
            if reason is not None:
                raise ValueError(
                    f"`{name}`: {reason}. To export the weights alone, use activations='ignore'"
                )
    if format == "gguf" and container_bits is not None:
        raise ValueError(
            "`container_bits` is not for gguf, whose blocks are chosen by the integers they must hold; leave it out"
        )
    if is_untrained(model, adapter_name):
        logger.warning(
            f"the adapter `{adapter_name}` is untrained: what is exported equals round-to-nearest"
        )
    return layers, adapter_name


def _write_safetensors(
    model: PeftModel,
    adapter_name: str,
    format: str,
    directory: Path,
    shard_size: int,
    container_bits: int | None,
    activations: str,
    done: Callable[[int], Any],
) -> dict[str, Any]:
    """All formats that transformers' own layout of a directory carries."""
    base = model.get_base_model()
    inputs = model.peft_config[adapter_name].activation_grid if activations == "write" else None
    tensors_of = {
        "compressed-tensors": (
            compressed_tensors.tensors_of
            if inputs is None
            else compressed_tensors.integer_tensors_of
        ),
        "gptq": gptq.tensors_of,
        "packed": packed.tensors_of,
        "dequantized": _dequantized,
    }[format]
    modules: dict[str, dict[str, Any]] = {}
    names = [name for name, _ in base.named_parameters(remove_duplicate=False)] + [
        n for n, _ in base.named_buffers()
    ]
    # A tensor's entry: its name, the longest ending, and some numbers; a target has up to four.
    header_bytes = (
        4096
        + sum(len(name) + 200 for name in names)
        + sum(4 * (len(n) + 220) for n in lrqat_layers(model))
    )
    weights = 0
    with ShardWriter(directory, shard_size, header_bytes) as writer:
        for name, value in model_tensors(model, adapter_name):
            if isinstance(value, Tensor):
                writer.write(name, value)
                continue
            before = writer.total
            linear = quantized_linear(name, value, adapter_name)
            # The packed integers are counted from the lowest of the wider grid.
            linear = replace(linear, grid=widened(linear.grid, container_bits))
            modules[name] = (
                packed.describe(linear)
                if format == "packed"
                else compressed_tensors.describe(linear)
            )
            for kind, tensor in tensors_of(linear):
                writer.write(f"{name}.{kind}", tensor)
            weights += writer.total - before
            done(1)
    _write_config(model, adapter_name, format, modules, inputs, directory)
    return {"bytes of the quantised weights": weights, "bytes of all tensors": writer.total}


def _dequantized(linear: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    yield "weight", linear.weight.T.contiguous() if linear.is_conv1d else linear.weight


def _write_config(
    model: PeftModel,
    adapter_name: str,
    format: str,
    modules: dict[str, dict[str, Any]],
    inputs: Grid | None,
    directory: Path,
) -> None:
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if _has_own_head(base, {name for name, _ in model_tensors(model, adapter_name)}):
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):  # of a GGUF file that the base was made from
        del config.quantization_config
    config.architectures = [type(base).__name__]
    if format == "gguf":
        config = gguf.config_for_transformers(config)
    config.dtype = base.dtype
    others = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not _is_inside(name, modules)
    ]
    quantization = None
    if format == "compressed-tensors":
        if len({tuple(fields.items()) for fields in modules.values()}) > 1 and not all(
            fields["symmetric"] for fields in modules.values()
        ):
            raise ValueError(
                "transformers loads asymmetric compressed-tensors of one width and group size only, but this model has several; "
                "export it as 'packed' or 'dequantized', or train with symmetric=True"
            )
        quantization = compressed_tensors.quantization_config(modules, others, inputs)
    elif format == "packed":
        quantization = packed.quantization_config(modules)
    elif format == "gptq":
        kinds = {
            (fields["bits"], fields["group_size"], fields["symmetric"])
            for fields in modules.values()
        }
        if len(kinds) > 1:
            raise ValueError(
                f"gptq has one width and group size for the whole model, but this one has {sorted(kind[:2] for kind in kinds)}"
            )
        quantization = gptq.quantization_config(*kinds.pop(), others)
    config.save_pretrained(str(directory))
    if quantization is not None:
        path = directory / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        written["quantization_config"] = quantization
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(str(directory))


def _has_own_head(base: nn.Module, written: set[str]) -> bool:
    """Whether the head has a weight in the files, be the model a tied one whose head was trained. Some loaders go by the config."""
    head = base.get_output_embeddings()
    return any(
        f"{name}.weight" in written for name, module in base.named_modules() if module is head
    )


def _is_inside(name: str, modules: dict[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts) + 1))
