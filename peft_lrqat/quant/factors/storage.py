"""Packed components: what a LORAQUANT adapter stores of one module, version 1 of the format.

The product B A of a module, B (m, K) and A (K, n), is stored as K components. Each is a column of B
and a row of A, with its own bits; the bits do not increase from one component to the next.
Components of equal bits form a run. Each kind of data is one flat tensor, run after run. For a run
of c components it holds

    codes        the c rows of B, ceil(m * bits / 8) bytes each,
                 then the c rows of A, ceil(n * bits / 8) bytes each; uint8
    scales       the c rows of B, ceil(m / group_size) scales each,
                 then the c rows of A, ceil(n / group_size) each
    zero_points  one integer of ``bits`` bits for each scale, in rows like the codes; uint8.
                 Stored only with ``zero_points``, and only for components where bits > 1;
                 if no component has any, the tensor is left out

with value = scale * (code - zero_point), and zero_point = (2^bits - 1) / 2 if none is stored. Rows
are packed as in quant/packing.py: little-endian, value i of a row starts at its bit i * bits, and
the bits after the last value are zero. Scales are bfloat16, float16 or float32, little-endian,
finite and not negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from ..packing import pack, packed_bytes, unpack_small
from .groups import MAX_BITS, GroupCodes, num_groups, spread


FORMAT_VERSION = 1
# The most entries of B and A of one module, as LoRA has them: a vocabulary of 2**20 at rank 1000.
LARGEST = 2**30


@dataclass(frozen=True, kw_only=True)
class Block:
    """Describes the rows of one run on one side, and their places in the flat tensors."""

    side: int  # 0: columns of B, 1: rows of A
    bits: int
    components: slice
    length: int  # m or n
    codes: slice
    scales: slice
    zero_points: slice | None

    @property
    def count(self) -> int:
        """The number of components of the run."""
        return self.components.stop - self.components.start


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """Describes how one module is stored.

    ``bits`` has one digit for each component; ``rows`` and ``columns`` are the shape of the
    product.
    """

    bits: str
    rows: int  # m
    columns: int  # n
    group_size: int
    scale_dtype: torch.dtype
    zero_points: bool

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of B and A of each run, in the order of storage."""
        found = []
        first = codes = scales = zero_points = 0
        for digit, run in groupby(self.bits):
            bits, count = int(digit), len(list(run))
            for side, length in enumerate((self.rows, self.columns)):
                groups = num_groups(length, self.group_size)
                next_codes = codes + count * packed_bytes(length, bits)
                next_scales = scales + count * groups
                stored = self.zero_points and bits > 1
                next_zero_points = zero_points + count * packed_bytes(groups, bits) * stored
                found.append(
                    Block(
                        side=side,
                        bits=bits,
                        components=slice(first, first + count),
                        length=length,
                        codes=slice(codes, next_codes),
                        scales=slice(scales, next_scales),
                        zero_points=slice(zero_points, next_zero_points) if stored else None,
                    )
                )
                codes, scales, zero_points = next_codes, next_scales, next_zero_points
            first += count
        return tuple(found)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number of elements of each stored tensor."""
        sizes = {"codes": 0, "scales": 0}
        for block in self.blocks:
            sizes["codes"], sizes["scales"] = block.codes.stop, block.scales.stop
            if block.zero_points is not None:
                sizes["zero_points"] = block.zero_points.stop
        return sizes

    def dtype(self, kind: str) -> torch.dtype:
        """Returns the dtype of one of the tensors in ``sizes``."""
        return self.scale_dtype if kind == "scales" else torch.uint8


def check_bits(bits: object) -> None:
    """Raises ValueError unless ``bits`` is a string of digits from 1 to 8 that do not increase."""
    known = "".join(map(str, range(1, MAX_BITS + 1)))
    if not isinstance(bits, str) or bits.strip(known) or list(bits) != sorted(bits, reverse=True):
        raise ValueError(
            f"the bits of the components must be digits from 1 to {MAX_BITS} that do not increase, "
            f"such as '4421', but are {bits!r}"
        )


def check_rank(format: PackedFormat, rank: int) -> None:
    """Raises ValueError unless factors of ``rank`` can have these components and fit in memory.

    Allocates nothing.
    """
    if len(format.bits) > rank:
        raise ValueError(f"there are {len(format.bits)} components, but the rank is {rank}")
    if rank * (format.rows + format.columns) > LARGEST:
        raise ValueError(
            f"factors of rank {rank} for a module of shape ({format.rows}, {format.columns}) are "
            "larger than any adapter's"
        )


def pack_components(
    components: Sequence[tuple[GroupCodes, GroupCodes]],
    *,
    rows: int,
    columns: int,
    group_size: int,
    scale_dtype: torch.dtype,
    zero_points: bool,
) -> tuple[PackedFormat, dict[str, Tensor]]:
    """Packs pairs of the codes of b (N, m) and of a (N, n); returns their format and tensors.

    Keeps the order of components of equal bits, and leaves out those of 0 bits. With
    ``zero_points``, all components above 1 bit need them. Raises ValueError for codes that do not
    fit together.
    """
    pairs = []
    for pair in components:
        if pair[0].bits.tolist() != pair[1].bits.tolist():
            raise ValueError(
                f"b and a of a component must have equal bits, but have {pair[0].bits} and "
                f"{pair[1].bits}"
            )
        pairs += [
            (bits, [codes[i : i + 1] for codes in pair])
            for i, bits in enumerate(pair[0].bits.tolist())
            if bits > 0
        ]
    pairs.sort(key=lambda pair: -pair[0])
    format = PackedFormat(
        bits="".join(str(bits) for bits, _ in pairs),
        rows=rows,
        columns=columns,
        group_size=group_size,
        scale_dtype=scale_dtype,
        zero_points=zero_points,
    )
    parts: dict[str, list[Tensor]] = {kind: [] for kind in format.sizes}
    for block in format.blocks:
        vectors = [sides[block.side] for _, sides in pairs[block.components]]
        _check_vectors(vectors, block, format)
        parts["codes"].append(pack(torch.cat([v.codes for v in vectors]), block.bits))
        parts["scales"].append(torch.cat([v.scale for v in vectors]))
        if block.zero_points is not None:
            zero_points_of = [v.zero_point for v in vectors if v.zero_point is not None]
            parts["zero_points"].append(pack(torch.cat(zero_points_of), block.bits))
    tensors = {
        kind: torch.cat([part.flatten() for part in found])
        if found
        else torch.empty(0, dtype=format.dtype(kind))
        for kind, found in parts.items()
    }
    check_packed(format, tensors)
    return format, tensors


def _check_vectors(vectors: list[GroupCodes], block: Block, format: PackedFormat) -> None:
    """Raises ValueError unless the vectors of one block are quantised as the format says."""
    wanted = (block.length, format.group_size, format.scale_dtype, block.zero_points is not None)
    for vector in vectors:
        present = (
            vector.codes.shape[1],
            vector.group_size,
            vector.scale.dtype,
            vector.zero_point is not None,
        )
        if present != wanted:
            raise ValueError(
                f"a component of {block.bits} bits must have (length, group size, dtype of scales, "
                f"zero points) {wanted}, but has {present}"
            )


def expand(
    format: PackedFormat, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns B (m, K) and A (K, n) in ``dtype``.

    In float32 they hold exactly the values of the packed `GroupCodes`.
    """
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for block in format.blocks:
        codes = tensors["codes"][block.codes].view(block.count, -1)
        values = unpack_small(codes, block.bits, block.length)
        if block.zero_points is None:
            values.sub_((2**block.bits - 1) / 2)
        else:
            groups = num_groups(block.length, format.group_size)
            stored = tensors["zero_points"][block.zero_points].view(block.count, -1)
            zero_points = unpack_small(stored, block.bits, groups)
            values.sub_(spread(zero_points, format.group_size, block.length))
        scales = tensors["scales"][block.scales].view(block.count, -1).float()
        values.mul_(spread(scales, format.group_size, block.length))
        sides[block.side].append(values.to(dtype))
    if not format.blocks:
        codes = tensors["codes"]
        empty = (
            codes.new_zeros(format.rows, 0, dtype=dtype),
            codes.new_zeros(0, format.columns, dtype=dtype),
        )
        return empty
    b, a = (torch.cat(side) if len(side) > 1 else side[0] for side in sides)
    return b.T, a


