"""The tokenizer, chat template and generation config of an adapter: its own, or its base's."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE, GENERATION_CONFIG_NAME

from .pipeline import find_file


# Any of them makes a tokenizer of transformers.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def load_tokenizer(
    adapter: str, base: str, **where: str | None
) -> tuple[PreTrainedTokenizerBase, dict[str, str]]:
    """The tokenizer that belongs to an adapter, and where it and its chat template came from.

    A tokenizer beside the adapter was saved by the training run; it may have other tokens and
    another chat template than the base's. Without a template of its own it takes the base's.

    Raises:
        OSError, ValueError: neither place has a tokenizer.
    """
    own = has_tokenizer(adapter, **where)
    options = {key: value for key, value in where.items() if value is not None} if own else {}
    tokenizer = AutoTokenizer.from_pretrained(adapter if own else base, **options)
    places = {"tokenizer": adapter if own else base}
    if tokenizer.chat_template is not None:
        places["chat template"] = places["tokenizer"]
    if not own and (path := find_file(adapter, CHAT_TEMPLATE_FILE, **where)):
        with open(path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
        places["chat template"] = adapter
    if own and tokenizer.chat_template is None and has_tokenizer(base):
        tokenizer.chat_template = AutoTokenizer.from_pretrained(base).chat_template
        if tokenizer.chat_template is not None:
            places["chat template"] = base
    return tokenizer, places


def has_tokenizer(place: str, **where: str | None) -> bool:
    """Whether a directory or repository holds a tokenizer."""
    return any(find_file(place, file, **where) for file in TOKENIZER_FILES)


def load_generation_config(adapter: str, **where: str | None) -> GenerationConfig | None:
    """The generation config beside an adapter; None if there is none."""
    if find_file(adapter, GENERATION_CONFIG_NAME, **where) is None:
        return None
    options: dict[str, Any] = {key: value for key, value in where.items() if value is not None}
    return GenerationConfig.from_pretrained(adapter, **options)
