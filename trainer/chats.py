"""Chats and instructions for language modelling: rows become examples whose answers are scored.

A row has one of
    messages              a list of {"role": ..., "content": ...}
    prompt, completion    both such lists, or both plain text

The tokenizer's chat template writes a list of messages as text. What is scored is found in that
text: a template that marks nothing is enough. An answer is what the text of the messages up to it
adds to the text of those before it, with the template's opening of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .data import AnyDataset
from .labels import IGNORED


logger = logging.get_logger(__name__)

Loss = Literal["completion", "all"]
Span = tuple[int, int]  # characters of a text
OPEN, CLOSE = "⟦", "⟧"


def is_chat(rows: AnyDataset) -> bool:
    """Whether the rows are chats or prompts with completions."""
    columns = set(rows.column_names or ())
    return "messages" in columns or {"prompt", "completion"} <= columns


def make_chat_blocks(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    loss: Loss = "completion",
    packing: bool = True,
) -> Dataset:
    """Training data of chats: blocks of exactly ``block_size`` tokens.

    Columns: ``input_ids``; ``labels``, -100 where a token is not scored; with ``packing`` also
    ``position_ids``, which begin again at 0 with each example of a block, so that attention stays
    inside an example, as it does in transformers without an attention mask and with
    ``use_cache=False``, which the Trainer sets. The rest of a block is padding. An example longer
    than a block loses its end, and one without a scored token is left out; a warning says how many.

    Args:
        rows: with a column ``messages``, or the columns ``prompt`` and ``completion``; ``tools`` is
            handed to the chat template.
        tokenizer: with a chat template, unless prompts are plain text.
        block_size: tokens in a block.
        loss: ``completion``: the answers (of the assistant) are scored; ``all``: every token.
        packing: several examples in a block, where they fit.

    Raises:
        ValueError: no chat template, a template that rewrites earlier messages, a row that is no
            chat, or nothing to score.
    """
    if loss not in ("completion", "all"):
        raise ValueError(f"`loss` must be completion or all, but is {loss!r}")
    if block_size < 2:
        raise ValueError(f"`block_size` must be at least 2, but is {block_size}")
    examples, cut, empty = [], 0, 0
    for number, row in enumerate(rows):
        try:
            ids, labels = tokenize_chat(row, tokenizer, loss=loss)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"row {number} of the data set: {error}") from error
        cut += len(ids) > block_size
        ids, labels = ids[:block_size], labels[:block_size]
        if all(label == IGNORED for label in labels[1:]):
            empty += 1
            continue
        # No token of the same example predicts the first one.
        examples.append((ids, [IGNORED, *labels[1:]]))
    _warn_of_beginning(examples, tokenizer)
    if cut:
        logger.warning(
            f"{cut:,} of {len(rows):,} examples are longer than a block of {block_size} tokens and "
            "lose their end; give a larger block size to keep it"
        )
    if not examples:
        raise ValueError(
            f"none of the {len(rows):,} examples has a token to score within {block_size} tokens; "
            "give a larger block size, or data with answers of the assistant"
        )
    if empty:
        logger.warning(f"{empty:,} examples without a scored token are left out")
    bins = _fill([len(ids) for ids, _ in examples], block_size) if packing else None
    return _blocks(examples, bins, block_size, _padding(tokenizer))


def _warn_of_beginning(
    examples: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A warning if chats lack the token that the tokenizer puts in front of every other text."""
    bos = tokenizer.bos_token_id
    if bos is None or not examples:
        return
    if tokenizer("a")["input_ids"][:1] == [bos] != examples[0][0][:1]:
        logger.warning(
            f"the tokenizer begins every text with {tokenizer.bos_token}, which the chat template "
            "leaves out; llama.cpp and other runtimes put it in front of chats as well. Begin the "
            "template with `{{ bos_token }}`"
        )


