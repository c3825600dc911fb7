"""The grid's ends, its groups and its step."""

import pytest
import torch

from peft_lrqat.quant import Grid, effective_scale


@pytest.mark.parametrize("bits", range(2, 9))
def test_ends(bits):
    symmetric, asymmetric = Grid(bits=bits), Grid(bits=bits, symmetric=False)
    assert (symmetric.qmin, symmetric.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (asymmetric.qmin, asymmetric.qmax) == (0, 2**bits - 1)


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 1), ("bits", 9), ("group_size", 0), ("group_size", -2)]
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .* but is {value}"):
        Grid(**{"bits": 4, field: value})


def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match="96 does not divide 256; use 64"):
        Grid(bits=4, group_size=96).num_groups(256)
    with pytest.raises(ValueError, match="does not divide 172; use -1"):
        Grid(bits=4, group_size=32).num_groups(172)


@pytest.mark.parametrize(("group_size", "groups"), [(-1, 1), (4, 3), (12, 1), (1, 12)])
def test_expand_repeats_each_group_over_its_weights(group_size, groups):
    grid = Grid(bits=4, group_size=group_size)
    assert grid.num_groups(12) == groups
    per_group = torch.arange(2.0 * groups).view(2, groups)
    expanded = grid.expand(per_group, 12).expand(2, 12)
    assert torch.equal(
        grid.split(expanded), per_group.unsqueeze(-1).expand(2, groups, 12 // groups)
    )


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_the_step_is_a_value_of_its_dtype_and_positive(scale_dtype):
    dtype = getattr(torch, scale_dtype)
    scale = torch.tensor([1.0, 1 / 3, 1e-20, 0.0, -5.0, 1e20])
    step = effective_scale(scale, scale_dtype)
    assert step.dtype == torch.float32
    assert torch.equal(step, step.to(dtype).float())
    assert (step > 0).all()
    assert torch.isfinite(step).all()
    assert torch.equal(step[:2], scale[:2].to(dtype).float())


@pytest.mark.parametrize("group_size", [-1, 4, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_units_and_values_are_inverse(symmetric, group_size):
    grid = Grid(bits=4, symmetric=symmetric, group_size=group_size)
    groups = grid.num_groups(12)
    scale = 2.0 ** torch.randint(-3, 3, (5, groups))
    zero_point = None if symmetric else torch.randint(0, 16, (5, groups), dtype=torch.uint8)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (5, 12)).float()
    weight = grid.values(codes.clone(), scale, zero_point)
    offset = 0 if symmetric else grid.expand(zero_point.float(), 12)
    assert torch.equal(weight, grid.expand(scale, 12) * (codes - offset))
    assert torch.equal(grid.units(weight, scale, zero_point), codes)
