"""Where a training run stopped being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def nonfinite_tensors(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the floating-point tensors with NaN or infinite entries."""
    return [
        name
        for name, t in named
        if t is not None and t.is_floating_point() and not bool(torch.isfinite(t.detach()).all())
    ]


@torch.no_grad()
def first_nonfinite_module(
    named: Iterable[tuple[str, nn.Module]], run: Callable[[], Any]
) -> str | None:
    """Calls ``run``; the name of the first of the modules to put out a NaN or an infinity, None if none does."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and nonfinite_tensors(("", t) for t in _tensors(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in named if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
