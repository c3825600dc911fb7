"""What a saved LR-QAT adapter must be before its tensors are loaded into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..shared.names import PREFIX
from .config import LRQATConfig
from .layer import LRQATLayer


logger = logging.get_logger(__name__)
FINGERPRINT = "lrqat_fingerprint"
KINDS = (*LRQATLayer.adapter_layer_names, FINGERPRINT)


def check(
    model: nn.Module, config: LRQATConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless ``state_dict`` is a whole adapter for this model.

    It must have every tensor, finite, in the right shape, made for the frozen weights here.
    """
    layers, prefix = _layers(model, adapter_name)
    for name, layer in layers.items():
        for kind in KINDS:
            value = state_dict.get(_key(state_dict, prefix, name, kind, adapter_name))
            _check_tensor(name, kind, value, getattr(layer, kind)[adapter_name])
    known = tuple(name + "." for name in layers)
    for key, value in state_dict.items():
        if ".lrqat_" not in key:
            _check_finite(f"`{key}`", value)
        elif not key.removeprefix(prefix).startswith(known):
            raise ValueError(
                f"the saved adapter has `{key}`, but this model has no such layer; the base model "
                "is another one"
            )
    foreign = [name for _, name, _ in _foreign(layers, prefix, adapter_name, state_dict)]
    if foreign:
        raise ValueError(
            f"this is not the base model that the adapter was trained on: {len(foreign)} of "
            f"{len(layers)} layers have other frozen weights, the first is `{foreign[0]}`. The "
            f"adapter needs `{config.base_model_name_or_path}` in {config.base_dtype} or wider. "
            "To load it anyway: `config = PeftConfig.from_pretrained(...)`, "
            "`config.verify_base = False`, and give `config=config` to `PeftModel.from_pretrained`"
        )


def adopt_base(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same adapter as one that was trained on the frozen weights of ``model``; warns if not."""
    layers, prefix = _layers(model, adapter_name)
    found = list(_foreign(layers, prefix, adapter_name, state_dict))
    if found:
        logger.warning(
            f"the adapter was trained on other base weights in {len(found)} layers; loaded because "
            "of `verify_base=False`"
        )
    fingerprints = {key: torch.tensor(layer.base_layer.fingerprint) for key, _, layer in found}
    return {**state_dict, **fingerprints}


def _check_tensor(name: str, kind: str, value: Tensor | None, expected: Tensor) -> None:
    if value is None:
        raise ValueError(
            f"the saved adapter has no `{kind}` for `{name}`; its file is not whole, or for "
            "another model"
        )
    if value.shape != expected.shape:
        raise ValueError(
            f"`{kind}` of `{name}` has shape {tuple(value.shape)} in the saved adapter, but "
            f"{tuple(expected.shape)} in this model; the base model or `adapter_config.json` "
            "differs from the one that was trained"
        )
    _check_finite(f"`{kind}` of `{name}`", value)


def _check_finite(what: str, value: Tensor) -> None:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"{what} has NaN or infinite entries in the saved adapter")


def _layers(model: nn.Module, adapter_name: str) -> tuple[dict[str, LRQATLayer], str]:
    """The layers that have the adapter, and what precedes their names in a state dict."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LRQATLayer) and adapter_name in module.lrqat_A
    }
    # A model that transformers holds without PeftModel has no such prefix in its own names.
    return layers, "" if any(name.startswith(PREFIX) for name in layers) else PREFIX


def _key(
    state_dict: Mapping[str, Tensor], prefix: str, name: str, kind: str, adapter_name: str
) -> str:
    """The key of a tensor, with the prefix or without, whichever is there."""
    key = f"{prefix}{name}.{kind}.{adapter_name}"
    return key if key in state_dict else key.removeprefix(prefix)


def _foreign(
    layers: Mapping[str, LRQATLayer],
    prefix: str,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
) -> Iterator[tuple[str, str, LRQATLayer]]:
    """(key of the fingerprint, name, layer) of layers with another frozen weight than saved."""
    for name, layer in layers.items():
        key = _key(state_dict, prefix, name, FINGERPRINT, adapter_name)
        value = state_dict.get(key)
        if value is None or value.numel() != 1:
            continue
        if not layer.matches_base(adapter_name, value):
            yield key, name, layer
