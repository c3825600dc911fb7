"""A store of expanded factors with a limit in bytes, shared by all layers of a model."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor


Factors = tuple[Tensor, ...]


class FactorCache:
    """The factors of (layer, adapter) that were used last, as many as ``limit`` bytes hold.

    Layers are run in turn: were the oldest always dropped, a limit a little too small for one adapter would keep nothing that is
    used again. So only factors of other adapters make room.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._factors: OrderedDict[tuple[str, str], Factors] = OrderedDict()
        self.bytes = 0

    def get(self, layer: str, adapter: str) -> Factors | None:
        """What was put there, if it is still held."""
        factors = self._factors.get((layer, adapter))
        if factors is not None:
            self._factors.move_to_end((layer, adapter))
        return factors

    def put(self, layer: str, adapter: str, factors: Factors) -> None:
        """Holds ``factors``, if there is room or room can be made."""
        self.drop(layer, adapter)
        size = _bytes(factors)
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
        factors = self._factors.pop((layer, adapter), None)
        if factors is not None:
            self.bytes -= _bytes(factors)

    def set_limit(self, limit: int) -> None:
        """Another limit; starts empty."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"the limit must be a number of bytes, 0 or more, but is {limit!r}")
        self.__init__(limit)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start empty."""
        return vars(FactorCache(self.limit))


def _bytes(factors: Factors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in factors)
