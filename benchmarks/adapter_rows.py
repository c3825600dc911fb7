"""Ways to store the factors of an adapter at few bits.

    RTN, sign    B and A each rounded as they are, by columns of B and rows of A; RTN with zero
                 points
    GPTQ         the same, but the error of a row is taken up by the rows after it, under the Gram
                 matrix of the other factor, and the factors are fitted to each other in turns
    HQQ          the package hqq (half-quadratic quantisation of zero points), factors as they are
    published    LoRAQuant as published (``method="paper"``), bits_high @ ratio
    residual     this package's procedure, in the storage that the published one would take without
                 zero points, or at ``average_bits``

Bits are those of codes, scales and zero points, for each parameter of B and A. No file is written,
so no header is counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from peft_lrqat.loraquant import LoRAQuantConfig
from peft_lrqat.loraquant.quantize import nominal_bits, quantize_factors
from peft_lrqat.quant.factors.groups import GroupCodes, quantize_midrise, quantize_rtn
from peft_lrqat.quant.factors.storage import expand
from peft_lrqat.quant.factors.svd import squared_error, squared_norm
from peft_lrqat.quant.packing import packed_bytes


GROUP_SIZE, SCALE_DTYPE = 128, torch.bfloat16
DAMPING = 0.01  # of GPTQ, in mean diagonal entries of the Gram matrix
TURNS = 4  # of GPTQ; more change the error by less than 0.01

Factors = Mapping[str, tuple[Tensor, Tensor]]  # B (m, r) and A (r, n) of each module


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Factors as they come back from their storage."""

    factors: Factors
    error: float  # ||B A - Q(B) Q(A)||_F / ||B A||_F, over all modules
    bits: float  # of storage, per parameter
    nominal: float  # of codes alone, as papers count


def as_it_is(factors: Factors) -> Stored:
    halved = {name: (B.half().float(), A.half().float()) for name, (B, A) in factors.items()}
    return Stored(factors=halved, error=relative_error(factors, halved), bits=16, nominal=16)


def packed(factors: Factors, **fields) -> Stored:
    config = LoRAQuantConfig(group_size=GROUP_SIZE, scale_dtype="bfloat16", **fields)
    found = quantize_factors(factors, config, dict.fromkeys(factors, 1.0), progress=False)
    restored = {name: expand(q.format, q.tensors, torch.float32) for name, q in found.items()}
    stored = sum(q.stored_bits for q in found.values())
    return Stored(
        factors=restored,
        error=relative_error(factors, restored),
        bits=stored / parameters(factors),
        nominal=nominal_bits(factors, found),
    )


Grid = Callable[..., GroupCodes]
# The rows of a batch x (L, r, n) at some bits, and the bits of storage.
Rounded = tuple[Tensor, int]


def rounded(x: Tensor, bits: int, grid: Grid) -> Rounded:
    """Rows on a grid, as they are."""
    rows = x.flatten(0, 1)
    codes = grid(
        rows, torch.full((len(rows),), bits), group_size=GROUP_SIZE, scale_dtype=SCALE_DTYPE
    )
    stored = len(rows) * packed_bytes(rows.shape[1], bits) + 2 * codes.scale.numel()
    if codes.zero_point is not None:
        stored += len(rows) * packed_bytes(codes.scale.shape[1], bits)
    return codes.values().view(x.shape), 8 * stored


def in_batches(
    factors: Factors, bits: int, quantize: Callable[[Tensor, Tensor], tuple[Rounded, Rounded]]
) -> Stored:
    """Modules of equal shape together; ``quantize`` takes B^T (L, r, m) and A (L, r, n)."""
    shapes: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (B, A) in factors.items():
        shapes.setdefault((B.shape, A.shape), []).append(name)
    restored, stored = {}, 0
    for names in shapes.values():
        B, A = (torch.stack([factors[name][side].float() for name in names]) for side in (0, 1))
        (q_b, bits_b), (q_a, bits_a) = quantize(B.mT.contiguous(), A)
        restored |= {name: (q_b[row].T, q_a[row]) for row, name in enumerate(names)}
        stored += bits_b + bits_a
    return Stored(
        factors=restored,
        error=relative_error(factors, restored),
        bits=stored / parameters(factors),
        nominal=bits,
    )


def plain(factors: Factors, bits: int, grid: Grid) -> Stored:
    return in_batches(factors, bits, lambda b, a: (rounded(b, bits, grid), rounded(a, bits, grid)))


