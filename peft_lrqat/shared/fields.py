"""Keyword arguments of a config: suggests the closest name, and understands those of LoRA."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar


Config = TypeVar("Config", bound=type)


def helpful_arguments(like: type | None = None) -> Callable[[Config], Config]:
    """A decorator of a dataclass whose constructor says what is wrong with an unknown field.

    Fields that only the dataclass ``like`` has are accepted at their defaults there, which change
    nothing, and refused by name otherwise.
    """

    def decorate(config: Config) -> Config:
        init: Callable[..., None] = config.__init__  # type: ignore[misc]  # of this very class
        known = {option.name for option in dataclasses.fields(config) if option.init}
        neutral = {} if like is None else _defaults(like, without=known)
        other = "" if like is None else like.__name__

        @wraps(init)
        def checked(self: Any, *args: Any, **fields: Any) -> None:
            for name in sorted(fields.keys() - known):
                if name not in neutral:
                    raise TypeError(_unknown(config, name, known))
                if fields[name] != neutral[name]:
                    raise ValueError(
                        f"`{name}` is a field of {other} that {config.__name__} does not "
                        f"have, so it must be {neutral[name]!r}, but is {fields[name]!r}; set it "
                        f"to {neutral[name]!r}, or leave it out"
                    )
            init(self, *args, **{name: fields[name] for name in fields if name in known})

        config.__init__ = checked  # type: ignore[misc]  # a decorator knows no subclass yet
        return config

    return decorate


def _defaults(config: type, without: set[str]) -> dict[str, Any]:
    """The fields of a dataclass and their defaults."""
    found = {}
    for option in dataclasses.fields(config):
        if option.name in without or not option.init:
            continue
        if option.default is not dataclasses.MISSING:
            found[option.name] = option.default
        elif option.default_factory is not dataclasses.MISSING:
            found[option.name] = option.default_factory()
    return found


def _unknown(config: type, name: str, known: set[str]) -> str:
    """Python's own words first: PEFT looks for them when it reads files of newer releases."""
    close = difflib.get_close_matches(name, known, n=1)
    way_out = (
        f"did you mean `{close[0]}`?" if close else f"its fields are {', '.join(sorted(known))}"
    )
    return f"{config.__name__}.__init__() got an unexpected keyword argument {name!r}; {way_out}"
