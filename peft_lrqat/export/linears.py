"""The deployed weights of an LR-QAT model, a layer at a time: as they are described and shipped."""

from __future__ import annotations

from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..formats.linear import QuantizedLinear, Target
from ..lrqat.config import LRQATConfig
from ..lrqat.layer import LRQATLayer
from ..quant import quantized_codes, quantized_weight
from ..quant.grid import SCALE_DTYPES


def base_of(model: PeftModel) -> PreTrainedModel:
    """The model of transformers inside PEFT's."""
    return cast(PreTrainedModel, model.get_base_model())


def config_of(model: PeftModel, adapter_name: str) -> LRQATConfig:
    """The config of an LR-QAT adapter."""
    return cast(LRQATConfig, model.peft_config[adapter_name])


def lrqat_layers(model: PeftModel) -> dict[str, LRQATLayer]:
    """The target layers by their names in the base model."""
    layers = base_of(model).named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, LRQATLayer)}


def target_of(name: str, layer: LRQATLayer) -> Target:
    """What is known of a layer before its integers are computed."""
    base = layer.base_layer
    return Target(
        name=name,
        grid=base.format.grid,
        scale_dtype=base.format.scale_dtype,
        out_features=layer.out_features,
        in_features=layer.in_features,
        is_conv1d=base.is_conv1d,
        dtype=base.dtype,
    )


@torch.no_grad()
def quantized_linear(name: str, layer: LRQATLayer, adapter_name: str) -> QuantizedLinear:
    """What one layer ships under one adapter."""
    weight = layer.low_rank_weight(adapter_name)
    format = weight.format
    return QuantizedLinear(
        name=name,
        grid=format.grid,
        codes=quantized_codes(weight),
        scale=weight.step().float().to(SCALE_DTYPES[format.scale_dtype]),
        zero_point=weight.zero_point,
        weight=quantized_weight(weight),
        is_conv1d=layer.base_layer.is_conv1d,
    )
