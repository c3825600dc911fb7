"""Text for language modelling: files, a directory or a hub data set become blocks of token ids."""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import PreTrainedTokenizerBase


AnyDataset: TypeAlias = Dataset | IterableDataset
Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# The readers of `datasets` by file suffix; a file with any other suffix is one document of text.
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # written by `save_to_disk`
HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*(?::[\w.-]+)?")
DOCUMENTS_AT_A_TIME = 1000
NO_TEXT = "the data set has no text: every document is empty or blank; give one with text in it"


def load_documents(
    source: Source,
    *,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
) -> AnyDataset:
    """One row per document, in the single column ``text_column``.

    ``source`` is one of

    - one or more files: ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` with a text column;
      anything else is plain UTF-8 text, where one file is one document, line breaks included;
    - a directory: written by ``save_to_disk``, or one that ``load_dataset`` understands;
    - a data set on the hub, ``name`` or ``name:config``.

    ``split`` chooses among the splits of a directory or hub data set. Files have only one split, so
    it has no effect on them.
    """
    rows = load_rows(source, split=split, streaming=streaming)
    return only_text(rows, text_column, ", ".join(_names_of(source)))


def _names_of(source: Source) -> list[str]:
    names = [source] if isinstance(source, str | os.PathLike) else source
    return [os.fspath(name) for name in names]


def load_rows(source: Source, *, split: str = "train", streaming: bool = False) -> AnyDataset:
    """The rows of a source that `load_documents` takes, with all their columns."""
    names = _names_of(source)
    if not names or "" in names:
        raise ValueError(f"a data set needs at least one file or name, but got {source!r}")
    if len(names) > 1 or Path(names[0]).is_file():
        return _from_files(names, streaming)
    if Path(names[0]).is_dir():
        return _choose_split(_from_directory(names[0], streaming), split, names[0])
    return _choose_split(_from_hub(names[0], streaming), split, names[0])


def tokenize(
    documents: AnyDataset, tokenizer: PreTrainedTokenizerBase, *, text_column: str = "text"
) -> AnyDataset:
    """Token ids of each document, with the tokenizer's end-of-text token added, if it has one.

    Blank documents are left out. If the tokenizer puts a token in front of every text (``<s>``), it
    does so here too. `datasets` caches the result.
    """
    return documents.map(
        _tokenize,
        batched=True,
        batch_size=DOCUMENTS_AT_A_TIME,
        remove_columns=[text_column],
        fn_kwargs={"tokenizer": tokenizer, "text_column": text_column},
        **({} if isinstance(documents, IterableDataset) else {"desc": "tokenising"}),
    )


def make_blocks(
    documents: AnyDataset | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    text_column: str = "text",
) -> AnyDataset:
    """Training data: blocks of exactly ``block_size`` tokens; ``labels`` equal ``input_ids``.

    The blocks are cut from the documents joined end to end, 1,000 documents at a time. Tokens left
    over at the end of each thousand, fewer than ``block_size``, are not used.

    Args:
        documents: a data set with a text column, or a list of texts.
        tokenizer: the tokenizer of the model.
        block_size: tokens in a block.
        text_column: the column that holds the text of a data set.
    """
    if isinstance(documents, str):
        raise ValueError(
            "`documents` must be a data set or a list of texts, but is one string; put it in a "
            "list, or use `load_blocks` for the name of a file"
        )
    if not isinstance(documents, Dataset | IterableDataset):
        documents = Dataset.from_dict({text_column: list(documents)})
    if block_size < 2:
        raise ValueError(
            "`block_size` must be at least 2 (a block predicts its own next tokens), but is "
            f"{block_size}"
        )
    tokens = tokenize(documents, tokenizer, text_column=text_column)
    blocks = tokens.map(
        _cut_into_blocks,
        batched=True,
        batch_size=DOCUMENTS_AT_A_TIME,
        fn_kwargs={"block_size": block_size},
        **({} if isinstance(tokens, IterableDataset) else {"desc": "cutting blocks"}),
    )
    if next(iter(blocks), None) is None:
        count = sum(len(row["input_ids"]) for row in tokens)
        if count == 0:
            raise ValueError(NO_TEXT)
        raise ValueError(
            f"the data must fill at least one block, but it has {count} tokens and `block_size` is "
            f"{block_size}; use more text, or a `block_size` of {count} or less"
        )
    return blocks


def pack(documents: AnyDataset, tokenizer: PreTrainedTokenizerBase, **options: Any) -> AnyDataset:
    """The name of `make_blocks` in release 0.1.0."""
    warnings.warn(
        "`pack` is now called `make_blocks`; use that name", DeprecationWarning, stacklevel=2
    )
    return make_blocks(documents, tokenizer, **options)


def load_blocks(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
) -> AnyDataset:
    """Training data: `load_documents`, then `make_blocks`.

    With ``streaming`` the result is an ``IterableDataset`` that reads while training, which then
    needs ``max_steps``.
    """
    documents = load_documents(source, split=split, text_column=text_column, streaming=streaming)
    return make_blocks(documents, tokenizer, block_size=block_size, text_column=text_column)


