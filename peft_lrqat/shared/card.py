"""Sections of this package in model cards, added to the cards that PEFT and others write."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

from huggingface_hub import CardData, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


# The section between these is written anew at every save; the text around it is somebody else's and
# stays.
BEGIN, END = "<!-- peft_lrqat: begin -->", "<!-- peft_lrqat: end -->"


def write_section(save_directory: str, section: str, tags: set[str], base: str | None) -> None:
    """Creates or updates ``README.md``: our ``section``, and metadata for an adapter of this
    package on the model ``base``.
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
    card.text = f"{before.rstrip()}\n\n{BEGIN}\n{section}{END}{after or chr(10)}"
    _save(card, path)


def make_publishable(folder: str) -> None:
    """Rewrites ``README.md`` in ``folder`` as the Hub takes it.

    A saved adapter's own card names a local base, as PEFT has it.
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
    """What a card calls a base model, what it adds where that is no name on the Hub, and what
    stands for it in code.
    """
    if is_hub_id(base):
        return f"`{base}`", "", base
    # Its name alone: the whole path is nobody's business, and leads nowhere on another machine.
    place = f"a local directory, `{plain(Path(base).name)}`" if base else "not named"
    return (
        place,
        ". Whoever loads the adapter must supply a model with the same weights",
        "path of the base model",
    )


def is_hub_id(base: str | None) -> bool:
    """Whether ``base`` can be the name of a repository on the Hub, and names nothing on this
    machine.
    """
    if not base or os.path.exists(base):
        return False
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return True


def drop_local_base(data: CardData) -> None:
    """Takes local directories out of ``base_model`` and of the tags, where PEFT puts them: the Hub
    refuses such a card.
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
    """What stands before and after the section of an earlier save."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and not end:
        # Where our section ends is then unknown, and text of somebody else may follow.
        return before + rest, ""
    return before, after


def training_text(record: dict | None) -> str:
    """The training record in Markdown: steps, a table of the settings, a table of the metrics, each
    where there is one.
    """
    parts = []
    if (record or {}).get("steps") is not None:
        parts.append(f"Trained for {plain(record['steps'])} steps.\n")
    for key, heading in (("settings", "setting"), ("metrics", "metric")):
        if entries := (record or {}).get(key):
            parts.append(table(heading, entries))
    return "\n### Training\n\n" + "\n".join(parts) if parts else ""


def table(heading: str, entries: dict) -> str:
    """Names and values in Markdown."""
    rows = "".join(f"| {plain(name)} | {plain(value)} |\n" for name, value in entries.items())
    return f"| {heading} | value |\n|---|---|\n{rows}"


def plain(value: object) -> str:
    """One line that opens no cell of a table, no tag and no comment."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "&#124;")
