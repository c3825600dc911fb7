"""The residual-aware procedure: each component is quantised from what all the others have left
over.

With R = B A - sum of the other components, Q(b) Q(a)^T, the best b for a given a is found entry by
entry: Q(R a / a.a) for a grid of fixed scales, and likewise a for a given b, Q(R^T b / b.b).
Components are first taken one after another, from the leading singular pair of what is left; then
all are gone through again until that stops to pay. So an error of one is absorbed by the others. R
is only ever multiplied with vectors, as a difference of factored matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import GroupCodes, quantize_midrise
from .svd import product_svd, squared_error


FIRST_ROUNDS = 3  # of b and a in turn, when a component is taken
MAX_SWEEPS = 8  # over all components, afterwards
ENOUGH = 0.002  # relative fall of the squared error below which a sweep is the last


class _Components:
    """The components so far of a batch of products, and the product that they are to make up."""

    def __init__(
        self, B: Tensor, A: Tensor, bits: Tensor, group_size: int, scale_dtype: torch.dtype
    ) -> None:
        self.B, self.A = B.float(), A.float()
        self.bits, self.group_size, self.scale_dtype = bits, group_size, scale_dtype
        batch, count = bits.shape
        self.b = self.B.new_zeros(batch, B.shape[1], count)
        self.a = self.A.new_zeros(batch, count, A.shape[2])
        self.codes: list[tuple[GroupCodes, GroupCodes] | None] = [None] * count

    def error(self) -> Tensor:
        return squared_error(self.B, self.A, self.b, self.a)

    def times(self, a: Tensor) -> Tensor:
        """R a, (L, n) -> (L, m)."""
        a = a[..., None]
        return (self.B @ (self.A @ a) - self.b @ (self.a @ a))[..., 0]

    def transposed_times(self, b: Tensor) -> Tensor:
        """R^T b, (L, m) -> (L, n)."""
        b = b[..., None]
        return (self.A.mT @ (self.B.mT @ b) - self.a.mT @ (self.b.mT @ b))[..., 0]

    def quantize(self, x: Tensor, k: int) -> GroupCodes:
        return quantize_midrise(
            x, self.bits[:, k], group_size=self.group_size, scale_dtype=self.scale_dtype
        )

    def fit(self, k: int, a: Tensor, rounds: int) -> tuple[GroupCodes, GroupCodes, Tensor]:
        """Codes of b and a for component k, which is left out of R, from ``a`` on; and by how much
        they lower ||R||^2.
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
        self.codes[k] = codes_b, codes_a
        self.b[..., k], self.a[:, k] = codes_b.values(), codes_a.values()

    def take(self, k: int) -> None:
        """Component k from the leading singular pair of what is left."""
        _, s, v = product_svd(
            torch.cat([self.B, -self.b[..., :k]], -1), torch.cat([self.A, self.a[:, :k]], -2)
        )
        start = (v[..., 0] * s[:, :1].sqrt()).float()
        codes_b, codes_a, _ = self.fit(k, self.quantize(start, k).values(), FIRST_ROUNDS)
        self.put(k, codes_b, codes_a)

    def retake(self, k: int) -> None:
        """Component k once more, now that the others have moved; kept as it was where that does not
        help.
        """
        old_b, old_a = self.b[..., k].clone(), self.a[:, k].clone()
        self.b[..., k], self.a[:, k] = 0, 0
        old_gain = 2 * (old_b * self.times(old_a)).sum(-1) - old_b.square().sum(
            -1
        ) * old_a.square().sum(-1)
        codes_b, codes_a, gain = self.fit(k, old_a, 1)
        better = gain > old_gain
        self.put(
            k, codes_b.where(better, self.codes[k][0]), codes_a.where(better, self.codes[k][1])
        )


def quantize_residual(
    B: Tensor, A: Tensor, bits: Tensor, *, group_size: int, scale_dtype: torch.dtype
) -> list[list[tuple[GroupCodes, GroupCodes]]]:
    """The components of each product of a batch, B (L, m, r) and A (L, r, n), at ``bits`` (L, K):
    pairs of the codes of b and a.

    Components of 0 bits are left out. The bits of a product should not increase: the first
    components are the largest.
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
