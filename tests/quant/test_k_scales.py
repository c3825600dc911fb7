"""Scales that the K blocks of llama.cpp hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lrqat.quant import Grid, WeightFormat, estimate_range
from peft_lrqat.quant.fake_quant import fake_quant_linear
from peft_lrqat.quant.grid import k_group
from peft_lrqat.quant.k_scales import LARGEST_D, LEAST_D, MOST, largest_minimum, on_blocks, split
from peft_lrqat.quant.low_rank import LowRankWeight


GRIDS = [
    Grid(bits=bits, group_size=group, k_quant=True, **fields)
    for fields in ({}, {"symmetric": False}, {"balanced": True})
    for bits in range(2, 7)
    for group in (16, 32, 64, 128)
    if (k_group(bits, not fields) or 1000) <= group
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=20, deadline=None)
@given(exponent=st.integers(-30, 20), spread=st.floats(0.01, 3), seed=st.integers(0, 2**20))
def test_they_are_what_a_block_holds(grid, exponent, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = 3, 512 // grid.group_size
    scale = 2.0**exponent * (spread * torch.randn(shape, generator=generator)).exp()
    zero = None
    if not grid.symmetric:
        zero = torch.randint(0, grid.qmax + 1, shape, generator=generator).to(torch.uint8)
    found = split(scale, zero, grid)
    assert found.d.shape == (3, 2, 1)
    assert torch.equal(found.k, found.k.round())
    assert (found.k >= 1).all()
    assert (found.k <= MOST).all()
    assert (found.d >= LEAST_D).all()
    assert (found.d <= LARGEST_D).all()
    largest = largest_minimum(grid)
    if largest is not None:
        minimum = 2**grid.bits - 1 if grid.balanced else -grid.qmin
        minima = found.k * (minimum if zero is None else zero.unflatten(1, (2, -1)))
        assert (minima <= largest).all()
    step = found.scale
    assert torch.equal(step.half().float(), step)
    assert torch.equal((step / 2).half().float(), step / 2)
    # What is stored comes out as it is.
    again = split(step, zero, grid)
    assert torch.equal(again.scale, step)
    assert torch.equal(again.d, found.d)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_largest_is_met_and_the_others_are_near(grid):
    zero = None if grid.symmetric else torch.full((4, 256 // grid.group_size), 2)
    scale = torch.rand(4, 256 // grid.group_size) + 1
    found = split(scale, zero, grid)
    # Half a step of k, and half a unit of the last of 7 bits of d.
    assert ((found.scale - scale).abs() <= found.d.flatten(1) * 0.5 + scale / 2**7).all()


def test_the_gradient_passes_straight_through():
    grid = GRIDS[0]
    scale = (torch.rand(3, 32, dtype=torch.float64) + 0.1).requires_grad_()
    upstream = torch.randn(3, 32, dtype=torch.float64)
    (on_blocks(scale, None, grid) * upstream).sum().backward()
    assert torch.equal(scale.grad, upstream)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_has_the_gradients_of_the_formula(symmetric):
    grid = Grid(bits=2, symmetric=symmetric, group_size=16, k_quant=True)
    fmt = WeightFormat(grid=grid, downcast="fixed8", scale_dtype="float16", in_features=256)
    weight = torch.randn(6, 256)
    first, zero = estimate_range(weight, grid, estimator="lp", scale_dtype="float16", p=2.0)
    zero_point = None if symmetric else zero
    assert torch.equal(fmt.step(first, zero_point), first)
    moved = (first * (1 + 0.3 * torch.rand_like(first))).double().requires_grad_()
    factors = {"A": torch.randn(3, 256).double(), "B": torch.randn(6, 3).double()}
    x, upstream = torch.randn(5, 256).double(), torch.randn(5, 6).double()
    w = LowRankWeight(
        format=fmt,
        phi=fmt.encode(grid.units(weight, first, zero_point)),
        zero_point=zero_point,
        scale=fmt.on_grid(moved, zero_point),
        gamma=0.1,
        dtype=torch.float64,
        **factors,
    )
    y = fake_quant_linear(x, w)
    (y * upstream).sum().backward()
    z = fmt.decode(w.phi).double() + 0.1 * factors["B"] @ factors["A"]
    codes = z.round().clamp(grid.qmin, grid.qmax)
    if zero_point is not None:
        codes = codes - grid.expand(zero_point.double(), 256)
    step = moved.detach().requires_grad_()
    exact = split(step.detach(), zero_point, grid).scale.double()
    through = step + (exact - step.detach())
    expected = x @ (grid.expand(through, 256) * codes).T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(moved.grad, step.grad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, "no blocks for symmetric weights of 8 bits; use fewer"),
        ({"bits": 6, "symmetric": False}, "no blocks for asymmetric weights of 6 bits"),
        ({"bits": 4, "group_size": 16}, "groups of 32, 64, 128, but `group_size` is 16"),
        ({"bits": 2, "group_size": 256}, "groups of 16, 32, 64, 128, but `group_size` is 256"),
    ],
    ids=str,
)
def test_grids_that_no_block_holds(fields, message):
    with pytest.raises(ValueError, match=message):
        Grid(k_quant=True, **fields)


def test_widths_and_scales_that_no_block_holds():
    grid = Grid(bits=2, group_size=16, k_quant=True)
    with pytest.raises(ValueError, match="a multiple of 256, but it is 576; leave these"):
        grid.num_groups(576)
    with pytest.raises(ValueError, match="scales in float16, but `scale_dtype` is 'bfloat16'"):
        WeightFormat(grid=grid, downcast="int", scale_dtype="bfloat16", in_features=256)
