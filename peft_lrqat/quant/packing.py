"""Packs small unsigned integers into dense bytes, little-endian.

Value ``i`` of a row starts at bit ``i * bits``. There are two ways to unpack: `unpack`, for large
tensors, and `unpack_small`, which takes few operations.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def packed_bytes(n: int, bits: int) -> int:
    """Returns the bytes that a row of ``n`` values takes: ``ceil(n * bits / 8)``."""
    return -(-n * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Packs (rows, n) integers in ``[0, 2^bits)`` into (rows, ceil(n * bits / 8)) uint8.

    Bits after the last value are zero. Raises ValueError for values that do not fit.
    """
    rows, n = values.shape
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 2**bits):
        raise ValueError(f"values to pack in {bits} bits must lie in 0..{2**bits - 1}")
    # Eight values fill `bits` whole bytes, whatever the width.
    octets = torch.nn.functional.pad(values.to(torch.uint8), (0, -n % 8)).view(rows, -1, 8)
    out = octets.new_zeros(rows, octets.shape[1], bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        out[..., byte] |= octets[..., i] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= octets[..., i] >> (8 - shift)
    return out.view(rows, -1)[:, : packed_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpacks (rows, ceil(n * bits / 8)) uint8 to (rows, n) uint8: the inverse of :func:`pack`.

    Raises ValueError if the number of bytes is wrong.
    """
    rows = packed.shape[0]
    if packed.shape[1] != packed_bytes(n, bits):
        raise ValueError(
            f"{n} values of {bits} bits take {packed_bytes(n, bits)} bytes a row, but the data has "
            f"{packed.shape[1]}"
        )
    if bits == 8:
        return packed.clone()
    if bits in _SPREADS:
        word, steps = _SPREADS[bits]
        words = packed.to(word)
    else:
        num_octets = -(-n // 8)
        octets = torch.nn.functional.pad(packed, (0, num_octets * bits - packed.shape[1])).view(
            rows, num_octets, bits
        )
        words = torch.nn.functional.pad(octets, (0, 8 - bits)).view(torch.int64).squeeze(-1)
        steps = [(4 * bits, 32), (2 * bits, 16), (bits, 8)]
    # Each step splits every field of a word into halves of `half` bits and moves the upper one to
    # `place`.
    for half, place in steps:
        mask = sum((2**half - 1) << at for at in range(0, 8 * words.element_size(), 2 * place))
        words = (words & mask) | ((words >> half) & mask) << place
    return words.view(torch.uint8)[:, :n]


# If a byte holds whole values, each byte becomes a word by itself.
_SPREADS = {4: (torch.int16, [(4, 8)]), 2: (torch.int32, [(4, 16), (2, 8)])}


def unpack_small(packed: Tensor, bits: int, n: int) -> Tensor:
    """Returns the values of `unpack` as float32, in few operations.

    The time for small tensors depends on the number of operations, not on the size.
    """
    if 8 % bits == 0:
        values = _values_in_bytes(bits, packed.device).index_select(0, packed.flatten().int())
        return values.view(packed.shape[0], -1)[:, :n]
    if padding := -packed.shape[1] % bits:
        packed = torch.nn.functional.pad(packed, (0, padding))
    # Eight values form one integer of `bits` bytes.
    octets = packed.unflatten(1, (-1, bits)).long()
    words = (octets << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(-1, keepdim=True)
    values = words >> torch.arange(0, 8 * bits, bits, device=packed.device)
    return values.bitwise_and_(2**bits - 1).flatten(1)[:, :n].float()


@lru_cache
def _values_in_bytes(bits: int, device: torch.device) -> Tensor:
    """Returns the values in each byte, (256, 8 / bits) float32."""
    in_byte = torch.arange(256, device=device)[:, None] >> torch.arange(0, 8, bits, device=device)
    return (in_byte % 2**bits).float()