def gptq(factors: Factors, bits: int) -> Stored:
    """A is rounded, given B; then, in turns, the factor that fits best to the rounded other one."""

    def quantize(b: Tensor, a: Tensor) -> tuple[Rounded, Rounded]:
        q_a = with_feedback(a, b @ b.mT, bits)
        q_b = with_feedback(*fitting(q_a[0], a, b), bits)
        for _ in range(TURNS - 1):
            q_a = with_feedback(*fitting(q_b[0], b, a), bits)
            q_b = with_feedback(*fitting(q_a[0], a, b), bits)
        return q_b, q_a

    return in_batches(factors, bits, quantize)


def fitting(q: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that makes the product with q nearest to that of ``one`` and ``other``, and the
    Gram matrix of q.
    """
    gram = q @ q.mT
    return torch.linalg.solve(damped(gram, 1e-6), (q @ one.mT) @ other), gram


def with_feedback(x: Tensor, gram: Tensor, bits: int) -> Rounded:
    """Rows of x (L, r, n) on mid-rise grids, for a small tr((x - q)^T gram (x - q)): GPTQ.

    The scales of a row are chosen when it is its turn, with all that it takes up.
    """
    order = gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    left = x.take_along_dim(order[..., None], 1)
    gram = gram.take_along_dim(order[..., None], 1).take_along_dim(order[:, None], 2)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(gram, DAMPING).double())).mT.float()
    values, stored = torch.empty_like(x), 0
    for k in range(x.shape[1]):
        row = left[:, k : k + 1].clone()
        q, more = rounded(row, bits, quantize_midrise)
        share = upper[:, k, k:, None] / upper[:, k, k, None, None]
        left[:, k:] -= share * (row - q)
        values.scatter_(1, order[:, k, None, None].expand_as(q), q)
        stored += more
    return values, stored


def damped(gram: Tensor, share: float) -> Tensor:
    """With a share of its mean diagonal entry added to the diagonal, so that it can be inverted."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1)
    return gram + share * mean[:, None, None] * torch.eye(gram.shape[1])


def hqq(factors: Factors, bits: int) -> Stored:
    from hqq.core.quantize import Quantizer

    def rounded_by_hqq(x: Tensor) -> Rounded:
        # Its groups run over the ends of rows. 64 is its default.
        codes, meta = Quantizer.quantize(
            x, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
        )
        grids = meta["scale"].numel() + meta["zero"].numel()
        for name in ("scale", "zero"):  # stored in float16
            meta[name] = meta[name].half().float()
        return Quantizer.dequantize(codes, meta).float(), bits * x.numel() + 16 * grids

    return in_batches(factors, bits, lambda b, a: (rounded_by_hqq(b), rounded_by_hqq(a)))


def parameters(factors: Factors) -> int:
    return sum(B.numel() + A.numel() for B, A in factors.values())


def relative_error(factors: Factors, restored: Factors) -> float:
    error = norm = 0.0
    for name, (B, A) in factors.items():
        pair = B.float()[None], A.float()[None]
        error += float(squared_error(*pair, *(t[None] for t in restored[name])))
        norm += float(squared_norm(*pair))
    return (error / norm) ** 0.5


VARIANTS = ((2, 0.8), (2, 0.9), (3, 0.8))
AVERAGE_BITS = (0.75, 1.0, 1.5, 2.5)
Row = Callable[[Factors], Stored]
ROWS: dict[str, Row] = {
    "float16": as_it_is,
    "RTN, 2 bits": partial(plain, bits=2, grid=quantize_rtn),
    "sign, 1 bit": partial(plain, bits=1, grid=quantize_midrise),
    "GPTQ, 2 bits": partial(gptq, bits=2),
    "GPTQ, 1 bit": partial(gptq, bits=1),
    "HQQ, 2 bits": partial(hqq, bits=2),
}
for _bits, _ratio in VARIANTS:
    for _name, _method in (("published", "paper"), ("residual", "residual")):
        ROWS[f"{_name} {_bits}@{_ratio}"] = partial(
            packed, method=_method, bits_high=_bits, ratio=_ratio
        )
for _bits in AVERAGE_BITS:
    ROWS[f"residual, {_bits} bits"] = partial(packed, average_bits=_bits)


def rows(names: list[str] | None = None) -> dict[str, Row]:
    """The rows of these names, or all; without HQQ where its package is not installed."""
    if unknown := [name for name in names or [] if name not in ROWS]:
        raise ValueError(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    found = {name: ROWS[name] for name in names or ROWS}
    if find_spec("hqq") is None:
        found.pop("HQQ, 2 bits", None)
    return found
