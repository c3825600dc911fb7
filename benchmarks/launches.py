"""Kernels that a layer launches and times that it makes the host wait, counted without a GPU.

Tensors are on the meta device, which has shapes and dtypes but no values, and the layer takes the
way it takes on a GPU with Triton: an operator that computes something counts as one kernel, as does
one launch of ours; views and empty tensors count as none. What reads a value of the device counts
as a wait, and reads a number of clipped weights (`--clipped`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_lrqat import LRQATConfig, LRQATLinear
from peft_lrqat.quant import triton_ops
from peft_lrqat.shared.tensor_cache import TensorCache


ROWS = COLUMNS = 4096
TOKENS = 2048
RANK = 32
# Operators that only make room or look at tensors.
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique"}


class Launches(TorchDispatchMode):
    """Counts what is dispatched for meta tensors; each value read from the device is ``number``."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number, self.kernels, self.waits = number, Counter(), Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
            return self.number
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors) and not func.is_view and name not in FREE:
            self.kernels[name] += 1
        return result


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within, layers on the meta device, which has no autocast, take Triton's kernels."""
    with (
        patch.object(triton_ops, "serves_device", lambda device: True),
        patch.object(torch, "is_autocast_enabled", lambda device_type: False),
        patch.object(torch, "autocast", lambda device_type, enabled: nullcontext()),
    ):
        yield


def lora() -> nn.Module:
    linear = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16, device="meta")
    config = LoraConfig(r=RANK, target_modules=["0"])
    return get_peft_model(nn.Sequential(linear), config).to("meta").train()


def lrqat(**settings: Any) -> nn.Module:
    """A layer whose weight is zero; the meta device forgets it."""
    config = LRQATConfig(r=RANK, range_estimator="minmax", verify_base=False, **settings)
    linear = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(linear.weight)
    weight_format = config.weight_format("layer", COLUMNS)
    layer = LRQATLinear(linear, "default", weight_format, config, cache=TensorCache())
    return layer.to("meta").train()


def training_step(layer: nn.Module, number: int) -> Launches:
    """Forward and backward pass, after one that warms up."""
    x = torch.empty(TOKENS, COLUMNS, dtype=torch.bfloat16, device="meta", requires_grad=True)
    for _ in range(2):
        layer.zero_grad()
        x.grad = None
        with as_on_a_gpu(), Launches(number) as launches:
            y = layer(x)
            y.backward(torch.empty_like(y))
    return launches


def generation(layer: nn.Module) -> Launches:
    """One token through a layer that holds its weight."""
    x = torch.empty(1, COLUMNS, dtype=torch.bfloat16, device="meta")
    layer.eval()
    for _ in range(2):
        with as_on_a_gpu(), torch.no_grad(), Launches() as launches:
            layer(x)
    return launches


SETTINGS: dict[str, Callable[[int], Launches]] = {
    "LoRA (PEFT)": lambda clipped: training_step(lora(), clipped),
    "LR-QAT, one scale per row": lambda clipped: training_step(lrqat(), clipped),
    "LR-QAT, groups of 128": lambda clipped: training_step(lrqat(group_size=128), clipped),
    "LR-QAT, int4 storage": lambda clipped: training_step(lrqat(downcast="int"), clipped),
    "LR-QAT, asymmetric": lambda clipped: training_step(lrqat(symmetric=False), clipped),
    "LR-QAT, held weight, one token": lambda clipped: generation(lrqat()),
}


def count(clipped: int = 0) -> dict[str, dict[str, int]]:
    """Kernels and waits of a 4096 x 4096 layer on 2048 tokens, with a number of clipped weights."""
    found = {name: run(clipped) for name, run in SETTINGS.items()}
    return {
        name: {"kernels": run.kernels.total(), "waits": run.waits.total()}
        for name, run in found.items()
    }
