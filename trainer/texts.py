"""The texts of a batch: tokens whose hidden states depend on no other tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Tokens of a batch whose output depends on no others.

    A row without its padding; where position ids begin again within a row that comes without a
    mask, several: with a mask of its own, a model of transformers attends across them.
    """

    key: str
    row: int
    tokens: Tensor  # int64 (n,), places in the row, on the CPU


def texts_of(inputs: dict[str, Any]) -> list[Text]:
    """The texts of a batch, with a digest of all that the model sees of each but its padding."""
    shape = inputs["input_ids"].shape
    seen = {name: v.cpu() for name, v in inputs.items() if isinstance(v, Tensor)}
    seen.pop("labels", None)
    mask = seen.get("attention_mask")
    masked = mask is not None
    if mask is not None and mask.shape == shape:
        seen.pop("attention_mask")
    else:
        mask = torch.ones(shape, dtype=torch.bool)
    of_tokens = {name: t for name, t in seen.items() if t.shape[:2] == shape}
    others = {name: t for name, t in seen.items() if name not in of_tokens}
    positions = of_tokens.pop("position_ids", None)
    texts = []
    for row in range(shape[0]):
        tokens = mask[row].nonzero()[:, 0]
        ends = [len(tokens)]
        if positions is not None and not masked:
            begins = (positions[row][tokens] == 0).nonzero()[:, 0].tolist()
            ends = [*(begin for begin in begins if begin > 0), *ends]
        start = 0
        for end in ends:
            digest = hashlib.blake2b(digest_size=16)
            part = tokens[start:end]
            for name, tensor in sorted(of_tokens.items()):
                update(digest, name, tensor[row][part])
            if positions is not None:
                # Only distances between positions matter, to models that number tokens from 0.
                update(digest, "position_ids", positions[row][part])
            for name, tensor in sorted(others.items()):
                update(digest, name, tensor[row] if len(tensor) == shape[0] else tensor)
            texts.append(Text(digest.hexdigest(), row, part))
            start = end
    return texts


def update(digest: Any, name: str, tensor: Tensor) -> None:
    """Adds a tensor on the CPU to a digest of `hashlib`."""
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
