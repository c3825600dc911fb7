"""Dynamic quantisation per token: errors, zeros, gradients, and rounding twice."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peft_lrqat.quant import (
    Grid,
    LowRankWeight,
    WeightFormat,
    decode_tokens,
    encode_tokens,
    fake_quant_linear,
    fake_quantize_tokens,
    quantized_tokens,
)


GRIDS = [
    Grid(bits=bits, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)
]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def step_of(x, grid):
    """Returns the step by its definition: the token's range, with zero, over the grid's steps."""
    x = x.double()
    if grid.symmetric:
        return x.abs().amax(-1, keepdim=True) / grid.qmax
    return (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / (
        2**grid.bits - 1
    )


def tokens(dtype, seed=0):
    """Makes tokens of both signs, of one sign, far from zero, tiny, with an outlier, and zeros."""
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
    x[1].abs_()
    x[2].abs_().neg_()
    x[3] += 50
    x[4] *= 1e-4
    x[5, 7] = 100
    x[6] = 0
    return x.to(dtype)


@grids
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_is_at_most_half_a_step(grid, dtype):
    x = tokens(dtype)
    rounded = quantized_tokens(x, grid)
    assert (rounded.dtype, rounded.shape) == (dtype, x.shape)
    # Storing the result in `dtype` rounds once more, by up to half a unit in its last place.
    storing = rounded.double().abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    assert ((rounded - x).double().abs() <= 0.50001 * step_of(x, grid) + storing).all()


@grids
def test_at_most_as_many_values_as_the_grid_has(grid):
    for token in quantized_tokens(torch.randn(6, 4096), grid):
        assert len(token.unique()) <= 2**grid.bits


@grids
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_stays_zero(grid, dtype):
    x = tokens(dtype)
    x[:, ::3] = 0
    assert (quantized_tokens(x, grid)[:, ::3] == 0).all()


@grids
def test_each_token_has_its_own_range(grid):
    x = torch.randn(2, 5, 16)
    alone = torch.stack(
        [torch.stack([quantized_tokens(token, grid) for token in row]) for row in x]
    )
    assert torch.equal(quantized_tokens(x, grid), alone)


@grids
@pytest.mark.parametrize("factor", [2.0**-20, 0.5, 2.0**10])
def test_a_power_of_two_changes_the_step_alone(grid, factor):
    x = torch.randn(5, 16)
    assert torch.equal(quantized_tokens(x * factor, grid), quantized_tokens(x, grid) * factor)


@given(
    seed=st.integers(0, 2**20),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    spread=st.floats(-3, 3),
)
@settings(deadline=None, max_examples=60)
def test_rounding_again_changes_no_integer(seed, bits, symmetric, spread):
    """Values from a low-bit cache may therefore be rounded again.

    The integers stay the same, and the step differs only by its rounding.
    """
    grid = Grid(bits=bits, symmetric=symmetric)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 64, generator=generator) + spread
    codes, step, zero_point = encode_tokens(x, grid)
    again = encode_tokens(decode_tokens(codes, step, zero_point, torch.float32), grid)
    # Zero is part of the range; a zero point halfway between two integers can leave the upper end
    # out.
    if not symmetric:
        ends = torch.cat([codes, zero_point], -1)
        assume(((ends.amax(-1) == grid.qmax) & (ends.amin(-1) == 0)).all())
        assert torch.equal(again[2], zero_point)
    assert torch.equal(again[0], codes)
    torch.testing.assert_close(again[1], step, rtol=1e-6, atol=0)


@grids
def test_encoded_and_decoded_is_quantized(grid):
    for dtype in FLOATS[1:]:
        x = tokens(dtype)
        codes, step, zero_point = encode_tokens(x, grid)
        assert codes.dtype == (torch.int8 if grid.symmetric else torch.uint8)
        assert (zero_point is None) == grid.symmetric
        assert ((codes >= grid.qmin) & (codes <= grid.qmax)).all()
        assert torch.equal(decode_tokens(codes, step, zero_point, dtype), quantized_tokens(x, grid))


@grids
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(grid, bad):
    x = torch.randn(3, 8)
    x[1, 2] = bad
    rounded = quantized_tokens(x, grid)
    assert rounded[1].isnan().any()
    assert rounded[[0, 2]].isfinite().all()
    assert torch.equal(rounded[0], quantized_tokens(x[0], grid))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (4,)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_shapes(shape, symmetric):
    x = torch.randn(shape)
    rounded = quantized_tokens(x, Grid(bits=4, symmetric=symmetric))
    assert rounded.shape == x.shape
    if shape == (1, 1):  # one value is an end of its range
        torch.testing.assert_close(rounded, x)


@grids
def test_input_is_not_written_to(grid):
    x = torch.randn(3, 8)
    before = x.clone()
    quantized_tokens(x, grid)
    encode_tokens(x, grid)
    assert torch.equal(x, before)


@grids
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_is_the_identity(grid, dtype):
    x, upstream = tokens(dtype).requires_grad_(), torch.randn(8, 24).to(dtype)
    y = fake_quantize_tokens(x, grid)
    assert torch.equal(y.detach(), quantized_tokens(x, grid))
    y.backward(upstream)
    assert torch.equal(x.grad, upstream)


def low_rank(bits=4, out=6, width=16):
    format = WeightFormat(
        grid=Grid(bits=bits), downcast="fixed8", scale_dtype="float32", in_features=width
    )
    return LowRankWeight(
        format=format,
        phi=format.encode(torch.randn(out, width) * 3),
        zero_point=None,
        A=torch.randn(4, width, requires_grad=True),
        B=torch.randn(out, 4, requires_grad=True),
        scale=torch.rand(out, 1).add_(0.1).requires_grad_(),
        gamma=1.0,
        dtype=torch.float32,
    )


@grids
def test_linear_with_activations_is_linear_of_rounded_ones(grid):
    """This holds for the value and all gradients; that of the input goes straight through."""
    w, x, bias = low_rank(), torch.randn(3, 5, 16), torch.randn(6)
    gradients = []
    for layer in (
        lambda x: fake_quant_linear(x, w, bias, grid),
        lambda x: fake_quant_linear(fake_quantize_tokens(x, grid), w, bias),
    ):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [leaf, w.A, w.B, w.scale])])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_layers_that_share_an_input_share_what_is_kept_of_it():
    kept = []
    x = torch.randn(64, 16, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        for _ in range(3):
            fake_quant_linear(x, low_rank(), None, Grid(bits=8))
    assert kept.count(x.data_ptr()) == 3


def test_grid_is_a_value():
    grid = Grid(bits=8, symmetric=False)
    assert copy.deepcopy(grid) == grid
