"""Facts about a product from its factors, against the product itself."""

import pytest
import torch

from peft_lrqat.quant.factors.svd import product_svd, squared_error, squared_norm


SHAPES = [(12, 9, 4), (4, 9, 4), (3, 9, 4), (9, 2, 4), (1, 1, 1), (5, 6, 1)]


def factors(m, n, r, batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, m, r, generator=generator), torch.randn(
        batch, r, n, generator=generator
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_of_the_product(shape):
    m, n, r = shape
    B, A = factors(m, n, r)
    u, s, v = product_svd(B, A)
    k = min(m, n, r)
    assert (u.shape, s.shape, v.shape) == ((3, m, k), (3, k), (3, n, k))
    product = B.double() @ A.double()
    torch.testing.assert_close((u * s[:, None]) @ v.mT, product, rtol=0, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(product)[:, :k], rtol=0, atol=1e-12)
    torch.testing.assert_close(u.mT @ u, torch.eye(k).double().expand(3, k, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_error(shape):
    B, A = factors(*shape)
    torch.testing.assert_close(squared_norm(B, A), (B.double() @ A.double()).square().sum((1, 2)))
    other_B, other_A = B + 1e-3, A[:, :1].repeat(1, B.shape[2], 1)
    expected = (B.double() @ A.double() - other_B.double() @ other_A.double()).square().sum((1, 2))
    torch.testing.assert_close(squared_error(B, A, other_B, other_A), expected)


def test_small_errors_are_not_lost():
    """A difference of norms would lose an error of 1e-10 in the rounding of the large terms."""
    B, A = factors(12, 9, 4)
    error = squared_error(B, A, B.double() * (1 + 2**-20), A)
    torch.testing.assert_close(error, squared_norm(B, A) * 2.0**-40, rtol=1e-3, atol=0)


def test_zero_product():
    _, s, _ = product_svd(torch.zeros(2, 6, 3), torch.randn(2, 3, 5))
    assert not s.any()
