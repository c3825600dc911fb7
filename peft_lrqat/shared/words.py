"""Lists of names and numbers in messages."""

from __future__ import annotations

from collections.abc import Iterable


def some(names: Iterable[object], count: int = 3) -> str:
    """The first ``count`` of the sorted names, in backticks, and how many more there are."""
    names = sorted(map(str, names))
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(f"`{name}`" for name in names[:count]) + more
