"""A store of expanded factors with a limit in bytes, shared by all layers of a model."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from threading import RLock

import torch
from torch import Tensor


Factors = tuple[Tensor, ...]


class FactorCache:
    """The factors of (layer, adapter) that were used last, as many as ``limit`` bytes hold.

    Layers are run in turn: were the oldest always dropped, a limit a little too small for one adapter would keep nothing that is
    used again. So only factors of other adapters make room. Requests may run in threads.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._lock = RLock()
        self._factors: OrderedDict[tuple[str, str], Factors] = OrderedDict()
        self.bytes = 0

    def get(self, layer: str, adapter: str) -> Factors | None:
        """What was put there, if it is still held."""
        with self._alone():
            factors = self._factors.get((layer, adapter))
            if factors is not None:
                self._factors.move_to_end((layer, adapter))
            return factors

    def put(self, layer: str, adapter: str, factors: Factors) -> None:
        """Holds ``factors``, if there is room or room can be made."""
        size = _bytes(factors)
        with self._alone():
            self.drop(layer, adapter)
            while self._factors and self.bytes + size > self.limit:
                oldest = next(iter(self._factors))
                if oldest[1] == adapter:
                    return
                self.drop(*oldest)
            if size <= self.limit:
                self._factors[layer, adapter] = factors
                self.bytes += size

    def drop(self, layer: str, adapter: str) -> None:
        """Forgets what was put there, if anything."""
        with self._alone():
            factors = self._factors.pop((layer, adapter), None)
            if factors is not None:
                self.bytes -= _bytes(factors)

    def set_limit(self, limit: int) -> None:
        """Another limit; starts empty."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"the limit must be a number of bytes, 0 or more, but is {limit!r}")
        with self._alone():
            self.limit, self.bytes = limit, 0
            self._factors.clear()

    def _alone(self) -> AbstractContextManager:
        """A lock, but not where torch.compile traces, which knows none."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def __reduce__(self) -> tuple[type[FactorCache], tuple[int]]:
        """Copies and pickles start empty."""
        return FactorCache, (self.limit,)


def _bytes(factors: Factors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in factors)
