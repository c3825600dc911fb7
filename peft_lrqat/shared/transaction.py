"""A change of a model that is undone as a whole if it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn


@contextmanager
def unchanged_on_failure(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Puts ``model`` back as it was if the block raises, whatever it did to it.

    Modules, parameters and attributes come back, and so do the values of the tensors that loading
    the adapter ``adapter_name`` may write into: its own, and biases. What the block replaces stays
    in memory until it ends.
    """
    modules = [(module, _shallow(vars(module))) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    values = [
        (tensor, tensor.detach().clone())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not tensor.is_meta and _may_be_written(name, adapter_name)
    ]
    try:
        yield
    except BaseException:
        for module, attributes in modules:
            _restore(vars(module), attributes)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def _restore(attributes: dict[str, Any], saved: dict[str, Any]) -> None:
    """Puts back what changed, and nothing else: other threads may use the model."""
    for name in attributes.keys() - saved.keys():
        del attributes[name]
    for name, value in saved.items():
        if name not in attributes or not _same(attributes[name], value):
            attributes[name] = value


def _same(value: Any, saved: Any) -> bool:
    if type(value) is not type(saved) or not isinstance(value, dict | list | set):
        return value is saved
    if isinstance(value, set):
        return value == saved
    if isinstance(value, dict):
        return list(value) == list(saved) and all(value[key] is saved[key] for key in saved)
    return len(value) == len(saved) and all(map(is_, value, saved))


def _may_be_written(name: str, adapter_name: str) -> bool:
    parts = name.split(".")
    return adapter_name in parts or parts[-1] == "bias"


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with containers of their own."""
    return {
        name: value.copy() if isinstance(value, dict | list | set) else value
        for name, value in attributes.items()
    }
