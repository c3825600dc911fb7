"""A model whose parameters get no gradients for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it, no parameter gets a gradient unless the block turns that on; flags come back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
