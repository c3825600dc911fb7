"""Keeps the hidden states of the calibration data: in memory, or in a file beyond a limit."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor


class Shelf:
    """Tensors on the CPU; those beyond ``limit`` bytes are mapped from files in ``directory``.

    The memory of a tensor that nobody holds any more is free again, in a file as well.
    """

    def __init__(self, limit: int, directory: str | Path | None = None) -> None:
        self.limit, self.directory = limit, directory
        self._alive: list[tuple[weakref.ref[Tensor], int]] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, detached, on the CPU."""
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if self.in_memory() + size <= self.limit:
            kept = tensor.to("cpu", copy=True)
            self._alive.append((weakref.ref(kept), size))
            return kept
        with tempfile.NamedTemporaryFile(dir=self.directory) as file:
            # The name goes at once, the mapping keeps the file; a killed process leaves nothing.
            mapped = torch.from_file(
                file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype
            )
        return mapped.view(tensor.shape).copy_(tensor)

    def in_memory(self) -> int:
        """Bytes of the tensors in memory that somebody still holds."""
        self._alive = [(alive, size) for alive, size in self._alive if alive() is not None]
        return sum(size for _, size in self._alive)
