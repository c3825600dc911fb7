"""Tokenizers in GGUF files: transformers and llama.cpp cut text as the original tokenizer does."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from peft_lrqat import LRQATConfig
from peft_lrqat.export import export_model
from peft_lrqat.formats.vocabulary import SPLITS, split_name


pytest.importorskip("gguf")

TEXTS = [
    "The for statement is used",
    "x = {1: 'a'}\n    return x\n",
    "Ünïcode, 日本 🙂",
    "  two spaces  12345.67",
    "it's\t\tdon't\n\n",
    "",
]


@pytest.fixture(scope="module")
def export_with():
    """``export_with(tokenizer, path)``: the file of a small model with the tokenizer's words."""

    def export(tokenizer, path, vocab_size=None):
        config = LlamaConfig(
            vocab_size=vocab_size or len(tokenizer) + 4,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        fields = {
            "target_modules": "all-linear",
            "bits": 4,
            "group_size": 32,
            "init_weights": False,
        }
        model = get_peft_model(
            LlamaForCausalLM(config), LRQATConfig(task_type="CAUSAL_LM", **fields)
        )
        export_model(model, path, format="gguf", tokenizer=tokenizer, progress=False)
        return path / "model.gguf"

    return export


def sentencepiece_model():
    """Byte pairs with byte fallback, as Llama 2's and Mistral's, learned from this package."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = [
        line
        for file in Path(__file__).parent.glob("*.py")
        for line in file.read_text().splitlines()
    ]
    out = io.BytesIO()
    trainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A tokenizer with a normalizer that puts in spaces, as on the Hub."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    parts = json.loads(LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    parts["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
    }
    parts["pre_tokenizer"] = None
    return parts


def fast(parts):
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), **tokens)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "metaspace"])
def test_the_file_cuts_text_alike(
    kind, tokenizer, sentencepiece, export_with, llama_cpp_tokens, tmp_path
):
    if kind == "sentencepiece":
        tokenizer = fast(sentencepiece)
    elif kind == "metaspace":
        cutter = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        tokenizer = fast({**sentencepiece, "normalizer": None, "pre_tokenizer": cutter})
    expected = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    # Metaspace, which transformers reads all of these as, puts no space before an existing one;
    # sentencepiece and llama.cpp do.
    some = {
        text: ids
        for text, ids in expected.items()
        if kind == "byte-level" or not text.startswith(" ")
    }
    file = export_with(tokenizer, tmp_path / "out")
    whole = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {text: whole(text)["input_ids"] for text in some} == some
    if find_spec("xllamacpp") is not None:
        texts = list(some if kind == "metaspace" else expected)
        assert llama_cpp_tokens(file, texts) == [expected[text] for text in texts]
    (tmp_path / "alone").mkdir()
    file.rename(tmp_path / "alone" / file.name)
    back = AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file=file.name)
    assert {text: back(text)["input_ids"] for text in some} == some
    assert (back.bos_token_id, back.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def test_what_llama_cpp_would_read_otherwise(sentencepiece, tokenizer, export_with, tmp_path):
    word_level = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    model = sentencepiece["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    joint = ["".join(merge) for merge in merges]
    # A token that two merges make, of which one goes before all others: no score says so.
    twice = next(i for i in range(len(joint) - 1, 1, -1) if joint[i] == joint[i - 1])
    moved = [merges[twice], *merges[:twice], *merges[twice + 1 :]]
    for other, message in (
        (word_level, "GGUF is written with BPE tokenizers, but this is a "),
        (
            fast({**sentencepiece, "model": {**model, "merges": merges[1:]}}),
            "the merges of this tokenizer follow from no",
        ),
        (
            fast({**sentencepiece, "model": {**model, "merges": moved}}),
            "the merges of this tokenizer follow from no",
        ),
        (
            fast({**sentencepiece, "normalizer": {"type": "Lowercase"}}),
            r"prepares text by \['Lowercase'\] and None",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            export_with(other, tmp_path / "out")
    with pytest.raises(
        ValueError, match="has a token 511, but the model embeds 500 tokens; give the model's own"
    ):
        export_with(tokenizer, tmp_path / "out", vocab_size=500)
    assert list(tmp_path.iterdir()) == []


def test_ways_to_cut_text_by_llama_cpps_names():
    byte_level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert split_name(byte_level) == "gpt-2"
    assert split_name({"type": "Sequence", "pretokenizers": [digits, byte_level]}) == "smollm"
    for pattern, name in SPLITS.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}}
        assert split_name({"type": "Sequence", "pretokenizers": [split, byte_level]}) == name
    assert set(SPLITS.values()) == {"llama-bpe", "qwen2"}
    for other in (None, {"type": "Whitespace"}, {"type": "Split", "pattern": {"Regex": "x"}}):
        with pytest.raises(ValueError, match="has no known name in"):
            split_name(other)


def changed(tokenizer, **fields):
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"].update(fields.pop("model", {}))
    return fast({**parts, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, r"changes text by \['Lowercase'\]"),
        ({"model": {"ignore_merges": True}}, "with ignore_merges=False, but this one has True"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "llama.cpp knows no `end_of_word_suffix`"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "x", "type_id": 0}},
                        {"SpecialToken": {"id": "x", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [],
                    "special_tokens": {"x": {"id": "x", "ids": [5], "tokens": ["x"]}},
                }
            },
            "can put one token before and one after a text",
        ),
    ],
    ids=["normalizer", "ignore_merges", "suffix", "two tokens in front"],
)
def test_byte_level_tokenizers_that_llama_cpp_reads_otherwise(
    fields, message, tokenizer, export_with, tmp_path
):
    with pytest.raises(ValueError, match=message):
        export_with(changed(tokenizer, **fields), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
