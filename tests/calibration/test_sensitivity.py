"""Costs of rounding follow the formula, and a budget is spent where it saves most."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_lrqat.calibration.calibrate import Ranges
from peft_lrqat.calibration.sensitivity import measure_costs, spend
from peft_lrqat.quant import Grid, WeightFormat, estimate_range


WIDTHS = (2, 3, 4)


def formats_for(model, symmetric=True):
    return {
        name: {
            bits: WeightFormat(
                grid=Grid(bits=bits, symmetric=symmetric, group_size=16),
                downcast="int",
                scale_dtype="bfloat16",
                in_features=module.in_features,
            )
            for bits in WIDTHS
        }
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def batches_of(rows=(4, 3)):
    made = [torch.randint(3, 90, (n, 16)) for n in rows]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def naive_error(weight, format):
    """``W_hat - W`` by the definition of the grid."""
    grid = format.grid
    scale, zero = estimate_range(weight, grid, estimator="minmax", scale_dtype="bfloat16", p=4.0)
    s = scale.repeat_interleave(16, dim=1)
    z = 0 if grid.symmetric else zero.float().repeat_interleave(16, dim=1)
    codes = ((weight / s).round() + z).clamp(grid.qmin, grid.qmax)
    return s * (codes - z) - weight


@pytest.mark.parametrize("symmetric", [True, False])
def test_costs_follow_the_formula(symmetric, make_base):
    model, data = make_base("llama"), batches_of()
    formats = formats_for(model, symmetric)
    expected = {name: dict.fromkeys(WIDTHS, 0.0) for name in formats}
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, by_bits in expected.items():
            weight = model.get_submodule(name).weight
            for bits in by_bits:
                error = naive_error(weight.detach(), formats[name][bits])
                by_bits[bits] += float((error * weight.grad).square().sum())
    model.zero_grad()
    found = measure_costs(model, data, formats, Ranges(estimator="minmax", p=4.0))
    assert found.keys() == expected.keys()
    for name, by_bits in expected.items():
        # A value on the border between two grid points may round either way.
        assert found[name] == pytest.approx(by_bits, rel=1e-3)


def test_the_model_is_left_as_it_was(make_base):
    model = make_base("llama").train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    done = []
    ranges = Ranges(estimator="minmax", p=4.0)
    measure_costs(model, batches_of(), formats_for(model), ranges, lambda: done.append(1))
    assert len(done) == 2
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks


def test_what_cannot_be_measured_is_refused(make_base):
    model, ranges = make_base("llama"), Ranges(estimator="minmax", p=4.0)
    (batch,) = batches_of((2,))
    with pytest.raises(ValueError, match="gives no loss; add labels"):
        measure_costs(model, [{"input_ids": batch["input_ids"]}], formats_for(model), ranges)
    model.spare = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="does not depend on 1 of the targets, such as `spare`"):
        measure_costs(model, [batch], formats_for(model), ranges)
    del model.spare
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"gradient of `.*down_proj` is not finite"):
        measure_costs(model, [batch], formats_for(model), ranges)


COSTS = st.lists(
    st.tuples(
        st.lists(st.floats(0, 100), min_size=3, max_size=3).map(lambda c: sorted(c, reverse=True)),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=5,
)


@given(COSTS, st.floats(2, 4))
def test_a_budget_is_kept_and_more_of_it_costs_no_more(made, average):
    costs = {i: dict(zip(WIDTHS, c, strict=True)) for i, (c, _) in enumerate(made)}
    sizes = {i: size for i, (_, size) in enumerate(made)}

    def total(bits):
        return sum(costs[i][b] for i, b in bits.items())

    chosen = spend(costs, sizes, average)
    spent = sum(sizes[i] * b for i, b in chosen.items())
    assert spent <= average * sum(sizes.values()) * (1 + 1e-5)
    assert total(chosen) <= total(dict.fromkeys(costs, 2))
    # Every budget below that the best choices take is no better.
    for bits in product(WIDTHS, repeat=len(costs)):
        other = dict(enumerate(bits))
        if sum(sizes[i] * b for i, b in other.items()) <= spent:
            # The greedy choice misses the best by less than its last step on the hull.
            most = max(max(c.values()) - min(c.values()) for c in costs.values())
            assert total(chosen) <= total(other) + most + 1e-6


def test_equal_weights_get_the_best_bits_there_are():
    costs = {"a": {2: 9.0, 3: 3.0, 4: 1.0}, "b": {2: 5.0, 3: 2.0, 4: 1.0}, "c": {2: 1, 3: 0, 4: 0}}
    sizes = dict.fromkeys(costs, 7)
    for average in (2.0, 7 / 3, 8 / 3, 3.0, 10 / 3, 11 / 3, 4.0):
        chosen = spend(costs, sizes, average)
        best = min(
            sum(c[b] for c, b in zip(costs.values(), bits, strict=True))
            for bits in product(WIDTHS, repeat=3)
            if sum(bits) <= 3 * average + 1e-9
        )
        assert sum(costs[key][bits] for key, bits in chosen.items()) == best


def test_a_width_that_saves_nothing_is_passed_over():
    assert spend({"a": {2: 4.0, 3: 4.0, 4: 0.0}}, {"a": 1}, 4) == {"a": 4}
    assert spend({"a": {2: 4.0, 3: 4.0, 4: 0.0}}, {"a": 1}, 3.5) == {"a": 2}


def test_a_budget_below_the_fewest_bits_is_refused():
    with pytest.raises(ValueError, match="must be at least 2, the fewest bits, but is 1"):
        spend({"a": {2: 1.0, 3: 0.0}}, {"a": 1}, 1.5)
