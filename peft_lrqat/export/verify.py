"""What an exported model computes, loaded by its loader, against the LR-QAT model it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..formats.base import Loaded
from ..formats.linear import Target
from ..formats.table import format_named
from ..lrqat.model import LRQATModel
from ..shared.staging import directory_bytes
from .exporter import deployed_model
from .linears import Model, adapter_to_export, base_of, config_of


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The comparison of an export with the model it was made from."""

    loader: str
    layers: int
    different_layers: tuple[str, ...]  # targets whose weight differs in a bit from what was trained
    different_tensors: tuple[str, ...]  # likewise among all other tensors
    keys: tuple[str, ...]  # tensors that are missing, unexpected, or newly made by the loader
    logits_difference: float | None  # largest, on one row of tokens; None where nothing was run
    logits_agree: bool  # up to another order of summation
    problems: tuple[str, ...]  # what else users would meet, such as a tokenizer that differs
    bytes: int  # of the directory

    @property
    def exact(self) -> bool:
        """Whether the loaded model is the one that was trained: all of the above."""
        wrong = (*self.different_layers, *self.different_tensors, *self.keys, *self.problems)
        return not wrong and self.logits_agree


@torch.no_grad()
def verify_export(
    model: Model,
    path: str | os.PathLike[str],
    *,
    format: str,
    adapter_name: str | None = None,
) -> Verification:
    """Loads the export in ``path`` as its users do, and compares it with ``model``.

    Compared are every tensor of the model, the keys that the loader found missing or unexpected,
    and the logits of 32 tokens; for a GGUF file also the token ids of a chat of two turns. GPTQ is
    read by this package, by the definition of its layout.
    """
    path = Path(path)
    adapter_name = adapter_to_export(model, adapter_name)
    base = base_of(model)
    reader = format_named(format)
    loaded = reader.load(path, type(base), base.dtype)
    # compressed-tensors makes weights of its integers in the first forward pass.
    difference, agree = _compare_outputs(model, loaded.model, adapter_name)
    reader.unpack(loaded.model)
    deployed = deployed_model(model, adapter_name)
    found = _tensors(loaded.model)
    layers, others, keys = [], [], _wrong_keys(loaded)
    expected: set[int] = set()
    # Buffers that are computed, not saved: they follow from the config.
    mine = _computed_buffers(base)
    for name, value in deployed.tensors():
        key = f"{name}.weight" if isinstance(value, Target) else name
        if key not in found:
            keys.append(f"{key} (missing)")
            continue
        expected.add(found[key].data_ptr())
        if isinstance(value, Target):
            weight = deployed.quantize(value).weight
            if not torch.equal(weight.cpu(), _out_first(loaded.model, name)):
                layers.append(name)
        elif not torch.equal(value.cpu(), found[key].cpu()):
            others.append(name)
    for name, tensor in found.items():
        inside = any(name.startswith(f"{target}.") for target in deployed.targets)
        own = mine.get(name)
        # `model.to(dtype)` also casts what is computed; a loaded model keeps it in float32.
        if own is not None and not torch.equal(own.cpu(), tensor.to(own.dtype).cpu()):
            others.append(name)
        elif own is None and not inside and tensor.data_ptr() not in expected:
            keys.append(f"{name} (unexpected)")
    return Verification(
        loader=loaded.loader,
        layers=len(deployed.targets),
        different_layers=tuple(layers),
        different_tensors=tuple(others),
        keys=tuple(keys),
        logits_difference=difference,
        logits_agree=agree,
        problems=tuple(reader.problems(path)),
        bytes=directory_bytes(path),
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not part of the saved model, by name."""
    return {
        f"{name}.{kind}" if name else kind: buffer
        for name, module in model.named_modules()
        for kind, buffer in module._buffers.items()
        if kind in module._non_persistent_buffers_set and buffer is not None
    }


def _out_first(model: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer, (out, in)."""
    module = model.get_submodule(name)
    weight = model.get_parameter(f"{name}.weight").detach().cpu()
    return weight if isinstance(module, nn.Linear | nn.Embedding) else weight.T


def _wrong_keys(loaded: Loaded) -> list[str]:
    """What the loader did not find, did not want, or could not fit."""
    kinds = {
        "missing_keys": "missing",
        "unexpected_keys": "unexpected",
        "mismatched_keys": "of another shape",
        "error_msgs": "error",
    }
    return [
        f"{key} ({words})"
        for kind, words in kinds.items()
        for key in sorted(map(str, loaded.report.get(kind) or ()))
    ]


def _compare_outputs(
    model: Model, loaded: PreTrainedModel, adapter_name: str
) -> tuple[float | None, bool]:
    """The largest difference of a logit, and whether another order of summation explains it."""
    inputs = _example(loaded)
    if inputs is None:
        return None, True
    theirs = _outputs(loaded(**inputs))
    with _running(model, adapter_name):
        mine = _outputs(model(**{name: value.to(model.device) for name, value in inputs.items()}))
    if mine.shape != theirs.shape:
        return float("inf"), False
    difference = float((mine - theirs).abs().max())
    config = config_of(model, adapter_name)
    if config.activation_grid is not None or config.kv_cache_grid is not None:
        # A runtime rounds inputs by its own arithmetic, or not at all.
        return difference, True
    # Half of the digits of the dtype.
    tolerance = torch.finfo(loaded.dtype).eps ** 0.5 * float(mine.abs().max())
    return difference, difference <= tolerance


def _example(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Inputs of one row; None for a model that reads neither tokens nor pixels."""
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.arange(32)[None] % config.get_text_config().vocab_size
        return {"input_ids": ids} | (
            {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        )
    if model.main_input_name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        sides = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.linspace(-1, 1, config.num_channels * sides[0] * sides[1])
        return {"pixel_values": pixels.view(1, config.num_channels, *sides).to(model.dtype)}
    return None


def _outputs(output: ModelOutput) -> Tensor:
    """The logits, or whatever the model answers with, in one row."""
    values = [output["logits"]] if "logits" in output else list(output.values())
    parts = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.cat([part.float().cpu().flatten() for part in parts])


@contextmanager
def _running(model: Model, adapter_name: str) -> Iterator[None]:
    """``model`` in eval mode with one adapter active; afterwards as it was."""
    training = {module for module in model.modules() if module.training}
    active = list(model.active_adapters) if isinstance(model, PeftModel) else [adapter_name]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    merged = {
        layer: list(layer.merged_adapters)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and layer.merged
    }
    model.eval()
    if active != [adapter_name]:
        for layer in merged:  # another adapter cannot be set before
            layer.unmerge()
        model.set_adapter(adapter_name)
    try:
        yield
    finally:
        if active != [adapter_name]:
            cast(LRQATModel, model.base_model).set_adapter(active)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            for layer, names in merged.items():
                layer.merge(adapter_names=names)
        for module in training:
            module.training = True
