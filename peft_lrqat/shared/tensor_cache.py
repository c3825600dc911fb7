"""A store of tensors that layers would make again at every call, with a limit in bytes, shared by
all layers of a model.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor


# Tensors, and plain numbers that belong to them.
Tensors = tuple[Any, ...]


class TensorCache:
    """The tensors of (layer, adapter) that were used last, as many as ``limit`` bytes hold.

    Layers are run in turn: were the oldest always dropped, a limit a little too small for one
    adapter would keep nothing that is used again. So only tensors of other adapters make room.
    Requests may run in threads.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._lock = RLock()
        self._held: OrderedDict[tuple[str, str], Tensors] = OrderedDict()
        self.bytes = 0

    def get(self, layer: str, adapter: str) -> Tensors | None:
        """What was put there, if it is still held."""
        with self._alone():
            tensors = self._held.get((layer, adapter))
            if tensors is not None:
                self._held.move_to_end((layer, adapter))
            return tensors

    def put(self, layer: str, adapter: str, tensors: Tensors) -> None:
        """Holds ``tensors``, if there is room or room can be made."""
        size = _bytes(tensors)
        with self._alone():
            self.drop(layer, adapter)
            while self._held and self.bytes + size > self.limit:
                oldest = next(iter(self._held))
                if oldest[1] == adapter:
                    return
                self.drop(*oldest)
            if size <= self.limit:
                self._held[layer, adapter] = tensors
                self.bytes += size

    def drop(self, layer: str, adapter: str) -> None:
        """Forgets what was put there, if anything."""
        with self._alone():
            tensors = self._held.pop((layer, adapter), None)
            if tensors is not None:
                self.bytes -= _bytes(tensors)

    def set_limit(self, limit: int) -> None:
        """Sets another limit; the cache starts empty."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"the limit must be a number of bytes, 0 or more, but is {limit!r}")
        with self._alone():
            self.limit, self.bytes = limit, 0
            self._held.clear()

    def _alone(self) -> AbstractContextManager:
        """A lock, except where torch.compile traces, which does not know locks."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def __reduce__(self) -> tuple[type[TensorCache], tuple[int]]:
        """Copies and pickles start empty."""
        return TensorCache, (self.limit,)


def _bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