def load_tokens(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    text_column: str = "text",
) -> Tensor:
    """Evaluation data: all documents joined end to end, one row of token ids, (T,), int64."""
    documents = load_documents(source, split=split, text_column=text_column)
    return concatenate(tokenize(documents, tokenizer, text_column=text_column))


def text_bytes(documents: AnyDataset, *, text_column: str = "text") -> int:
    """UTF-8 bytes of all documents that `tokenize` does not leave out."""
    texts = (row[text_column] for row in documents)
    return sum(len(text.encode()) for text in texts if text and not text.isspace())


def concatenate(tokens: Dataset) -> Tensor:
    """All rows of `tokenize` joined into one, (T,), int64."""
    rows: Iterable[Tensor] = (
        torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in tokens.with_format("numpy")
    )
    joined = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
    if len(joined) == 0:
        raise ValueError(NO_TEXT)
    return joined


def _tokenize(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, text_column: str
) -> dict[str, list[Any]]:
    texts = [text for text in batch[text_column] if text and not text.isspace()]
    # `verbose=False`: a document may be longer than the model's context; it is cut into blocks.
    ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    eos = tokenizer.eos_token_id
    return {"input_ids": [row if eos is None or row[-1:] == [eos] else [*row, eos] for row in ids]}


def _cut_into_blocks(
    batch: dict[str, list[list[int]]], block_size: int
) -> dict[str, list[list[int]]]:
    stream = list(chain.from_iterable(batch["input_ids"]))
    blocks = [
        stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)
    ]
    return {"input_ids": blocks, "labels": blocks}


def _from_files(names: list[str], streaming: bool) -> AnyDataset:
    for name in names:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"no such file: {name!r}; several names must all be files (give a directory or a "
                "hub data set alone)"
            )
    readers = {READERS.get(Path(name).suffix.lower(), "text") for name in names}
    if len(readers) > 1:
        raise ValueError(
            "files of one data set must have one format, but these are "
            f"{' and '.join(sorted(readers))}: {', '.join(names)}; convert them, or train on one "
            "kind"
        )
    reader = readers.pop()
    options = {"sample_by": "document"} if reader == "text" else {}
    try:
        return load_dataset(reader, data_files=names, split="train", streaming=streaming, **options)
    except DatasetsError as error:
        raise ValueError(
            f"cannot read {', '.join(names)} as {reader}: {error.__cause__ or error}"
        ) from error


def _from_directory(name: str, streaming: bool) -> Any:
    try:
        if any((Path(name) / file).exists() for file in SAVED_DATASET_FILES):
            saved = load_from_disk(name)
            if not streaming:
                return saved
            return (
                IterableDatasetDict(
                    {key: part.to_iterable_dataset() for key, part in saved.items()}
                )
                if isinstance(saved, DatasetDict)
                else saved.to_iterable_dataset()
            )
        return load_dataset(name, streaming=streaming)
    except DatasetsError as error:
        raise ValueError(f"cannot read a data set from the directory {name!r}: {error}") from error


def _from_hub(name: str, streaming: bool) -> Any:
    if not HUB_NAME.fullmatch(name) or Path(name).suffix.lower() in {*READERS, ".txt"}:
        raise FileNotFoundError(
            f"no such file or directory: {name!r}; give a text, jsonl, csv or parquet file, a data "
            "set directory, or the `name` or `name:config` of a hub data set"
        )
    path, _, config = name.partition(":")
    try:
        return load_dataset(path, config or None, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is not a file or directory here, and could not be loaded as a hub data set: "
            f"{error}"
        ) from error


def _choose_split(dataset: Any, split: str, name: str) -> AnyDataset:
    if not isinstance(dataset, DatasetDict | IterableDatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(
            f"the data set {name!r} has no split {split!r}; it has {', '.join(map(repr, dataset))}"
        )
    return dataset[split]


def only_text(documents: AnyDataset, text_column: str, name: str) -> AnyDataset:
    """The text column alone; ValueError, with the data set's ``name``, if there is none."""
    # A stream may know its columns only after its first row.
    columns = documents.column_names or list(next(iter(documents), {}))
    if not columns:
        raise ValueError(f"the data set {name} is empty: it has no rows; give one with text in it")
    if text_column not in columns:
        raise ValueError(
            f"the data set {name} has no text column {text_column!r}; it has "
            f"{', '.join(map(repr, columns))} (`text_column` chooses one)"
        )
    first = next(iter(documents), {text_column: ""})[text_column]
    if not isinstance(first, str | None):
        raise ValueError(
            f"the column {text_column!r} of {name} must hold text, but its first row is "
            f"{type(first).__name__}; choose another of {', '.join(map(repr, columns))} as "
            "`text_column`"
        )
    return documents.select_columns([text_column])
