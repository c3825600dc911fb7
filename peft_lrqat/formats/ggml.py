"""Integers as blocks of ggml, the tensor format of GGUF files: a float16 scale and integers.

    Q4_0   32 weights, -8 .. 7       scale, then 16 bytes: weight j in the low half of byte j,
                                     weight j + 16 in the high half
    Q5_0   32 weights, -16 .. 15     scale, the fifth bits as one 32-bit number, then as Q4_0
    Q8_0   32 weights, -128 .. 127   scale, then a byte each
    TQ2_0  256 weights, -1 .. 2      64 bytes: weight j + 32 n of each half in bits 2 n and 2 n + 1
                                     of byte j; then the scale

The blocks are written from the integers themselves. Quantising ``scale * integer`` again would
choose other scales.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..quant.grid import Grid


BLOCK_SIZES = {"Q4_0": 32, "Q5_0": 32, "Q8_0": 32, "TQ2_0": 256}
BLOCK_BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34, "TQ2_0": 66}


def block_type(grid: Grid, in_features: int) -> str:
    """The smallest blocks that hold every ``code - zero_point`` of a grid."""
    # Codes and zero points lie anywhere on an asymmetric grid; their difference needs one bit more.
    bits = grid.bits + (not grid.symmetric)
    size = in_features if grid.group_size == -1 else grid.group_size
    if bits == 2 and size % BLOCK_SIZES["TQ2_0"] == 0:
        return "TQ2_0"
    return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"


def row_bytes(kind: str, in_features: int) -> int:
    """Bytes of a row in blocks of one kind."""
    return in_features // BLOCK_SIZES[kind] * BLOCK_BYTES[kind]


def encode(kind: str, centered: Tensor, scale: Tensor) -> np.ndarray:
    """The bytes of the blocks, (out, bytes of a row) uint8.

    Args:
        centered: integers (out, in) around zero.
        scale: (out, groups) float16.
    """
    rows, columns = centered.shape
    size = BLOCK_SIZES[kind]
    blocks = centered.reshape(rows, columns // size, size).to(torch.int16)
    scale = scale.repeat_interleave(columns // size // scale.shape[1], dim=1)[..., None]
    head = (-scale if kind == "TQ2_0" else scale).contiguous().view(torch.uint8)
    parts = ENCODERS[kind](blocks)
    parts = [*parts, head] if kind == "TQ2_0" else [head, *parts]
    return torch.cat(parts, dim=-1).reshape(rows, -1).cpu().numpy()


def _q4_0(blocks: Tensor) -> list[Tensor]:
    return [_halves((blocks + 8).to(torch.uint8))]


def _q5_0(blocks: Tensor) -> list[Tensor]:
    codes = blocks + 16
    places = 1 << torch.arange(8, device=codes.device)
    fifth = ((codes >> 4).unflatten(-1, (4, 8)) * places).sum(-1).to(torch.uint8)
    return [fifth, _halves((codes & 15).to(torch.uint8))]


def _q8_0(blocks: Tensor) -> list[Tensor]:
    return [blocks.to(torch.int8).view(torch.uint8)]


def _tq2_0(blocks: Tensor) -> list[Tensor]:
    # The scale is negative, so that -2 .. 1 become 2 .. -1, which is what the blocks hold.
    codes = (1 - blocks).to(torch.uint8).unflatten(-1, (2, 4, 32))
    shifts = torch.arange(0, 8, 2, device=codes.device, dtype=torch.uint8)[:, None]
    return [(codes << shifts).sum(-2, dtype=torch.uint8).flatten(-2)]


def _halves(codes: Tensor) -> Tensor:
    low, high = codes.unflatten(-1, (2, 16)).unbind(-2)
    return low | (high << 4)


ENCODERS = {"Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0, "TQ2_0": _tq2_0}
