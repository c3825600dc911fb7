"""Documents joined and cut into equal blocks: only the last few tokens are lost, none is added."""

import json

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_lrqat.trainer.data import load_blocks, load_documents, load_tokens, make_blocks, pack


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def character_tokenizer(eos="<eos>"):
    """One token per byte, so that token counts can be read off a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@pytest.fixture
def tokenizer():
    return character_tokenizer()


def rows(dataset):
    return [row["input_ids"] for row in dataset]


def ids_of(text, tokenizer):
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_blocks_are_the_documents_end_to_end(tmp_path, tokenizer, streaming):
    (tmp_path / "a.txt").write_text("first line\n\nsecond é\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("other")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    eos = [tokenizer.eos_token_id]
    stream = ids_of("first line\n\nsecond é\n", tokenizer) + eos + ids_of("other", tokenizer) + eos
    blocks = load_blocks(files, tokenizer, block_size=5, streaming=streaming)
    assert isinstance(blocks, IterableDataset if streaming else Dataset)
    assert rows(blocks) == [stream[i : i + 5] for i in range(0, len(stream) - 4, 5)]
    assert all(row["labels"] == row["input_ids"] for row in blocks)
    assert load_tokens(files, tokenizer).tolist() == stream


def test_without_an_eos_token_documents_follow_directly():
    tokenizer = character_tokenizer(eos=None)
    documents = Dataset.from_dict({"text": ["abc", "def"]})
    assert rows(make_blocks(documents, tokenizer, block_size=6)) == [ids_of("abcdef", tokenizer)]


def test_blank_documents_leave_no_trace(tokenizer):
    documents = Dataset.from_dict({"text": ["", "abc", " \n", None, "de"]})
    assert rows(make_blocks(documents, tokenizer, block_size=7)) == [
        [
            *ids_of("abc", tokenizer),
            tokenizer.eos_token_id,
            *ids_of("de", tokenizer),
            tokenizer.eos_token_id,
        ]
    ]


def test_an_end_that_the_tokenizer_adds_itself_is_not_doubled(tokenizer):
    documents = Dataset.from_dict({"text": ["abc<eos>"]})
    assert rows(make_blocks(documents, tokenizer, block_size=4)) == [
        [*ids_of("abc", tokenizer), tokenizer.eos_token_id]
    ]


def test_one_block_exactly(tokenizer):
    documents = Dataset.from_dict({"text": ["abc"]})
    assert len(make_blocks(documents, tokenizer, block_size=4)) == 1
    with pytest.raises(ValueError, match=r"has 4 tokens and `block_size` is 5; .* of 4 or less"):
        make_blocks(documents, tokenizer, block_size=5)


def test_the_second_time_comes_from_the_cache(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text to be tokenised once")

    def arrow_files():
        return {(file, file.stat().st_mtime_ns) for file in tmp_path.rglob("*.arrow")}

    first = rows(load_blocks(str(tmp_path / "a.txt"), tokenizer, block_size=4))
    files = arrow_files()
    assert files
    assert rows(load_blocks(str(tmp_path / "a.txt"), tokenizer, block_size=4)) == first
    for path in (tmp_path / "a.txt", [tmp_path / "a.txt"]):
        assert rows(load_blocks(path, tokenizer, block_size=4)) == first
    assert arrow_files() == files


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved", "saved splits", "directory"])
@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_all_sources_give_the_same_documents(tmp_path, kind, streaming):
    texts = ["one\ntwo", 'three, "four"']
    table = Dataset.from_dict({"id": [1, 2], "body": texts})
    source = tmp_path / "source"
    if kind in ("jsonl", "csv", "parquet"):
        source = source.with_suffix(f".{kind}")
        getattr(table, f"to_{kind.removesuffix('l')}")(source)
    elif kind == "saved":
        table.save_to_disk(source)
    elif kind == "saved splits":
        DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(source)
    else:
        source.mkdir()
        table.to_parquet(source / "train-00000-of-00001.parquet")
    documents = load_documents(str(source), text_column="body", streaming=streaming)
    assert list(documents) == [{"body": text} for text in texts]


def test_a_split_is_chosen_by_name(tmp_path, tokenizer):
    parts = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "d")
    for name in parts:
        tokens = load_tokens(str(tmp_path / "d"), tokenizer, split=name)
        assert tokens.tolist() == [*ids_of(name, tokenizer), tokenizer.eos_token_id]
    assert tokens.dtype == torch.int64
    with pytest.raises(ValueError, match="has no split 'validation'; it has 'train', 'test'"):
        load_documents(str(tmp_path / "d"), split="validation")


def test_a_missing_text_column_names_those_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "t", "year": 1999}))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="no text column 'text'; it has 'title', 'year'"):
            load_documents(str(tmp_path / "a.jsonl"), streaming=streaming)
    with pytest.raises(
        ValueError, match=r"column 'year' of .* must hold text, but its first row is int"
    ):
        load_documents(str(tmp_path / "a.jsonl"), text_column="year")


@pytest.mark.parametrize("name", ["nowhere.txt", "no/such/place", "./nowhere", "nowhere.jsonl"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match="no such file or directory: "):
        load_documents(name)


def test_several_names_must_be_files_of_one_format(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(FileNotFoundError, match="must all be files"):
        load_documents([str(tmp_path / "a.txt"), "wikitext"])
    with pytest.raises(ValueError, match="must have one format, but these are json and text"):
        load_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    for nothing in ([], "", [""]):
        with pytest.raises(ValueError, match="at least one file or name"):
            load_documents(nothing)


def test_a_hub_name_offline_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"'some-data:config' is not a file or directory here, and could not be loaded",
    ):
        load_documents("some-data:config")


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_text(tmp_path, tokenizer, text, streaming):
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(ValueError, match=r"has no text|is empty"):
        load_blocks(str(tmp_path / "empty.txt"), tokenizer, block_size=4, streaming=streaming)
    with pytest.raises(ValueError, match=r"has no text|is empty"):
        load_tokens(str(tmp_path / "empty.txt"), tokenizer)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read .*latin.txt as text: .*utf-8"):
        load_documents(str(tmp_path / "latin.txt"))
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"cannot read .*broken.jsonl as json"):
        load_documents(str(tmp_path / "broken.jsonl"))


def test_a_block_needs_something_to_predict(tokenizer):
    with pytest.raises(ValueError, match="`block_size` must be at least 2"):
        make_blocks(Dataset.from_dict({"text": ["abc"]}), tokenizer, block_size=1)


def test_a_list_of_texts_is_a_data_set(tokenizer):
    texts = ["abcdefgh", "ijkl"]
    documents = Dataset.from_dict({"text": texts})
    assert rows(make_blocks(texts, tokenizer, block_size=4)) == rows(
        make_blocks(documents, tokenizer, block_size=4)
    )
    with pytest.raises(ValueError, match="must be a data set or a list of texts"):
        make_blocks("abcdefgh", tokenizer, block_size=4)


def test_the_old_name_warns_and_works(tokenizer):
    documents = Dataset.from_dict({"text": ["abcdefgh"]})
    with pytest.warns(DeprecationWarning, match="`make_blocks`"):
        blocks = pack(documents, tokenizer, block_size=4)
    assert rows(blocks) == rows(make_blocks(documents, tokenizer, block_size=4))
