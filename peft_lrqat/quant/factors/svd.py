"""Facts about a product B @ A from its factors; nothing of the product's own size is made."""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U (L, m, k), S (L, k) and V (L, n, k) of each product B @ A, in float64.

    B is (L, m, r), A (L, r, n), and k = min(r, m, n). The way goes through QR(B), QR(A^T) and the
    SVD of the small product of their triangles.
    """
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u, s, q_a @ vh.mT


def squared_norm(B: Tensor, A: Tensor) -> Tensor:
    """Returns ``||B @ A||_F^2`` of each pair, (L, m, r) and (L, r, n) -> (L,) float64."""
    _, s, _ = product_svd(B, A)
    return s.square().sum(-1)


def squared_error(B: Tensor, A: Tensor, quantized_B: Tensor, quantized_A: Tensor) -> Tensor:
    """Returns ``||B @ A - quantized_B @ quantized_A||_F^2``, (L,) float64.

    This is the norm of one product of stacked factors.
    """
    return squared_norm(
        torch.cat([B.double(), -quantized_B.double()], dim=-1),
        torch.cat([A.double(), quantized_A.double()], dim=-2),
    )
