"""What rounding a weight to few bits costs, estimated from gradients, and the best use of a budget.

Near the trained weights, rounding changes the loss by about ``sum F * (W_hat - W)^2 / 2``, where F
is the diagonal of the Fisher information. Squared gradients of batches estimate F (Dong et al.,
"HAWQ-V2", arXiv 1911.03852, has the same form with the Hessian's trace). The scale of F does not
matter: costs are only compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quant import WeightFormat
from ..shared.frozen import frozen
from .calibrate import Ranges
from .replay import Batch
from .weights import rounded, store


Key = TypeVar("Key")
# What each number of bits costs.
Costs = Mapping[int, float]


def _matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """A weight or its gradient as (out, in)."""
    return tensor.T if isinstance(module, Conv1D) else tensor


def measure_costs(
    model: nn.Module,
    batches: Sequence[Batch],
    formats: Mapping[str, Mapping[int, WeightFormat]],
    ranges: Ranges,
    done: Callable[[], object] = lambda: None,
) -> dict[str, dict[int, float]]:
    """Estimates what rounding each weight costs, at each number of bits.

    A gradient is used and dropped as soon as the backward pass has made it, so that memory holds
    that of one weight.

    Args:
        model: gives a ``loss`` for each batch; it is left as it was.
        batches: with labels; one backward pass for each.
        formats: of each target, by name and by bits.
        ranges: how scales are found.
        done: called after each batch.

    Raises:
        ValueError: if a batch has no loss, or a gradient is missing or not finite.
    """
    costs = {name: dict.fromkeys(by_bits, 0.0) for name, by_bits in formats.items()}
    modules = {name: model.get_submodule(name) for name in formats}
    weights = {name: cast("nn.Parameter", module.weight) for name, module in modules.items()}
    found: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}

    def add(name: str) -> None:
        weight = weights[name]
        assert weight.grad is not None
        squared = _matrix(modules[name], weight.grad).float().square_()
        weight.grad = None
        plain = _matrix(modules[name], weight.detach()).float()
        for bits, format in formats[name].items():
            if (name, bits) not in found:
                found[name, bits] = ranges.find(plain, format)
            stored = store(plain, *found[name, bits], format)
            error = rounded(stored, format, plain.dtype).sub_(plain).square_()
            cost = float(error.mul_(squared).sum(dtype=torch.float64))
            if cost != cost or cost == float("inf"):
                raise ValueError(
                    f"the gradient of `{name}` is not finite; use a model in float32 or bfloat16"
                )
            costs[name][bits] += cost
        reached.add(name)

    training, reached = model.training, set[str]()
    hooks = []
    try:
        model.eval()
        with frozen(model), torch.enable_grad():
            for name, weight in weights.items():
                weight.requires_grad_(True)
                hook = weight.register_post_accumulate_grad_hook(lambda _, name=name: add(name))
                hooks.append(hook)
            for batch in batches:
                loss = model(**batch).loss
                if loss is None:
                    raise ValueError("the model gives no loss; add labels to the data")
                loss.backward()
                done()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if missing := [name for name in formats if name not in reached]:
        raise ValueError(
            f"the loss does not depend on {len(missing)} of the targets, such as `{missing[0]}`; "
            "leave them out with `exclude_modules`"
        )
    return costs


def spend(costs: Mapping[Key, Costs], sizes: Mapping[Key, int], average: float) -> dict[Key, int]:
    """Bits for each weight: at most ``average`` per element, at about the least sum of costs.

    All start with the fewest bits. Then the step that saves most per bit comes first, where steps
    follow the lower convex hull of each weight's costs.

    Args:
        costs: by weight and by bits.
        sizes: elements of each weight.
        average: bits per element, over all.

    Raises:
        ValueError: if the fewest bits exceed the budget.
    """
    chosen = {key: min(by_bits) for key, by_bits in costs.items()}
    left = sum(sizes[key] * (average - bits) for key, bits in chosen.items())
    if left < -1e-6 * sum(sizes.values()):
        least = sum(sizes[key] * bits for key, bits in chosen.items()) / sum(sizes.values())
        raise ValueError(
            f"`average_bits` must be at least {least:g}, the fewest bits, but is {average:g}"
        )
    steps = [
        ((start_cost - end_cost) / (sizes[key] * (end - start)), key, start, end)
        for key, by_bits in costs.items()
        for (start, start_cost), (end, end_cost) in _hull_steps(by_bits)
    ]
    for _, key, start, end in sorted(steps, key=lambda step: -step[0]):
        price = sizes[key] * (end - start)
        # A step after one that was too dear has another start.
        if chosen[key] == start and price <= left + 1e-6 * sizes[key]:
            chosen[key] = end
            left -= price
    return chosen


def _hull_steps(costs: Costs) -> list[tuple[tuple[int, float], tuple[int, float]]]:
    """Steps to more bits, each saving less per bit than the one before it."""
    points = sorted(costs.items())
    at = points[0]
    steps: list[tuple[tuple[int, float], tuple[int, float]]] = []
    while True:
        better = [point for point in points if point[0] > at[0] and point[1] < at[1]]
        if not better:
            return steps
        best = max(better, key=lambda point: (at[1] - point[1]) / (point[0] - at[0]))
        steps.append((at, best))
        at = best
