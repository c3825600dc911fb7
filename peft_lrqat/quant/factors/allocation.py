"""Which components of which layers get bits: a rate-distortion allocation over a whole adapter.

A component of singular value sigma that is quantised to b bits leaves an error of about ``sigma^2 *
e(b)``, with e(0) = 1 and e(b) measured once on Gaussian vectors. The cost of b bits is known: codes
and scales. For each component, take the lower convex hull of (cost, error). The steps along all
hulls, the steepest first, until the budget is used up, leave the least total error of any
allocation with the same cost. The rest of the budget then buys the most it can, on the hull or not.
(One bit is not on it: its scales cost as much as those of two bits.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..packing import packed_bytes
from .groups import MAX_BITS, num_groups
from .residual import quantize_residual
from .svd import squared_error, squared_norm


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Holds what an allocation must know of one layer."""

    singular_values: Tensor  # (r,), of the product as it enters the model, scaled by lora_alpha / r
    rows: int  # m
    columns: int  # n

    def cost(self, bits: int, group_size: int, scale_bits: int) -> int:
        """Returns the bits of storage of one component."""
        if bits == 0:
            return 0
        bytes_of_codes = packed_bytes(self.rows, bits) + packed_bytes(self.columns, bits)
        return 8 * bytes_of_codes + scale_bits * self.groups(group_size)

    def groups(self, group_size: int) -> int:
        """Returns the number of groups of one component."""
        return num_groups(self.rows, group_size) + num_groups(self.columns, group_size)


@lru_cache
def relative_errors(group_size: int) -> tuple[float, ...]:
    """Measures e(0) ... e(MAX_BITS) on Gaussian vectors, with the procedure of residual.py.

    e is ``||b a^T - Q(b) Q(a)^T||^2 / ||b a^T||^2``.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(group_size, 512) * 2
    b, a = (
        torch.randn(8, length, 1, generator=generator, dtype=torch.float32),
        torch.randn(8, 1, length, generator=generator, dtype=torch.float32),
    )
    errors = [1.0]
    for bits in range(1, MAX_BITS + 1):
        found = quantize_residual(
            b, a, torch.full((8, 1), bits), group_size=group_size, scale_dtype=torch.bfloat16
        )
        q_b, q_a = (torch.cat([pairs[0][i].values() for pairs in found]) for i in (0, 1))
        lost = squared_error(b, a, q_b[..., None], q_a[:, None]) / squared_norm(b, a)
        errors.append(float(lost.mean()))
    return tuple(errors)


def allocate(
    layers: Sequence[Layer], budget: int, *, group_size: int, scale_bits: int
) -> list[list[int]]:
    """Returns the bits of every component of every layer, in the order of the singular values.

    Together they take at most ``budget`` bits of storage.
    """
    errors = relative_errors(group_size)
    steps = []  # (gain per bit of storage, layer, component, bits to reach, cost)
    for index, layer in enumerate(layers):
        costs = [layer.cost(bits, group_size, scale_bits) for bits in range(MAX_BITS + 1)]
        hull = _lower_hull(costs, errors)
        for component, energy in enumerate(layer.singular_values.double().square().tolist()):
            for low, high in pairwise(hull):
                cost = costs[high] - costs[low]
                steps.append(
                    (energy * (errors[low] - errors[high]) / cost, index, component, high, cost)
                )
    # The gain falls along a hull, and along the components of a layer; ties go to the earlier one.
    steps.sort(key=lambda step: (-step[0], step[1], step[2], step[3]))
    bits = [[0] * len(layer.singular_values) for layer in layers]
    # Components with a step that cost too much: their later steps start from it.
    closed = set()
    for gain, index, component, high, cost in steps:
        if gain <= 0:
            break
        if (index, component) in closed or cost > budget:
            closed.add((index, component))
            continue
        bits[index][component] = high
        budget -= cost
    _spend(bits, budget, layers, errors, group_size, scale_bits)
    # If singular values are equal, or a step did not fit, a later component may have more bits.
    return [sorted(layer, reverse=True) for layer in bits]


def _spend(
    bits: list[list[int]],
    budget: int,
    layers: Sequence[Layer],
    errors: Sequence[float],
    group_size: int,
    scale_bits: int,
) -> None:
    """Raises ``bits`` where the rest of the budget lowers the error most, until nothing fits."""
    costs = [
        [layer.cost(b, group_size, scale_bits) for b in range(MAX_BITS + 1)] for layer in layers
    ]
    energies = [layer.singular_values.double().square().tolist() for layer in layers]
    while True:
        best = max(
            (
                (energy * (errors[low] - errors[high]), -index, -component, high)
                for index, layer in enumerate(energies)
                for component, energy in enumerate(layer)
                for low in [bits[index][component]]
                for high in range(low + 1, MAX_BITS + 1)
                if costs[index][high] - costs[index][low] <= budget
            ),
            default=(0.0, 0, 0, 0),
        )
        gain, index, component, high = best[0], -best[1], -best[2], best[3]
        if gain <= 0:
            return
        budget -= costs[index][high] - costs[index][bits[index][component]]
        bits[index][component] = high


def _lower_hull(costs: Sequence[int], errors: Sequence[float]) -> list[int]:
    """Returns the bits whose points (cost, error) form the lower convex hull, from 0 bits on."""
    hull: list[int] = []
    for bits in range(len(costs)):
        while len(hull) > 1:
            first, last = hull[-2], hull[-1]
            slope = (errors[last] - errors[first]) / (costs[last] - costs[first])
            if (errors[bits] - errors[first]) / (costs[bits] - costs[first]) > slope:
                break
            hull.pop()
        hull.append(bits)
    return hull
