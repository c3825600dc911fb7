"""Bits per weight: what training found, and what the files of a format hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..quant.grid import Grid
from .base import Format
from .linear import Target


# Above this, a file holds more than rounding up to bytes and blocks explains.
MARGIN = 1.1


@dataclass(frozen=True, kw_only=True)
class StoredBits:
    """Bits per weight, with scales and zero points, over all targets of a model."""

    trained: float
    stored: float

    @property
    def wasteful(self) -> bool:
        """Whether the files hold over a tenth more than was trained."""
        return self.stored > MARGIN * self.trained

    def remark(self, format: Format) -> str:
        """What a user should know before choosing ``format``."""
        return (
            f"{format.name} stores these weights at {self.stored:.2f} bits each, but"
            f" {self.trained:.2f} bits, scales included, are trained"
        )


def stored_bits(
    targets: Iterable[Target], format: Format, activations: Grid | None = None
) -> StoredBits:
    """Bits per weight of some targets in the files of a format."""
    targets = list(targets)
    weights = sum(target.num_weights for target in targets)
    stored = stored_bytes(targets, format, activations)
    trained = sum(target.trained_bytes for target in targets)
    return StoredBits(trained=8 * trained / weights, stored=8 * stored / weights)


def stored_bytes(targets: Iterable[Target], format: Format, activations: Grid | None = None) -> int:
    """Bytes of some targets in the files of a format that holds them."""
    return sum(
        format.stored_bytes(replace(target, grid=format.stored_grid(target.grid)), activations)
        for target in targets
    )
