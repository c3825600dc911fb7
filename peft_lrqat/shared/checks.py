"""Checks of the fields of a configuration; each raises ValueError with the field, the rule and the
value.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any


def check_integer(name: str, value: object, minimum: int) -> None:
    """An integer of at least ``minimum``; True and False are refused."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, but is {value!r}")


def check_number(name: str, value: object, maximum: float | None = None) -> None:
    """A finite number; with ``maximum``, above 0 and at most that."""
    # NaN compares as False; integers may be too large to become a float.
    fits = (
        not isinstance(value, bool)
        and isinstance(value, int | float)
        and abs(value) <= sys.float_info.max
        and (maximum is None or 0 < value <= maximum)
    )
    if not fits:
        range_ = "finite" if maximum is None else f"above 0 and at most {maximum}"
        raise ValueError(f"`{name}` must be a number, {range_}, but is {value!r}")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, but is {value!r}")


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """One of ``known``."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, but is {value!r}")


def check_names(name: str, value: object, *, one_string: bool) -> None:
    """A list of module names or None; with ``one_string``, a single string as well."""
    if value is None or (one_string and isinstance(value, str)):
        return
    # A string in place of a list would be read letter by letter.
    if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
        kinds = "one string or a list of module names" if one_string else "a list of module names"
        raise ValueError(f"`{name}` must be {kinds}, but is {value!r}")


def check_regex(name: str, pattern: str) -> None:
    """A regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"`{name}`: {pattern!r} is not a regular expression: {error}") from error


def check_items(name: str, value: object, of: str) -> list[tuple[str, Any]]:
    """A dict with strings as keys; returns its items. ``of``: what the values are, in words."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"`{name}` must be a dict from names to {of}, but is {value!r}")
    return list(value.items())


def check_json(name: str, value: object, *, allow_nan: bool = True) -> None:
    """A value that a JSON file can hold."""
    try:
        json.dumps(value, sort_keys=True, allow_nan=allow_nan)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must fit into a JSON file, but is {value!r} ({error})"
        ) from error
