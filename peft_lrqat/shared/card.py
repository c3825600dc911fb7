"""Adds the sections of this package to model cards that PEFT and others write."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

from huggingface_hub import CardData, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# Every save replaces the section between these marks and keeps the text around it, which others
# wrote.
BEGIN, END = "<!-- peft_lrqat: begin -->", "<!-- peft_lrqat: end -->"


def write_section(save_directory: str, section: str, tags: set[str], base: str | None) -> None:
    """Creates or updates ``README.md`` in ``save_directory``.

    Writes our ``section``, and metadata for an adapter of this package on the model ``base``.
    """
    path = os.path.join(save_directory, "README.md")
    card = (
        ModelCard.load(path) if os.path.exists(path) else ModelCard.from_template(ModelCardData())
    )
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "peft_lrqat", *tags})
    if not card.data.get("license"):
        # An adapter derives from its base model, and nothing here knows that model's licence.
        card.data["license"] = "other"
        card.data["license_name"] = "same-as-base-model"
    if is_hub_id(base) and not card.data.get("base_model"):
        card.data["base_model"] = base
    before, after = _around_section(card.text)
    before = f"{before.rstrip()}\n\n" if before.strip() else ""
    card.text = f"{before}{BEGIN}\n{section}{END}{after or chr(10)}"
    _save(card, path)


def make_publishable(folder: str) -> None:
    """Rewrites ``README.md`` in ``folder`` so that the Hub accepts it.

    The card of a saved adapter may name a local base, because PEFT writes it there.
    """
    path = os.path.join(folder, "README.md")
    card = ModelCard.load(path)
    drop_local_base(card.data)
    _save(card, path)


def _save(card: ModelCard, path: str) -> None:
    temporary = path + ".tmp"
    card.save(temporary)
    os.replace(temporary, path)


def base_in_words(base: str | None) -> tuple[str, str, str]:
    """Returns what a card says about a base model: its name, a note, and its name in code.

    The note says what users must supply if ``base`` is not a name on the Hub.
    """
    if base and is_hub_id(base):
        return f"`{base}`", "", base
    # Only the name: the whole path is private, and means nothing on another machine.
    place = f"a local directory, `{plain(Path(base).name)}`" if base else "not named"
    return (
        place,
        ". Whoever loads the adapter must supply a model with the same weights",
        "path of the base model",
    )


def is_hub_id(base: str | None) -> bool:
    """Whether ``base`` can be the name of a repository on the Hub, not a path on this machine."""
    if not base or os.path.exists(base):
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def public_name(name: str | None) -> str | None:
    """The name of a model as files may say it: of a local directory only what it is called."""
    if not name or is_hub_id(name):
        return name or None
    return f"./{Path(name).name}"


def drop_local_base(data: CardData) -> None:
    """Removes local directories from ``base_model`` and from the tags, where PEFT puts them.

    The Hub refuses a card with such entries.
    """
    base = data.get("base_model")
    if isinstance(base, list):
        data["base_model"] = [name for name in base if is_hub_id(name)] or None
    elif not is_hub_id(base):
        data["base_model"] = None  # which leaves the field out
    data["tags"] = [tag for tag in data.get("tags") or [] if not _names_local_base(tag)] or None


def _names_local_base(tag: str) -> bool:
    base = re.fullmatch(r"base_model:(?:[a-z]+:)?(.*)", tag)
    return base is not None and not is_hub_id(base[1])


def _around_section(text: str) -> tuple[str, str]:
    """Returns the text before and after our section.

    It stays where it is found, and a new one comes first, behind the title: PEFT's text is a form
    that hardly anybody fills in.
    """
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        title = re.match(r"\s*# .*\n?", text)
        end = title.end() if title else 0
        rest = text[end:].strip("\n")
        return text[:end], f"\n\n{rest}\n" if rest else ""
    _, end_mark, after = rest.partition(END)
    if not end_mark:
        # The end of our section is then unknown, and text that others wrote may follow.
        return before + rest, ""
    return before, after


def training_text(record: dict | None) -> str:
    """Formats the training record as Markdown: steps, and tables of settings and metrics.

    Leaves out what the record does not have.
    """
    record, parts = record or {}, []
    if record.get("steps") is not None:
        parts.append(f"Trained for {plain(record['steps'])} steps.\n")
    for key, heading in (("settings", "setting"), ("metrics", "metric")):
        if entries := record.get(key):
            parts.append(table(heading, entries))
    return "\n### Training\n\n" + "\n".join(parts) if parts else ""


def table(heading: str, entries: dict) -> str:
    """Formats names and values as a Markdown table."""
    rows = "".join(f"| {plain(name)} | {plain(value)} |\n" for name, value in entries.items())
    return f"| {heading} | value |\n|---|---|\n{rows}"


def plain(value: object) -> str:
    """Formats ``value`` as one line that opens no table cell, tag or comment."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "&#124;")
