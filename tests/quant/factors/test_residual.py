"""The residual-aware procedure: better than the published one, and exact in what it claims."""

import pytest
import torch

from peft_lrqat.quant.factors.paper import high_components, quantize_paper
from peft_lrqat.quant.factors.residual import quantize_residual
from peft_lrqat.quant.factors.svd import product_svd, squared_error, squared_norm


OPTIONS = {"group_size": 16, "scale_dtype": torch.bfloat16}


def factors(decay, batch=2, m=48, n=40, r=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(batch, m, r, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(batch, n, r, generator=generator)).Q
    root = decay ** (torch.arange(r) / 2)
    return u * root, (v * root).mT


def relative_error(B, A, found):
    errors = []
    for row, components in enumerate(found):
        if components:
            q_B = torch.stack([b.values()[0] for b, _ in components], dim=1)
            q_A = torch.stack([a.values()[0] for _, a in components])
        else:
            q_B, q_A = B.new_zeros(B.shape[1], 1), A.new_zeros(1, A.shape[2])
        errors.append(squared_error(B[row], A[row], q_B, q_A))
    return (torch.stack(errors) / squared_norm(B, A)).sqrt()


@pytest.mark.parametrize("decay", [0.5, 0.9])
@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.8), (2, 0.9), (3, 0.8)])
def test_better_than_the_published_procedure_at_the_same_split(decay, bits, ratio):
    B, A = factors(decay)
    _, s, _ = product_svd(B, A)
    split = torch.where(torch.arange(6) < high_components(s, ratio)[:, None], bits, 1)
    mine = relative_error(B, A, quantize_residual(B, A, split, **OPTIONS))
    options = {"bits_high": bits, "ratio": ratio, "zero_points": True, **OPTIONS}
    theirs = relative_error(B, A, quantize_paper(B, A, **options))
    assert (mine < (0.85 if bits == 2 else 0.97) * theirs).all()


def test_more_bits_less_error():
    B, A = factors(0.7)
    errors = [
        relative_error(B, A, quantize_residual(B, A, torch.full((2, 6), bits), **OPTIONS)).mean()
        for bits in (1, 2, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_rows_of_a_batch_do_not_touch_each_other():
    B, A = factors(0.7, batch=3)
    bits = torch.tensor([[4, 2, 1, 0, 0, 0], [2] * 6, [0] * 6])
    together = quantize_residual(B, A, bits, **OPTIONS)
    assert [len(components) for components in together] == [3, 6, 0]
    assert [[int(b.bits) for b, _ in components] for components in together[:2]] == [
        [4, 2, 1],
        [2] * 6,
    ]
    # Sweeps end for the whole batch together; a product alone may stop a little earlier.
    alone = relative_error(B[:1], A[:1], quantize_residual(B[:1], A[:1], bits[:1], **OPTIONS))
    torch.testing.assert_close(relative_error(B, A, together)[:1], alone, rtol=0.02, atol=0)


def test_fewer_components_than_the_rank_take_the_leading_ones():
    B, A = factors(0.5)
    found = quantize_residual(B, A, torch.full((2, 2), 8), **OPTIONS)
    _, s, _ = product_svd(B, A)
    left = (s[:, 2:].square().sum(-1) / s.square().sum(-1)).sqrt().float()
    torch.testing.assert_close(relative_error(B, A, found).float(), left, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(1, 7, 3), (7, 1, 3), (33, 65, 1), (2, 2, 5)])
def test_odd_shapes(shape):
    m, n, r = shape
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(2, m, r, generator=generator), torch.randn(2, r, n, generator=generator)
    found = quantize_residual(B, A, torch.full((2, min(r, m, n)), 4), **OPTIONS)
    assert (relative_error(B, A, found) < 0.25).all()


def test_zero_product():
    B, A = factors(0.7)
    B[0] = 0
    found = quantize_residual(B, A, torch.full((2, 6), 2), **OPTIONS)
    assert all(not b.values().any() or not a.values().any() for b, a in found[0])
    assert (relative_error(B[1:], A[1:], found[1:]) < 0.6).all()
