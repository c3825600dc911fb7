"""What mkdocs fills in while it builds the site: tables of config fields from their help."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from peft_lrqat.shared.fields import own_fields


FIELDS = re.compile(r"<!-- fields: (?P<module>[\w.]+)\.(?P<name>\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces each ``<!-- fields: package.Config -->`` by the table of these fields."""
    return FIELDS.sub(lambda found: field_table(found["module"], found["name"]), markdown)


def field_table(module: str, name: str) -> str:
    """A Markdown table of the fields of a config that a user sets: name, default, help."""
    config = getattr(import_module(module), name)
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for field, default, text in own_fields(config):
        rows.append(f"| `{field}` | `{default}` | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)
