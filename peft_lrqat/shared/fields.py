"""The fields of a config: listed with their help; a misspelt one is answered, LoRA's understood."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar


Config = TypeVar("Config", bound=type)
# In the help of a field that the library sets.
FILLED_IN = ("filled in", "leave it to the library")
# The width of a docstring.
WIDTH = 100


def helpful_arguments(like: type | None = None) -> Callable[[Config], Config]:
    """A decorator of a dataclass whose constructor says what is wrong with an unknown field.

    ``help`` lists the fields of the dataclass.
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
        return listed_in_help(config)

    return decorate


def listed_in_help(config: Config) -> Config:
    """A decorator of a dataclass that puts its fields behind its docstring, for `help(config)`."""
    if config.__doc__ is None:  # Python left it out, with -OO
        return config
    listed = [
        textwrap.fill(
            f"{name} (default {default}): {text}",
            width=WIDTH,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
        for name, default, text in own_fields(config)
    ]
    config.__doc__ = "\n".join([inspect.cleandoc(config.__doc__), "", "Args:", *listed, ""])
    return config


def own_fields(config: type) -> Iterator[tuple[str, str, str]]:
    """Name, default as code, and help of each field that a user sets.

    Leaves out what PEFT and transformers declare themselves: it is in their documentation.
    """
    own = {
        field
        for part in config.__mro__
        if part.__module__.partition(".")[0] == "peft_lrqat"
        for field in inspect.get_annotations(part)
    }
    for option in dataclasses.fields(config):
        text = option.metadata.get("help", "")
        if option.name not in own or any(words in text for words in FILLED_IN):
            continue
        default = "required"
        if option.default is not dataclasses.MISSING:
            default = repr(option.default)
        elif option.default_factory is not dataclasses.MISSING:
            default = repr(option.default_factory())
        yield option.name, default, text


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
