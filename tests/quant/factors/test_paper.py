"""The published procedure: split, high and low part, refinement."""

import pytest
import torch

from peft_lrqat.quant.factors.groups import quantize_rtn
from peft_lrqat.quant.factors.paper import high_components, quantize_paper, refine
from peft_lrqat.quant.factors.svd import product_svd, squared_error, squared_norm


OPTIONS = {"group_size": 16, "scale_dtype": torch.float32}


def factors(decay, batch=2, m=48, n=40, r=6):
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(batch, m, r, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(batch, n, r, generator=generator)).Q
    root = decay ** (torch.arange(r) / 2)
    return u * root, (v * root).mT


@pytest.mark.parametrize(
    ("values", "ratio", "expected"),
    [
        ([3.0, 1.0, 1.0], 0.8, 1),  # 9 / 11 = 0.818
        ([3.0, 1.0, 1.0], 0.85, 2),
        ([2.0, 1.0], 0.8, 1),  # reached exactly
        ([1.0, 1.0, 1.0, 1.0], 0.75, 3),
        ([1.0, 1.0, 1.0, 1.0], 1.0, 4),
        ([5.0, 0.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 0),
    ],
)
def test_fewest_components_that_reach_the_share(values, ratio, expected):
    assert high_components(torch.tensor([values]), ratio).tolist() == [expected]


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_split_bits_and_zero_points(bits, zero_points):
    B, A = factors(0.7)
    _, s, v = product_svd(B, A)
    high = high_components(s, 0.8)
    options = {**OPTIONS, "zero_points": zero_points}
    for row, components in enumerate(quantize_paper(B, A, bits_high=bits, ratio=0.8, **options)):
        assert [int(b.bits) for b, _ in components] == [bits] * int(high[row]) + [1] * (
            6 - int(high[row])
        )
        for k, (b, a) in enumerate(components):
            assert (b.codes.shape[1], a.codes.shape[1]) == (48, 40)
            stored = zero_points and k < high[row]
            assert (b.zero_point is not None) == (a.zero_point is not None) == stored
            if k >= high[row]:  # sign(x) * mean|x|
                x = (v[row, :, k] * s[row, k].sqrt()).float()
                expected = torch.cat([x_g.sign() * x_g.abs().mean() for x_g in x.split(16)])
                torch.testing.assert_close(a.values()[0], expected, rtol=1e-5, atol=0)


def test_zero_product_has_no_components():
    B, A = factors(0.7)
    B[1] = 0
    first, second = quantize_paper(B, A, bits_high=2, ratio=0.8, zero_points=True, **OPTIONS)
    assert len(first) == 6
    assert second == []


@pytest.mark.parametrize("bits", [2, 3])
def test_refinement_helps_and_never_harms(bits):
    """It helps most in long groups, whose extremes lie far out."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(8, 256, generator=generator), torch.randn(8, 128, generator=generator)
    options = {"group_size": 128, "scale_dtype": torch.float32}
    width = torch.full((8,), bits)

    def error(codes_b, codes_a):
        product = codes_b.values()[..., None] * codes_a.values()[:, None]
        return (b[..., None] * a[:, None] - product).square().sum((1, 2))

    before = error(quantize_rtn(b, width, **options), quantize_rtn(a, width, **options))
    after = error(*refine(b, a, width, **options))
    assert (after <= before * (1 + 1e-5)).all()
    if bits == 2:
        assert after.sum() < 0.75 * before.sum()


# The relative error of the public implementation, with its refinement, on 512 x 512 products of
# rank 16 whose k-th singular value is decay^k.
PUBLIC = [(0.6, 2, 0.8, 0.62), (0.8, 2, 0.9, 0.53), (0.8, 3, 0.8, 0.43), (0.9, 2, 0.9, 0.54)]


@pytest.mark.parametrize(("decay", "bits", "ratio", "most"), PUBLIC, ids=str)
def test_the_published_procedure_is_at_its_best(decay, bits, ratio, most):
    B, A = factors(decay, batch=1, m=512, n=512, r=16)
    options = {"group_size": 128, "scale_dtype": torch.bfloat16, "zero_points": False}
    (components,) = quantize_paper(B, A, bits_high=bits, ratio=ratio, **options)
    stored = [torch.cat([pair[side].values() for pair in components]) for side in (0, 1)]
    lost = squared_error(B, A, stored[0].T[None], stored[1][None]) / squared_norm(B, A)
    assert float(lost.sqrt()) <= most
