"""The deployed weights of an LR-QAT model, a layer at a time: as they are described and shipped."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.downcast import DowncastLinear
from ..base.embedding import DowncastEmbedding
from ..formats.linear import QuantizedLinear, Target
from ..lrqat.config import LRQATConfig
from ..lrqat.layer import LRQATLayer, rows_of
from ..quant import quantized_codes, quantized_weight
from ..quant.grid import SCALE_DTYPES


# The adapter's name where a low-bit base has none.
NO_ADAPTER = ""
Layer = LRQATLayer | DowncastLinear
Model: TypeAlias = "PeftModel | PreTrainedModel"


def base_of(model: Model) -> PreTrainedModel:
    """The model of transformers inside PEFT's."""
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, inside)


def adapter_to_export(model: Model, adapter_name: str | None) -> str:
    """The name of the adapter; ValueError for one that the model does not have."""
    known = sorted(model.peft_config) if isinstance(model, PeftModel) else []
    if adapter_name is not None and adapter_name not in known:
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, but the model has {known or 'no adapter'}"
        )
    if adapter_name is not None or not isinstance(model, PeftModel):
        return adapter_name or NO_ADAPTER
    return next((name for name in model.active_adapters if name in known), known[0])


def config_of(model: Model, adapter_name: str) -> LRQATConfig:
    """The config of an LR-QAT adapter; for a low-bit base without one, what describes it."""
    if isinstance(model, PeftModel):
        return cast(LRQATConfig, model.peft_config[adapter_name])
    made: Any = base_of(model).config.quantization_config
    given: dict[str, Any] = {
        name: getattr(made, name)
        for name in (
            *("bits", "group_size", "symmetric", "balanced", "k_quant"),
            *("downcast", "scale_dtype"),
        )
    }
    for name in ("bits_pattern", "group_size_pattern"):
        given[name] = dict(getattr(made, name))
    config = LRQATConfig(**given)
    config.base_model_name_or_path = made.made_from
    return config


def lrqat_layers(model: PeftModel) -> dict[str, LRQATLayer]:
    """The target layers by their names in the base model."""
    layers = base_of(model).named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, LRQATLayer)}


def low_bit_layers(model: Model) -> dict[str, Layer]:
    """All layers that hold integers by their names in the base model, with adapters or without."""
    modules = base_of(model).named_modules()
    found = {name: layer for name, layer in modules if isinstance(layer, Layer)}
    inside = {f"{name}.base_layer" for name in found}
    return {name: layer for name, layer in found.items() if name not in inside}


def has_factors(layer: Layer, adapter_name: str) -> bool:
    """Whether an adapter decides the integers of a layer; otherwise they are the frozen ones."""
    return isinstance(layer, LRQATLayer) and adapter_name in layer.lrqat_A


def frozen_of(layer: Layer) -> DowncastLinear:
    """The frozen layer."""
    return layer.base_layer if isinstance(layer, LRQATLayer) else layer


def target_of(name: str, layer: Layer) -> Target:
    """What is known of a layer before its integers are computed."""
    base = frozen_of(layer)
    return Target(
        name=name,
        grid=base.format.grid,
        scale_dtype=base.format.scale_dtype,
        out_features=layer.out_features,
        in_features=layer.in_features,
        is_conv1d=base.transposed,
        experts=base.experts,
        is_embedding=isinstance(base, DowncastEmbedding),
        dtype=base.dtype,
    )


@torch.no_grad()
def quantized_linear(name: str, layer: Layer, adapter_name: str) -> QuantizedLinear:
    """What one layer ships under one adapter."""
    if not isinstance(layer, LRQATLayer) or not has_factors(layer, adapter_name):
        return _frozen_linear(name, frozen_of(layer))
    parts = list(layer.low_rank_weights(adapter_name))
    format = layer.base_layer.format
    step = rows_of(weight.step() for weight in parts)
    return QuantizedLinear(
        name=name,
        grid=format.grid,
        codes=rows_of(map(quantized_codes, parts)),
        scale=step.float().to(SCALE_DTYPES[format.scale_dtype]),
        zero_point=layer.base_layer.frozen("zero_point"),
        weight=rows_of(map(quantized_weight, parts)),
        is_conv1d=layer.base_layer.transposed,
        experts=layer.base_layer.experts,
    )


def _frozen_linear(name: str, base: DowncastLinear) -> QuantizedLinear:
    """The integers that ``base`` holds, whose downcast is ``int``."""
    format, zero_point = base.format, base.frozen("zero_point")
    codes = format.decode(base.frozen("phi"))
    return QuantizedLinear(
        name=name,
        grid=format.grid,
        codes=codes.to(torch.int8 if format.grid.symmetric else torch.uint8),
        scale=base.frozen("scale0").to(SCALE_DTYPES[format.scale_dtype]),
        zero_point=zero_point,
        weight=base.stored_weight(),
        is_conv1d=base.transposed,
        experts=base.experts,
    )
