"""A tokenizer's words in a GGUF file.

Byte-level BPE is ``gpt2`` there, and sentencepiece's BPE with byte fallback is ``llama``.
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

OTHERWISE = "export another format"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
# How text is cut before the byte pairs are merged, by llama.cpp's names: the regular expression of
# the tokenizer's first step.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_SPLIT.replace("DIGITS", "{1,3}"): "llama-bpe", _SPLIT.replace("DIGITS", ""): "qwen2"}


def add(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Writes the tokenizer of a model with ``vocab_size`` embeddings.

    Raises:
        ValueError: llama.cpp would read the tokenizer differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    model = parts.get("model", {})
    if model.get("type") != "BPE":
        raise ValueError(
            "GGUF is written with BPE tokenizers, but this is a"
            f" {type(tokenizer).__name__}; {OTHERWISE}"
        )
    added = {token["id"]: token for token in parts["added_tokens"]}
    by_id = {index: token for token, index in model["vocab"].items()}
    last = max([*added, *by_id])
    if last >= vocab_size:
        raise ValueError(
            f"the tokenizer has a token {last}, but the model embeds {vocab_size} tokens; give the"
            " model's own tokenizer"
        )
    tokens, kinds = [], []
    for index in range(vocab_size):
        if index in added:
            tokens.append(added[index]["content"])
            kinds.append(CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            tokens.append(by_id.get(index, f"[PAD{index}]"))
            kinds.append(NORMAL if index in by_id else UNUSED)
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, parts, tokens, kinds, merges, tokenizer.unk_token_id)
    else:
        _check_byte_level(parts)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(parts["pre_tokenizer"]))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for kind in ("bos", "eos", "unk", "pad"):
        special = getattr(tokenizer, f"{kind}_token_id", None)
        if special is not None:
            getattr(writer, f"add_{kind}_token_id")(special)
    begins, ends = _frame(tokenizer)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    _add_chat_templates(writer, tokenizer.chat_template)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets the token that begins, and the one that ends texts; nothing else may."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = ids[: len(ids) - len(bare)] == [tokenizer.bos_token_id] or (
        ids == [tokenizer.bos_token_id, *bare, tokenizer.eos_token_id]
    )
    ends = ids[len(ids) - 1 :] == [tokenizer.eos_token_id] and len(ids) > len(bare)
    framed = [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends
    if ids != framed:
        raise ValueError(
            f"a GGUF file can put one token before and one after a text, but this tokenizer makes"
            f" {ids} of {bare}; {OTHERWISE}"
        )
    return begins, ends


def _check_byte_level(parts: dict[str, Any]) -> None:
    """ValueError for a byte-level tokenizer with a step that llama.cpp does not take."""
    model, normalizer = parts["model"], parts["normalizer"]
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = [step["type"] for step in steps]
    if kinds == ["NFC"]:
        logger.warning(
            "llama.cpp does not bring text into Unicode's NFC form, as this tokenizer does; texts"
            " with separate accents become other tokens there"
        )
    elif kinds:
        raise ValueError(
            f"this tokenizer changes text by {kinds} before it cuts it, which llama.cpp does not;"
            f" {OTHERWISE}"
        )
    cutter = parts["pre_tokenizer"] or {}
    for step in cutter.get("pretokenizers", [cutter]):
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            raise ValueError(
                "this tokenizer puts a space before a text, which llama.cpp does not for"
                f" byte-level tokens; {OTHERWISE}"
            )
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise ValueError(
                f"llama.cpp knows no `{field}`, but this tokenizer has {model[field]!r};"
                f" {OTHERWISE}"
            )
    # llama.cpp keeps whole words that are tokens for one kind only.
    expected = split_name(parts["pre_tokenizer"]) == "llama-bpe"
    if bool(model.get("ignore_merges")) != expected:
        raise ValueError(
            f"llama.cpp reads such a tokenizer with ignore_merges={expected}, but this one has"
            f" {model.get('ignore_merges')}; {OTHERWISE}"
        )


def _add_chat_templates(writer: Any, templates: str | dict[str, str] | None) -> None:
    """One template, or several by name: ``tokenizer.chat_template.NAME`` and a list of names."""
    if not isinstance(templates, dict):
        if templates:
            writer.add_chat_template(templates)
        return
    for name in templates:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise ValueError(
                "GGUF names chat templates with letters, digits and underscores, but the tokenizer"
                f" has one called {name!r}; rename it, or {OTHERWISE}"
            )
    # Sorted: the writer's own order of names changes from run to run.
    for name, template in sorted(templates.items()):
        if name == "default":
            writer.add_chat_template(template)
        else:
            writer.add_string(f"tokenizer.chat_template.{name}", template)
    if others := sorted(templates.keys() - {"default"}):
        writer.add_array("tokenizer.chat_templates", others)


def split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for the way a tokenizer cuts text into words; ValueError for others."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (pattern := steps[0]["pattern"].get("Regex")) in SPLITS:
        return SPLITS[pattern]
    raise ValueError(
        f"this tokenizer cuts text in a way ({kinds}) that has no known name in llama.cpp;"
        f" {OTHERWISE}"
    )


def _add_sentencepiece(
    writer: Any,
    parts: dict[str, Any],
    tokens: list[str],
    kinds: list[int],
    merges: list[tuple],
    unknown: int | None,
) -> None:
    """Scores in place of merges.

    llama.cpp joins the two neighbours whose joint token has the highest score; `tokenizers` goes by
    a list of merges.
    """
    for index, token in enumerate(tokens):
        if token.startswith("<0x") and len(token) == 6 and token.endswith(">"):
            kinds[index] = BYTE
        elif index == unknown:
            kinds[index] = UNKNOWN
    plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    merges = [merge for merge in merges if "".join(merge) in plain]
    order = [token for token, _ in groupby(map("".join, merges))]
    pairs = {
        (t[:i], t[i:]) for t in plain for i in range(1, len(t)) if t[:i] in plain and t[i:] in plain
    }
    if len(order) != len(set(order)) or pairs != set(merges):
        raise ValueError(
            "llama.cpp joins tokens by their scores, but the merges of this tokenizer follow from"
            f" no scores; {OTHERWISE}"
        )
    rank = {token: i for i, token in enumerate(order)}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(rank.get(token, len(order))) for token in tokens])
    writer.add_add_space_prefix(_has_space_prefix(parts))


def _has_space_prefix(parts: dict[str, Any]) -> bool:
    """Whether a space goes before a text; ValueError for any other change of the text."""
    normalizer, cutter = parts["normalizer"], parts["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    kinds = [step["type"] for step in steps]
    if kinds in (["Prepend", "Replace"], ["Replace"]) and cutter is None:
        return len(kinds) == 2
    if not steps and cutter and cutter["type"] == "Metaspace" and not cutter["split"]:
        return cutter["prepend_scheme"] != "never"
    cutter = cutter["type"] if cutter else None
    raise ValueError(
        f"this tokenizer prepares text by {kinds} and {cutter}, which a GGUF file cannot say;"
        f" {OTHERWISE}"
    )
