"""Vectors at a few bits: levels, scales, groups that do not divide, and the two published grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lrqat.quant.factors.groups import (
    GroupCodes,
    fake_rtn,
    num_groups,
    quantize_midrise,
    quantize_rtn,
)


OPTIONS = {"group_size": 8, "scale_dtype": torch.float32}
BITS = [1, 2, 3, 4, 8]
LENGTHS = [1, 5, 8, 9, 24, 27]


def vectors(count, length, seed=0):
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed))


def groups_of(x, size):
    return [x[:, start : start + size] for start in range(0, x.shape[1], size)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quantize", [quantize_midrise, quantize_rtn])
def test_shapes_and_range_of_the_codes(quantize, bits, length):
    quantized = quantize(vectors(3, length), torch.full((3,), bits), **OPTIONS)
    assert quantized.codes.shape == (3, length)
    assert quantized.scale.shape == (3, num_groups(length, 8))
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) <= 2**bits - 1
    assert quantized.values().shape == (3, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_bit_is_the_sign_times_the_mean(length):
    """This is the low part of LoRAQuant, section 3; zero counts as positive."""
    x = vectors(3, length)
    x[0, 0] = 0
    values = quantize_midrise(x, torch.ones(3, dtype=torch.long), **OPTIONS).values()
    expected = torch.cat(
        [torch.where(g >= 0, 1, -1) * g.abs().mean(1, keepdim=True) for g in groups_of(x, 8)], 1
    )
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_midrise_is_no_worse_than_the_scale_of_the_largest_entry(bits, length):
    x = vectors(16, length)
    values = quantize_midrise(x, torch.full((16,), bits), **OPTIONS).values()
    for group, mine in zip(groups_of(x, 8), groups_of(values, 8), strict=True):
        scale = group.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        plain = scale * (
            (group / scale).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
        )
        assert (
            (group - mine).square().sum(1) <= (group - plain).square().sum(1) * (1 + 1e-5) + 1e-12
        ).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rtn_is_at_most_half_a_step_away(bits):
    """The range includes the minimum, the maximum and zero.

    An integer zero point may cost the ends another half step.
    """
    x = vectors(16, 24)
    quantized = quantize_rtn(x, torch.full((16,), bits), **OPTIONS)
    step = quantized.scale.repeat_interleave(8, 1)
    inside = (quantized.codes > 0) & (quantized.codes < 2**bits - 1)
    error = (quantized.values() - x).abs()
    assert (error <= 1.0001 * step).all()
    assert (error <= 0.5001 * step)[inside].all()


def test_rtn_against_the_formula():
    x = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    quantized = quantize_rtn(x, torch.tensor([2]), group_size=4, scale_dtype=torch.float32)
    assert quantized.scale.tolist() == [[1.0]]
    assert quantized.zero_point.tolist() == [[1]]
    assert quantized.codes.tolist() == [[0, 1, 1, 3]]  # 0.5 rounds to even
    assert quantized.values().tolist() == [[-1.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("quantize", [quantize_midrise, quantize_rtn])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_codes_belong_to_the_scale_that_is_stored(quantize, scale_dtype):
    """If a scale were rounded after its codes were chosen, some codes would not be the nearest."""
    x = vectors(8, 24)
    quantized = quantize(x, torch.full((8,), 3), group_size=8, scale_dtype=scale_dtype)
    assert quantized.scale.dtype == scale_dtype
    error = (quantized.values() - x).abs()
    for shift in (-1, 1):
        codes = (quantized.codes.int() + shift).clamp(0, 7).to(torch.uint8)
        other = GroupCodes(
            codes=codes,
            scale=quantized.scale,
            zero_point=quantized.zero_point,
            bits=quantized.bits,
            group_size=8,
        )
        assert (error <= (other.values() - x).abs() + 1e-6).all()


@pytest.mark.parametrize("quantize", [quantize_midrise, quantize_rtn])
def test_each_vector_has_bits_of_its_own(quantize):
    x, bits = vectors(4, 27), torch.tensor([1, 2, 4, 8])
    together = quantize(x, bits, **OPTIONS)
    for row in range(4):
        alone = quantize(x[row : row + 1], bits[row : row + 1], **OPTIONS)
        assert torch.equal(together[row : row + 1].values(), alone.values())
        assert torch.equal(together[row : row + 1].codes, alone.codes)


def test_no_bits_and_zeros_give_zeros():
    x = torch.cat([vectors(1, 24), torch.zeros(1, 24)])
    assert not quantize_midrise(x, torch.tensor([0, 2]), **OPTIONS).values().any()
    assert not quantize_rtn(x[1:], torch.tensor([2]), **OPTIONS).values().any()


@given(
    x=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    bits=st.integers(1, 8),
    size=st.integers(1, 50),
)
@settings(deadline=None, max_examples=100)
def test_any_vector_gives_finite_values_of_its_own_size(x, bits, size):
    x = torch.tensor([x])
    for quantize in (quantize_midrise, quantize_rtn):
        values = quantize(
            x, torch.tensor([bits]), group_size=size, scale_dtype=torch.float32
        ).values()
        assert torch.isfinite(values).all()
        assert values.abs().max() <= 2.001 * x.abs().max()


def test_fake_rtn_is_rtn_and_passes_the_gradient_on():
    x = vectors(4, 24).requires_grad_()
    bits = torch.tensor([2, 2, 3, 3])
    values = fake_rtn(x, bits, group_size=8)
    torch.testing.assert_close(values, quantize_rtn(x.detach(), bits, **OPTIONS).values())
    values.sum().backward()
    inner = torch.ones_like(x, dtype=torch.bool)
    for start in range(0, 24, 8):  # all but the ends of the ranges, which move the scale too
        group = x.detach()[:, start : start + 8]
        for index in (group.argmin(1), group.argmax(1)):
            inner[torch.arange(4), start + index] = False
    assert torch.equal(x.grad[inner], torch.ones_like(x.grad[inner]))
