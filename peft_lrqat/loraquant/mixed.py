"""Batches whose rows run on different adapters, in several threads at once.

A forward pass hands the adapters of its rows to the layers through a context variable: hooks that
are put on the layers for the time of a call, as PEFT does it, would reach the calls of all threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


@dataclass(frozen=True)
class Rows:
    """The adapters of the rows of a batch."""

    names: tuple[str, ...]
    beams: int
    in_encoder: frozenset[nn.Module]

    def names_for(self, module: nn.Module) -> list[str]:
        """The adapter of each row; beams are further rows, except in an encoder."""
        repeat = 1 if module in self.in_encoder else self.beams
        return [name for name in self.names for _ in range(repeat)]


_ROWS: ContextVar[Rows | None] = ContextVar("adapters of the rows of a batch", default=None)
_LOCK = Lock()


def names_for(module: nn.Module) -> list[str] | None:
    """The adapter of each row that a layer is called with now; None: the active adapter's."""
    if torch.compiler.is_compiling():
        return None
    rows = _ROWS.get()
    return None if rows is None else rows.names_for(module)


@contextmanager
def rows_run_on(rows: Rows, model: nn.Module, layer_class: type[nn.Module]) -> Iterator[None]:
    """Runs the calls of the block, in this thread, with an adapter for each row."""
    if torch.compiler.is_compiling():  # which knows no context variable
        with _hooks_for_a_call(rows, model, layer_class):
            yield
        return
    _hook_wrappers(model)
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def _hand_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The forward pre-hook of PEFT's own wrappers, which take the names as an argument."""
    names = names_for(module)
    return None if names is None else (args, {**kwargs, "adapter_names": names})


def modules_now(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` and their modules, while other threads may add or delete adapters.

    ``model.modules()`` walks dictionaries that must not change meanwhile; a copy of each is taken
    in one step.
    """
    found, seen, left = [], set(), [model]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append(module)
        left += [child for child in module._modules.copy().values() if child is not None]
    return found


def _hook_wrappers(model: nn.Module) -> None:
    with _LOCK:
        for module in modules_now(model):
            if not isinstance(module, AuxiliaryTrainingWrapper):
                continue
            if _hand_on not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_hand_on, with_kwargs=True)


def _given(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


@contextmanager
def _hooks_for_a_call(rows: Rows, model: nn.Module, layer_class: type[nn.Module]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(
            partial(_given, names=rows.names_for(module)), with_kwargs=True
        )
        for module in modules_now(model)
        if isinstance(module, layer_class | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
