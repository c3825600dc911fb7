"""Chats become blocks: answers are scored, whole and nothing else; no example sees another."""

import copy
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_lrqat.trainer import chats
from peft_lrqat.trainer.chats import (
    check_packing,
    is_chat,
    make_chat_blocks,
    marked,
    render_chat,
    tokenize_chat,
)
from peft_lrqat.trainer.data import load_rows


PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Thoughts are kept in the last answer alone.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.thoughts }}</think>{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWRITING = (
    "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "hello?"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture
def tokenizer():
    """One token per byte, a chat template, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.chat_template = PLAIN
    return made


def scored(row, tokenizer, **options):
    """The scored text; None parts it from what follows."""
    ids, labels = tokenize_chat(row, tokenizer, **options)
    parts, inside = [], False
    for token, label in zip(ids, labels, strict=True):
        if label != -100:
            assert label == token
            parts = [*parts, ""] if not inside else parts
            parts[-1] += tokenizer.decode([token])
        inside = label != -100
    return parts


def test_answers_are_scored_with_their_end_and_nothing_else(tokenizer):
    assert scored({"messages": CHAT}, tokenizer) == ["hello<end>", "yes<end>"]
    assert marked({"messages": CHAT}, tokenizer) == (
        "<system>be kind<end><user>hi<end><assistant>⟦hello<end>⟧<user>hello?<end>"
        "<assistant>⟦yes<end>⟧"
    )


def test_a_completion_is_scored_even_after_answers_of_the_prompt(tokenizer):
    row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    assert scored(row, tokenizer) == ["yes<end>"]


def test_plain_completions_end_with_the_end_of_the_text(tokenizer):
    row = {"prompt": "2 + 2 = ", "completion": "4"}
    assert scored(row, tokenizer) == ["4<eos>"]
    text, spans, templated = render_chat(row, tokenizer)
    assert (text, spans, templated) == ("2 + 2 = 4", [(8, 9)], False)


def test_every_token(tokenizer):
    ids, labels = tokenize_chat({"messages": CHAT}, tokenizer, loss="all")
    assert ids == labels


def test_fields_that_a_table_fills_with_none_are_left_out(tokenizer):
    rows = Dataset.from_list([{"messages": [*CHAT[1:2], {**CHAT[2], "thoughts": None}]}])
    assert rows[0]["messages"][0]["thoughts"] is None
    assert scored(rows[0], tokenizer) == ["hello<end>"]


def test_templates_that_drop_the_thoughts_of_earlier_answers(tokenizer):
    tokenizer.chat_template = THINKING
    chat = [{**m, "thoughts": "hm"} if m["role"] == "assistant" else m for m in CHAT]
    assert scored({"messages": chat}, tokenizer) == ["hello<end>", "<think>hm</think>yes<end>"]


def test_a_template_that_rewrites_earlier_messages_is_refused(tokenizer):
    tokenizer.chat_template = REWRITING
    with pytest.raises(ValueError, match=r"row 0 .* message 2, an answer, is not found"):
        make_chat_blocks(Dataset.from_list([{"messages": CHAT}]), tokenizer, block_size=64)


def test_every_token_can_be_scored_under_any_template(tokenizer):
    tokenizer.chat_template = REWRITING
    row = {"messages": CHAT}
    ids, labels = tokenize_chat(row, tokenizer, loss="all")
    assert ids == labels
    text = tokenizer.decode(ids)
    assert text.startswith("5<system>")
    assert marked(row, tokenizer, loss="all") == f"⟦{text}⟧"


def test_a_stream_without_positions_is_not_read_to_look_for_them():
    def rows():
        raise AssertionError("the stream was read")
        yield

    check_packing(llama(), IterableDataset.from_generator(rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [{"content": "hi"}]}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "message 0 of a chat has the content None"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 0 of a chat has the content 5"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "both text or"),
    ],
)
def test_rows_that_are_no_chats(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        tokenize_chat(row, tokenizer)


def test_messages_need_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="give one with `--chat_template FILE`"):
        tokenize_chat({"messages": CHAT}, tokenizer)


@pytest.mark.parametrize("template", ["{{% bad", "{{ messages[0].role.missing() }}"])
def test_a_template_that_fails_is_named(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the chat template cannot write this chat: "):
        tokenize_chat({"messages": CHAT}, tokenizer)


@pytest.mark.parametrize(
    "row", [{"messages": CHAT}, {"prompt": CHAT[:-1], "completion": CHAT[-1:]}], ids=list
)
@pytest.mark.parametrize("own", [True, False])
def test_a_template_without_the_beginning_of_texts_is_warned_of(tokenizer, own, row, monkeypatch):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", tokenizer.bos_token_id)]
    )
    if own:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    said = []
    monkeypatch.setattr(chats.logger, "warning", said.append)
    make_chat_blocks(Dataset.from_list([row]), tokenizer, block_size=200)
    assert [("Begin the template with `{{ bos_token }}`" in line) for line in said] == [True] * (
        not own
    )


def test_columns_tell_chats_from_text():
    assert is_chat(Dataset.from_list([{"messages": CHAT}]))
    assert is_chat(Dataset.from_list([{"prompt": "a", "completion": "b"}]))
    assert not is_chat(Dataset.from_list([{"prompt": "a", "text": "b"}]))


# Blocks


def rows_of(*words):
    """Rows of 5 + len(word) tokens: prompt, word, end of text."""
    return Dataset.from_list([{"prompt": "say:", "completion": word} for word in words])


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_is_in_one_block_once(tokenizer, packing):
    words = ["a", "bcd", "ef", "ghijk", "l", "mnopq"]
    blocks = make_chat_blocks(rows_of(*words), tokenizer, block_size=20, packing=packing)
    assert len(blocks) == (3 if packing else 6)
    found = []
    for row in blocks:
        assert {len(column) for column in row.values()} == {20}
        starts = [i for i, p in enumerate(row.get("position_ids", [0])) if p == 0]
        for start, end in zip(starts, [*starts[1:], 20], strict=True):
            ids, labels = row["input_ids"][start:end], row["labels"][start:end]
            assert labels[0] == -100
            if packing:
                assert row["position_ids"][start:end] == list(range(end - start))
            if any(label != -100 for label in labels):
                text = tokenizer.decode([label for label in labels if label != -100])
                assert tokenizer.decode(ids).startswith("say:" + text)
                found.append(text.removesuffix("<eos>"))
    assert sorted(found) == sorted(words)


def test_long_examples_lose_their_end_and_a_warning_says_so(tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr("peft_lrqat.trainer.chats.logger.warning", said.append)
    rows = rows_of("abcdefgh", "ab").add_item({"prompt": "a long question", "completion": "b"})
    blocks = make_chat_blocks(rows, tokenizer, block_size=8)
    assert len(blocks) == 2
    assert "2 of 3 examples are longer than a block of 8 tokens" in said[0]
    assert "1 examples without a scored token" in said[1]
    with pytest.raises(ValueError, match="none of the 1 examples has a token to score within 4"):
        make_chat_blocks(rows_of("ab"), tokenizer, block_size=4)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def test_packed_examples_train_as_if_they_were_alone(tokenizer):
    model = llama()
    model.config.use_cache = False  # as the Trainer sets it
    rows = rows_of("abc", "de", "fghi")
    packed = make_chat_blocks(rows, tokenizer, block_size=32)
    alone = make_chat_blocks(rows, tokenizer, block_size=32, packing=False)
    assert len(packed) == 1
    check_packing(model, packed)
    losses = []
    for blocks in (packed, alone):
        columns = {name: torch.tensor(blocks[:][name]) for name in blocks.column_names}
        model.zero_grad()
        loss = model(**columns).loss
        loss.backward()
        losses.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    for mine, theirs in zip(losses[0][1], losses[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_model_that_ignores_position_ids_is_refused(tokenizer):
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = llama()

        def forward(self, input_ids, position_ids, use_cache):
            mask = torch.ones_like(input_ids)
            return self.inside(input_ids=input_ids, attention_mask=mask)

    blocks = make_chat_blocks(rows_of("abc", "de", "fghi"), tokenizer, block_size=32)
    with pytest.raises(ValueError, match=r"Deaf lets an example .*--packing false"):
        check_packing(Deaf(), blocks)


def test_json_lines_of_messages(tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    rows = load_rows(str(file))
    assert is_chat(rows)
    assert scored(rows[0], tokenizer) == ["hello<end>", "yes<end>"]
