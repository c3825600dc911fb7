"""The check of an export finds chats that llama.cpp would cut differently from training."""

import json

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from peft_lrqat.demo import model_path
from peft_lrqat.export import export_model, verify_export


pytest.importorskip("gguf")

TURN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def beginning(tokenizer, begins):
    """The tokenizer, with or without a token that begins every text."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A" if begins else "$A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("begins", "template", "found"),
    [
        (False, TURN, ()),
        (True, "{{ bos_token }}" + TURN, ()),
        (True, TURN, ("the tokenizer begins every text with a token that the chat template",)),
        (False, "{{ bos_token }}" + TURN, ()),
        (False, None, ()),
    ],
    ids=["none", "both", "BOS missing", "template alone", "no template"],
)
def test_the_token_that_begins_a_text(begins, template, found, make_model, tmp_path):
    tokenizer = beginning(AutoTokenizer.from_pretrained(model_path()), begins)
    tokenizer.chat_template = template
    model = make_model(bits=4, group_size=32)
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    result = verify_export(model, tmp_path / "out", format="gguf")
    assert len(result.problems) == len(found)
    for problem, words in zip(result.problems, found, strict=True):
        assert words in problem
    assert result.exact == (not found)


def test_another_tokenizer_beside_the_file(make_model, tokenizer, tmp_path):
    model = make_model(bits=4, group_size=32)
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    path = tmp_path / "out" / "tokenizer.json"
    parts = json.loads(path.read_text())
    parts["model"]["merges"] = parts["model"]["merges"][:100]
    path.write_text(json.dumps(parts))
    (problem,) = verify_export(model, tmp_path / "out", format="gguf").problems
    assert problem.startswith("a text becomes")
