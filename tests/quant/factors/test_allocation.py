"""Allocation: against all others in a small case, and within the budget."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lrqat.quant.factors.allocation import Layer, allocate, relative_errors
from peft_lrqat.quant.factors.groups import MAX_BITS


OPTIONS = {"group_size": 128, "scale_bits": 16}


def layer(values, rows=256, columns=128):
    return Layer(singular_values=torch.tensor(values), rows=rows, columns=columns)


def spent(layers, bits):
    return sum(la.cost(b, 128, 16) for la, widths in zip(layers, bits) for b in widths)


def modelled_error(layers, bits):
    errors = relative_errors(128)
    return sum(
        float(s) ** 2 * errors[b]
        for la, widths in zip(layers, bits)
        for s, b in zip(la.singular_values, widths)
    )


def test_cost_is_codes_and_scales():
    assert layer([1.0], rows=129, columns=7).cost(3, 128, 16) == 8 * (49 + 3) + 16 * (2 + 1)
    assert layer([1.0]).cost(0, 128, 16) == 0


@pytest.mark.parametrize("group_size", [32, 128])
def test_relative_errors_fall(group_size):
    errors = relative_errors(group_size)
    assert len(errors) == MAX_BITS + 1
    assert errors[0] == 1
    assert all(high < 0.7 * low for low, high in pairwise(errors))
    # Signs keep the share 2 / pi of each vector, and a component has two; finer groups keep a
    # little more.
    assert errors[1] == pytest.approx(1 - (2 / torch.pi) ** 2, abs=0.03)


@given(
    values=st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=6), min_size=1, max_size=4),
    share=st.floats(0, 8),
)
@settings(deadline=None, max_examples=100)
def test_within_the_budget_and_in_order(values, share):
    layers = [layer(sorted(v, reverse=True), rows=100 + 30 * i) for i, v in enumerate(values)]
    budget = int(share * sum((la.rows + la.columns) * len(la.singular_values) for la in layers))
    bits = allocate(layers, budget, **OPTIONS)
    assert spent(layers, bits) <= budget
    assert [len(b) for b in bits] == [len(v) for v in values]
    assert all(b == sorted(b, reverse=True) for b in bits)


@pytest.mark.parametrize("budget", range(2000, 8000, 500))
def test_hardly_any_other_allocation_is_better(budget):
    """Compares with all 5^4 allocations of up to 4 bits.

    Another may be better only by using what is left when no step fits any longer.
    """
    layers = [layer([8.0, 3.0]), layer([4.0, 2.0], rows=128)]
    bits = allocate(layers, budget, **OPTIONS)
    others = ([list(w[:2]), list(w[2:])] for w in product(range(5), repeat=4))
    best = min(modelled_error(layers, other) for other in others if spent(layers, other) <= budget)
    assert modelled_error(layers, bits) <= 1.2 * best


def test_energy_decides_between_layers():
    strong, weak = layer([10.0, 5.0]), layer([0.1, 0.05])
    bits = allocate([strong, weak], 3000, **OPTIONS)
    assert sum(bits[0]) > 0
    assert bits[1] == [0, 0]


@pytest.mark.parametrize(
    ("budget", "bits"), [(500, [[1]]), (700, [[1]]), (900, [[2]]), (1300, [[3]])]
)
def test_what_is_left_buys_what_it_can(budget, bits):
    """One bit is not on the hull, but a small budget may hold just one bit of one component."""
    single = layer([1.0])
    assert (single.cost(1, 128, 16), single.cost(2, 128, 16)) == (432, 816)
    assert allocate([single], budget, **OPTIONS) == bits


def test_zero_products_get_nothing():
    assert allocate([layer([0.0, 0.0]), layer([1.0])], 10**6, **OPTIONS) == [[0, 0], [MAX_BITS]]
