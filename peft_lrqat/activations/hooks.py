"""Merged layers that go on rounding their input, as they did in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..quant import Grid, fake_quantize_tokens


logger = logging.get_logger(__name__)


class InputQuantization:
    """The forward pre-hook of a merged layer: rounds its input as in training."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return fake_quantize_tokens(x, self.grid), *others


def round_inputs(linear: nn.Module, grid: Grid) -> None:
    """Lets a plain layer round its input; the hook lasts as long as the layer."""
    linear.register_forward_pre_hook(InputQuantization(grid))
    say_what_is_not_saved()


def say_what_is_not_saved() -> None:
    """Warns, once, that a merged model's files hold only its weights."""
    logger.warning_once(
        "the merged model goes on rounding its activations as in training, in this process: "
        "`save_pretrained` writes its weights alone, and what is loaded from there computes with "
        "16-bit activations. `export_model` writes both if the format can hold them"
    )
