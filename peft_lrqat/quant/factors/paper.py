"""LoRAQuant as published (arXiv 2510.26690, section 3): an SVD split into a high and a low part.

    SVD     B A = U S V^T;  B' = U sqrt(S),  A' = sqrt(S) V^T
    split   h = the fewest leading components whose squared singular values reach the share
            ``ratio`` of the total
    high    the first h components: round-to-nearest between range ends that minimise
            || b a^T - Q(b) Q(a)^T ||_F
    low     the others: sign(x) * mean|x| of each group

There are two grids for the high part. With integer zero points, range ends and vectors are refined
by gradient descent, straight-through (`refine`). Without them, the range is symmetric and a search
finds its ends. Descent from there finds nothing better, since the error of a rank-one product is
least where the errors of its vectors are. On Gaussian vectors at 2 bits, a component keeps 0.35 of
its squared norm as error with integer zero points, and 0.22 without.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .groups import GroupCodes, fake_rtn, quantize_midrise, quantize_rtn
from .svd import product_svd


STEPS = 200  # of the gradient descent
LEARNING_RATE = 0.05  # for Adam, in units of the root mean square of a vector


def high_components(singular_values: Tensor, ratio: float) -> Tensor:
    """Counts the fewest leading components whose squares reach the share ``ratio`` of their sum.

    (L, r) -> (L,); 0 for a product of zeros.
    """
    energy = singular_values.double().square()
    total = energy.sum(-1, keepdim=True)
    # Sums are rounded: a share that is exactly reached must count as reached.
    below = energy.cumsum(-1) < ratio * total * (1 - 1e-12)
    return (below.sum(-1) + 1).clamp(max=energy.shape[-1]).where(total[:, 0] > 0, 0)


def quantize_paper(
    B: Tensor,
    A: Tensor,
    *,
    bits_high: int,
    ratio: float,
    zero_points: bool,
    group_size: int,
    scale_dtype: torch.dtype,
) -> list[list[tuple[GroupCodes, GroupCodes]]]:
    """Quantises the components of each product of a batch, B (L, m, r) and A (L, r, n).

    Returns, for each product, pairs of the codes of b and a. ``zero_points`` says whether the grid
    of the high part has integer zero points.
    """
    u, s, v = product_svd(B, A)
    root = s.sqrt()[:, None]
    b, a = (u * root).float().mT, (v * root).float().mT  # (L, r, m) and (L, r, n)
    high = torch.arange(s.shape[1]) < high_components(s, ratio)[:, None]
    low = ~high & (s[:, :1] > 0)
    midrise = partial(quantize_midrise, group_size=group_size, scale_dtype=scale_dtype)
    found: dict[tuple[int, int], tuple[GroupCodes, GroupCodes]] = {}
    for part, bits in ((high, bits_high), (low, 1)):
        if not part.any():
            continue
        b_part, a_part = b[part], a[part]
        width = torch.full((len(b_part),), bits)
        if part is high and zero_points:
            pairs = refine(b_part, a_part, width, group_size=group_size, scale_dtype=scale_dtype)
        else:
            pairs = midrise(b_part, width), midrise(a_part, width)
        for row, (product, component) in enumerate(part.nonzero().tolist()):
            found[product, component] = pairs[0][row : row + 1], pairs[1][row : row + 1]
    return [
        [found[row, k] for k in range(s.shape[1]) if (row, k) in found] for row in range(len(s))
    ]


def refine(
    b: Tensor, a: Tensor, bits: Tensor, *, group_size: int, scale_dtype: torch.dtype
) -> tuple[GroupCodes, GroupCodes]:
    """Finds codes of b (N, m) and a (N, n) that lower ``|| b a^T - Q(b') Q(a')^T ||_F``.

    Keeps, for each pair, the best codes that the descent has passed.
    """
    rms = [x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30) for x in (b, a)]
    target = [b / rms[0], a / rms[1]]
    moved = [x.clone().requires_grad_() for x in target]
    best = [x.detach().clone() for x in moved]
    norm = target[0].square().sum(-1) * target[1].square().sum(-1)
    least = torch.full_like(norm, torch.inf)
    optimizer = torch.optim.Adam(moved, lr=LEARNING_RATE)
    for _ in range(STEPS + 1):
        q_b, q_a = (fake_rtn(x, bits, group_size=group_size) for x in moved)
        both = (target[0] * q_b).sum(-1) * (target[1] * q_a).sum(-1)
        error = norm + q_b.square().sum(-1) * q_a.square().sum(-1) - 2 * both
        better = error.detach() < least
        least = torch.where(better, error.detach(), least)
        best = [
            torch.where(better[:, None], x.detach(), kept)
            for x, kept in zip(moved, best, strict=True)
        ]
        optimizer.zero_grad()
        (error / norm).sum().backward()
        optimizer.step()
    rtn = partial(quantize_rtn, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
    return rtn(best[0] * rms[0]), rtn(best[1] * rms[1])