def check_packed(format: PackedFormat, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless ``tensors`` are what ``format`` describes, bit by bit.

    The bits after the last value of a row must be zero.
    """
    if extra := sorted(set(tensors) - set(format.sizes)):
        raise ValueError(
            f"{extra[0]} are stored, but components of bits {format.bits!r} do not have them here"
        )
    for kind, size in format.sizes.items():
        if kind not in tensors:
            raise ValueError(f"the {kind} are missing")
        tensor, dtype = tensors[kind], format.dtype(kind)
        if tensor.shape != (size,) or tensor.dtype != dtype:
            raise ValueError(
                f"the {kind} must be {size} of {dtype} for components of bits {format.bits!r} on a "
                f"module of shape ({format.rows}, {format.columns}), but are {tuple(tensor.shape)} "
                f"of {tensor.dtype}"
            )
    scales = tensors["scales"]
    for fault, found in (
        ("NaN", scales.isnan()),
        ("infinite", scales.isinf()),
        ("negative", scales < 0),
    ):
        if found.any():
            raise ValueError(
                f"scales must be finite and not negative, but {int(found.sum())} of {len(scales)} "
                f"are {fault}"
            )
    for block in format.blocks:
        _check_padding("codes", tensors["codes"][block.codes], block, block.length)
        if block.zero_points is not None:
            groups = num_groups(block.length, format.group_size)
            _check_padding("zero_points", tensors["zero_points"][block.zero_points], block, groups)


def _check_padding(kind: str, packed: Tensor, block: Block, length: int) -> None:
    """Raises ValueError unless the bits after the last value of each row are zero."""
    used = length * block.bits % 8
    if used and (packed.view(block.count, -1)[:, -1] >> used).any():
        raise ValueError(
            f"the bits after the last value of a row must be zero, but some of the {kind} of "
            f"{'BA'[block.side]} at {block.bits} bits are not; the data is damaged"
        )
