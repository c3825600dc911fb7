"""Whether the tokenizer in a GGUF file cuts texts and chats as the one in training does.

The words of the file are read as llama.cpp reads them: its names for the way text is cut, its
scores, and its rule for the token that begins a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from .vocabulary import CONTROL, NORMAL, SPLITS, USER_DEFINED


logger = logging.get_logger(__name__)
FIELDS = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_space_prefix",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "add_bos_token",
    "add_eos_token",
)
TURNS = [
    {"role": "user", "content": "What is 12345.67 in words? It's\n\n  for Zoë."},
    {"role": "assistant", "content": "Twelve thousand ..."},
    {"role": "user", "content": "Thanks!"},
]


def is_saved_in(path: Path) -> bool:
    """Whether the directory of an export also holds a tokenizer for transformers."""
    return (path / "tokenizer.json").is_file()


def differences(path: Path, file: str) -> list[str]:
    """How the tokenizer in a GGUF file differs from the one saved beside it, in words.

    A text and a chat of two turns are cut by both. Like llama.cpp, the reader of the file puts the
    token that begins a text in front, once, if the file says so.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path / file).fields
    # As it was saved: `AutoTokenizer` makes some of them anew, by the model beside it.
    mine = PreTrainedTokenizerFast.from_pretrained(path)

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    ggml = {name: value(f"tokenizer.ggml.{name}") for name in FIELDS}
    theirs = _tokenizer_of(ggml)
    begins = ggml["bos_token_id"] if ggml["add_bos_token"] else None
    ends = ggml["eos_token_id"] if ggml["add_eos_token"] else None

    def cut(text: str) -> list[int]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        if begins is not None and ids[:1] != [begins]:
            ids = [begins, *ids]
        return ids if ends is None else [*ids, ends]

    found = []
    text = TURNS[0]["content"]
    expected = mine(text)["input_ids"]
    if cut(text) != expected:
        found.append(f"a text becomes {cut(text)} in the file, but {expected} in training")
    templates = mine.chat_template
    for name, template in (templates if isinstance(templates, dict) else {"": templates}).items():
        if template is None:
            continue
        key = f"tokenizer.chat_template{f'.{name}' if name not in ('', 'default') else ''}"
        if value(key) != template:
            found.append(f"`{key}` of the file is not the tokenizer's template")
            continue
        options = {"chat_template": template, "add_generation_prompt": True}
        try:
            rendered = mine.apply_chat_template(TURNS, tokenize=False, **options)
        except Exception as error:  # a template may refuse a chat, in whatever way
            logger.warning(f"the chat template {name or 'of the tokenizer'} was not tried: {error}")
            continue
        expected = mine(rendered, add_special_tokens=False)["input_ids"]
        if cut(rendered) != expected:
            found.append(
                f"a chat begins with {cut(rendered)[:3]} in llama.cpp, but with {expected[:3]} in"
                f" training: {_why(cut(rendered), expected, begins)}"
            )
    return found


def _why(theirs: list[int], mine: list[int], begins: int | None) -> str:
    if begins is not None and theirs == [begins, *mine]:
        return (
            "the tokenizer begins every text with a token that the chat template leaves out; begin"
            " the template with `{{ bos_token }}`, or train with it"
        )
    return "the tokens differ; export another format"


def _tokenizer_of(ggml: dict[str, Any]) -> Tokenizer:
    """A tokenizer of the fields of a file, by name without ``tokenizer.ggml.``."""
    tokens, kinds = ggml["tokens"], ggml["token_type"]
    words = {token: index for index, token in enumerate(tokens)}
    if ggml["model"] == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in ggml["merges"] or ()]
        model = models.BPE(words, merges, ignore_merges=ggml["pre"] == "llama-bpe")
        found = Tokenizer(model)
        found.pre_tokenizer = _cutter(ggml["pre"])
    else:
        plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
        best_first = sorted(plain, key=lambda token: -ggml["scores"][words[token]])
        merges = [
            (token[:i], token[i:])
            for token in best_first
            for i in range(1, len(token))
            if token[:i] in plain and token[i:] in plain
        ]
        unknown = ggml["unknown_token_id"]
        model = models.BPE(
            words,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            byte_fallback=True,
            fuse_unk=True,
        )
        found = Tokenizer(model)
        spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
        if ggml["add_space_prefix"]:
            spaces.insert(0, normalizers.Prepend("\u2581"))
        found.normalizer = normalizers.Sequence(spaces)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == CONTROL:
            found.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            found.add_tokens([AddedToken(token, normalized=False)])
    return found


def _cutter(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before bytes are merged, by llama.cpp's name."""
    if name in SPLITS.values():
        pattern = next(pattern for pattern, known in SPLITS.items() if known == name)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    cutter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cutter])
    return cutter
