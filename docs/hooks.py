"""What mkdocs fills in while it builds the site: tables of config fields from their help."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from typing import Any


FIELDS = re.compile(r"<!-- fields: (?P<module>[\w.]+)\.(?P<name>\w+) -->")
FILLED_IN = ("filled in", "leave it to the library")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces each ``<!-- fields: package.Config -->`` by the table of these fields."""
    return FIELDS.sub(lambda found: field_table(found["module"], found["name"]), markdown)


def field_table(module: str, name: str) -> str:
    """A Markdown table of the fields of a config that a user sets: name, default, help."""
    config = getattr(import_module(module), name)
    # What PEFT and transformers declare themselves is in their documentation.
    own = {
        field
        for part in config.__mro__
        if _is_ours(part)
        for field in inspect.get_annotations(part)
    }
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for option in dataclasses.fields(config):
        text = option.metadata.get("help", "")
        if option.name not in own or any(words in text for words in FILLED_IN):
            continue
        rows.append(
            f"| `{option.name}` | `{_default(option)}` | {text.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(rows)


def _is_ours(part: type) -> bool:
    return part.__module__.partition(".")[0] == "peft_lrqat"


def _default(option: dataclasses.Field) -> str:
    if option.default is not dataclasses.MISSING:
        return repr(option.default)
    if option.default_factory is not dataclasses.MISSING:
        return repr(option.default_factory())
    return "required"
