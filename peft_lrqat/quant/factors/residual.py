"""The residual-aware procedure: each component is quantised from what all the others leave over.

Let R = B A - the sum of the other components Q(b) Q(a)^T. The best b for a given a is found entry
by entry, Q(R a / a.a) on a grid of fixed scales; likewise a for a given b, Q(R^T b / b.b). First,
components are taken one after another, from the leading singular pair of what is left. Then all are
fitted again, sweep after sweep, until that no longer pays. In this way the others absorb the error
of each one. R is only ever multiplied with vectors, as a difference of factored matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import GroupCodes, quantize_midrise
from .svd import product_svd, squared_error


FIRST_ROUNDS = 3  # fits of b and a in turn, when a component is first taken
MAX_SWEEPS = 8  # later passes over all components
ENOUGH = 0.002  # a sweep that lowers the squared error by less than this share is the last


class _Components:
    """Holds the components so far of a batch of products, and the products they approximate."""

    def __init__(
        self, B: Tensor, A: Tensor, bits: Tensor, group_size: int, scale_dtype: torch.dtype
    ) -> None:
        self.B, self.A = B.float(), A.float()
        self.bits, self.group_size, self.scale_dtype = bits, group_size, scale_dtype
        batch, count = bits.shape
        self.b = self.B.new_zeros(batch, B.shape[1], count)
        self.a = self.A.new_zeros(batch, count, A.shape[2])
        self.codes: list[tuple[GroupCodes, GroupCodes]] = []

    def error(self) -> Tensor:
        """Returns ``||B A - b a||_F^2`` of each product, (L,)."""
        return squared_error(self.B, self.A, self.b, self.a)

    def times(self, a: Tensor) -> Tensor:
        """Returns R a, (L, n) -> (L, m)."""
        a = a[..., None]
        return (self.B @ (self.A @ a) - self.b @ (self.a @ a))[..., 0]

    def transposed_times(self, b: Tensor) -> Tensor:
        """Returns R^T b, (L, m) -> (L, n)."""
        b = b[..., None]
        return (self.A.mT @ (self.B.mT @ b) - self.a.mT @ (self.b.mT @ b))[..., 0]

    def quantize(self, x: Tensor, k: int) -> GroupCodes:
        return quantize_midrise(
            x, self.bits[:, k], group_size=self.group_size, scale_dtype=self.scale_dtype
        )

    def fit(self, k: int, a: Tensor, rounds: int) -> tuple[GroupCodes, GroupCodes, Tensor]:
        """Fits b and a of component k, which is left out of R, starting from ``a``.

        Returns their codes, and by how much they lower ||R||^2.
        """
        for _ in range(rounds):
            codes_b = self.quantize(self.times(a) / _square(a), k)
            b = codes_b.values()
            back = self.transposed_times(b)
            codes_a = self.quantize(back / _square(b), k)
            a = codes_a.values()
        gain = 2 * (a * back).sum(-1) - (b.square().sum(-1) * a.square().sum(-1))
        return codes_b, codes_a, gain

    def put(self, k: int, codes_b: GroupCodes, codes_a: GroupCodes) -> None:
        """Sets component k; components are first put in order."""
        self.codes[k : k + 1] = [(codes_b, codes_a)]
        self.b[..., k], self.a[:, k] = codes_b.values(), codes_a.values()

    def take(self, k: int) -> None:
        """Takes component k from the leading singular pair of what is left."""
        _, s, v = product_svd(
            torch.cat([self.B, -self.b[..., :k]], -1), torch.cat([self.A, self.a[:, :k]], -2)
        )
        start = (v[..., 0] * s[:, :1].sqrt()).float()
        codes_b, codes_a, _ = self.fit(k, self.quantize(start, k).values(), FIRST_ROUNDS)
        self.put(k, codes_b, codes_a)

    def retake(self, k: int) -> None:
        """Fits component k again, now that the others have moved, and keeps the better result."""
        old_b, old_a = self.b[..., k].clone(), self.a[:, k].clone()
        self.b[..., k], self.a[:, k] = 0, 0
        product = (old_b * self.times(old_a)).sum(-1)
        old_gain = 2 * product - old_b.square().sum(-1) * old_a.square().sum(-1)
        codes_b, codes_a, gain = self.fit(k, old_a, 1)
        better = gain > old_gain
        kept_b, kept_a = self.codes[k]
        self.put(k, codes_b.where(better, kept_b), codes_a.where(better, kept_a))


def quantize_residual(
    B: Tensor, A: Tensor, bits: Tensor, *, group_size: int, scale_dtype: torch.dtype
) -> list[list[tuple[GroupCodes, GroupCodes]]]:
    """Quantises each product of a batch, B (L, m, r) and A (L, r, n), at ``bits`` (L, K).

    Returns, for each product, pairs of the codes of b and a; components of 0 bits are left out. The
    bits of a product should not increase: the first components are the largest.
    """
    components = _Components(B, A, bits, group_size, scale_dtype)
    for k in range(bits.shape[1]):
        components.take(k)
    error = components.error()
    for _ in range(MAX_SWEEPS):
        for k in range(bits.shape[1]):
            components.retake(k)
        before, error = error, components.error()
        if bool((error >= before * (1 - ENOUGH)).all()):
            break
    rows = range(len(bits))
    return [
        [
            (b[row : row + 1], a[row : row + 1])
            for (b, a), width in zip(components.codes, bits[row], strict=True)
            if width
        ]
        for row in rows
    ]


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).clamp(min=1e-30)
