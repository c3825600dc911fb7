"""Routers, which choose the experts of a token and stay as they are."""

from __future__ import annotations

from torch import nn


def is_router(module: nn.Module) -> bool:
    """Whether it is a linear layer that chooses experts, as some mixtures have it (PhiMoE)."""
    kind = type(module)
    of_a_model = kind.__module__.startswith("transformers.models.")
    return of_a_model and isinstance(module, nn.Linear) and kind.__name__.endswith("Router")