def tokenize_chat(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, loss: Loss = "completion"
) -> tuple[list[int], list[int]]:
    """Token ids of one row, and their labels: -100 where a token is not scored."""
    text, spans, templated = render_chat(row, tokenizer, loss=loss)
    # A template writes the special tokens itself.
    made = tokenizer(
        text,
        add_special_tokens=not templated,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids, offsets = list(made["input_ids"]), list(made["offset_mapping"])
    eos = tokenizer.eos_token_id
    if not templated and eos is not None and ids[-1:] != [eos]:
        # The end of a plain completion is learnt, too.
        ids, offsets = [*ids, eos], [*offsets, (len(text) - 1, len(text))]
    if loss == "all":
        return ids, list(ids)
    # A token across the border of an answer belongs to what comes before.
    scored = [
        end > start and any(first <= start < last for first, last in spans)
        for start, end in offsets
    ]
    return ids, [i if s else IGNORED for i, s in zip(ids, scored, strict=True)]


def render_chat(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, loss: Loss = "completion"
) -> tuple[str, list[Span], bool]:
    """The text of one row, the spans of it that are scored, and whether a template wrote it."""
    text, answers, templated = _rendered(row, tokenizer)
    # Answers that nobody asks for are not looked for: not every template lets them be found.
    return text, [(0, len(text))] if loss == "all" else answers(), templated


def _rendered(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, Callable[[], list[Span]], bool]:
    """The text of one row, what finds its answers, and whether a template wrote it."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("messages") is not None:
        messages, first = _messages(row["messages"]), 0
    elif isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
        return text, lambda: [(len(prompt), len(text))], False
    elif isinstance(prompt, list) and isinstance(completion, list):
        messages, first = _messages(prompt + completion), len(prompt)
    else:
        raise ValueError(
            "a row needs `messages`, or `prompt` and `completion`, both text or both lists of "
            f"messages, but `prompt` is {type(prompt).__name__} and `completion` "
            f"{type(completion).__name__}"
        )
    template = _Template(tokenizer, row.get("tools") or None)
    text = template.text_of(messages)
    return text, lambda: _answers(text, messages, template, first), True


def marked(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, loss: Loss = "completion"
) -> str:
    """The text of one row, what is scored of it between ⟦ and ⟧."""
    text, spans, _ = render_chat(row, tokenizer, loss=loss)
    parts, last = [], 0
    for start, end in spans:
        parts += [text[last:start], OPEN, text[start:end], CLOSE]
        last = end
    return "".join([*parts, text[last:]])


@torch.no_grad()
def check_packing(model: nn.Module, blocks: Dataset) -> None:
    """ValueError if the model lets an example of a packed block see the one before it.

    Whether attention follows ``position_ids`` is up to the architecture; one block tells.
    """
    if "position_ids" not in (blocks.column_names or ()):
        return
    row = next((row for row in blocks if row["position_ids"].count(0) > 1), None)
    if row is None:
        return
    device = next(model.parameters()).device
    ids, positions = (
        torch.tensor(row[name], device=device)[None] for name in ("input_ids", "position_ids")
    )
    starts = [*(positions[0] == 0).nonzero()[:, 0].tolist(), ids.shape[1]]
    inside = slice(starts[1], starts[2])
    was_training = model.training
    model.eval()
    try:
        packed, alone = (
            _logits(model, tokens, places)
            for tokens, places in ((ids, positions), (ids[:, inside], positions[:, inside]))
        )
    finally:
        model.train(was_training)
    difference = float((packed[:, inside].float() - alone.float()).abs().max())
    if difference > torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().max()):
        raise ValueError(
            f"{type(model).__name__} lets an example of a packed block see the one before it "
            f"(logits differ by {difference:.3g}); train without packing (`--packing false`)"
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def _messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a row, without the empty fields that a table gives all of them."""
    if not isinstance(value, list) or not all(
        isinstance(message, Mapping) and message.get("role") for message in value
    ):
        raise ValueError('messages must be a list of {"role": ..., "content": ...}')
    found = [{k: v for k, v in message.items() if v is not None} for message in value]
    for number, message in enumerate(found):
        if not isinstance(message.get("content", ""), str | list) or len(message) < 2:
            raise ValueError(
                f"message {number} of a chat has the content {message.get('content')!r}; it must "
                "be text, or be left out beside other fields, such as `tool_calls`"
            )
    return found


class _Template:
    """Writes messages as text, with the tools of one row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Any) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "messages need a chat template, but the tokenizer has none; give one with "
                "`--chat_template FILE`, or set `tokenizer.chat_template`"
            )
        self._tokenizer, self._tools = tokenizer, tools

    def text_of(self, messages: Sequence[dict[str, Any]], *, opened: bool = False) -> str:
        """``opened``: with the opening of an answer at the end."""
        from jinja2 import TemplateError  # a chat template is there, so transformers needs it, too

        try:
            made: Any = self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=opened
            )
        except TemplateError as error:
            raise ValueError(f"the chat template cannot write this chat: {error}") from error
        return made


def _answers(
    text: str, messages: Sequence[dict[str, Any]], template: _Template, first: int
) -> list[Span]:
    """The answers in the text of a chat: messages of the assistant, from number ``first`` on."""
    spans: list[Span] = []
    for number, message in enumerate(messages):
        if number < first or message["role"] != "assistant":
            continue
        before = template.text_of(messages[:number], opened=True)
        after = template.text_of(messages[: number + 1])
        span = _span_in(text, before, after, message.get("content"))
        if span is None:
            raise ValueError(
                "the chat template writes earlier messages differently once others follow, so "
                f"message {number}, an answer, is not found in the text; split the chat into rows "
                "that end with one answer each, or score every token (`--loss all`)"
            )
        spans.append(span)
    return spans


def _span_in(text: str, before: str, after: str, content: Any) -> Span | None:
    """Where the answer lies that turns ``before`` into ``after``; None if ``text`` has no such."""
    if not text.startswith(before):
        return None
    if after.startswith(before) and text.startswith(after):
        return len(before), len(after)
    # Templates that drop the thoughts of all answers but the last: the same answer without them.
    said = content.strip() if isinstance(content, str) else ""
    closing = after[after.rfind(said) + len(said) :] if said else ""
    place = text.find(said + closing, len(before)) if closing else -1
    # Nothing but white space may stand between the opening of the answer and its words.
    if place < 0 or text[len(before) : place].strip():
        return None
    return len(before), place + len(said) + len(closing)


def _fill(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Examples by block: the longest first, each into the fullest block that has room for it."""
    by_room: dict[int, list[int]] = {}  # room -> blocks
    bins: list[list[int]] = []
    for example in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[example]
        room = next((r for r in range(length, size + 1) if by_room.get(r)), None)
        if room is None:
            bins.append([])
            place, room = len(bins) - 1, size
        else:
            place = by_room[room].pop()
        bins[place].append(example)
        by_room.setdefault(room - length, []).append(place)
    return bins


def _blocks(
    examples: Sequence[tuple[list[int], list[int]]],
    bins: list[list[int]] | None,
    size: int,
    padding: int,
) -> Dataset:
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    if bins is not None:
        columns["position_ids"] = []
    for numbers in bins if bins is not None else [[n] for n in range(len(examples))]:
        ids = [i for number in numbers for i in examples[number][0]]
        labels = [label for number in numbers for label in examples[number][1]]
        rest = size - len(ids)
        columns["input_ids"].append(ids + [padding] * rest)
        columns["labels"].append(labels + [IGNORED] * rest)
        if bins is not None:
            lengths = [*(len(examples[number][0]) for number in numbers), rest]
            columns["position_ids"].append([p for length in lengths for p in range(length)])
    return Dataset.from_dict(columns)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a block; it is never scored, and comes after all that is."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
