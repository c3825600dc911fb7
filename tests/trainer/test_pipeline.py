"""Loading a base model: for the task of the adapter, whole, with its tokenizer."""

import json

import pytest
import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GenerationConfig,
    LlamaForCausalLM,
)

from peft_lrqat import LRQATConfig
from peft_lrqat.demo import model_path
from peft_lrqat.trainer.pipeline import load_adapter, load_base, load_model
from peft_lrqat.trainer.tokenizers import load_generation_config, load_tokenizer


BERT = BertConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
)
TASKS = {
    "SEQ_CLS": BertForSequenceClassification,
    "TOKEN_CLS": BertForTokenClassification,
    "QUESTION_ANS": BertForQuestionAnswering,
    "FEATURE_EXTRACTION": BertModel,
    None: BertForMaskedLM,
}


@pytest.mark.parametrize("task", TASKS)
def test_the_class_of_the_task_loads_the_base(task, tmp_path):
    base = TASKS[task](BERT)
    base.save_pretrained(tmp_path / "base")
    base = TASKS[task].from_pretrained(tmp_path / "base")
    config = LRQATConfig(task_type=task, target_modules="all-linear", init_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert TASKS[task].__name__ in (tmp_path / "adapter" / "README.md").read_text() or task
    loaded = load_adapter(str(tmp_path / "adapter"), None, "auto")
    assert type(loaded.get_base_model()) is TASKS[task]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        for mine, theirs in zip(model(ids).to_tuple(), loaded(ids).to_tuple(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_base_with_missing_tensors_is_refused(make_base, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.mlp\.up_proj\.weight` of Llama"):
        load_model(str(tmp_path / "base"), "auto")
    with pytest.raises(ValueError, match="they would be random"):
        load_base(str(tmp_path / "base"), "auto")


def test_a_head_that_the_adapter_brings_may_be_missing(tmp_path):
    BertModel(BERT).save_pretrained(tmp_path / "base")
    config = LRQATConfig(task_type="SEQ_CLS", modules_to_save=["classifier"])
    model = load_model(str(tmp_path / "base"), "auto", config)
    assert isinstance(model, BertForSequenceClassification)
    with pytest.raises(ValueError, match=r"`classifier\.bias`, `classifier\.weight` of Bert"):
        load_model(str(tmp_path / "base"), "auto", LRQATConfig(task_type="SEQ_CLS"))


def test_tokens_that_were_added_before_training(make_base, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(100, mean_resizing=False)
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", **fields)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(str(tmp_path / "adapter"), str(tmp_path / "base"), "auto")
    with torch.no_grad():
        ids = torch.tensor([[5, 99]])
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_tokenizer_beside_an_adapter_goes_before_the_bases(tmp_path):
    base, adapter = str(model_path()), tmp_path / "adapter"
    adapter.mkdir()
    tokenizer, places = load_tokenizer(str(adapter), base)
    assert places == {"tokenizer": base}
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer, places = load_tokenizer(str(adapter), base)
    assert tokenizer.chat_template == "{{ messages }}"
    assert places == {"tokenizer": base, "chat template": str(adapter)}
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    found, places = load_tokenizer(str(adapter), base)
    assert "<new>" in found.get_vocab()
    assert set(places.values()) == {str(adapter)}
    # A base with a template, and a tokenizer beside the adapter without one.
    tokenizer.save_pretrained(tmp_path / "base")
    (adapter / "chat_template.jinja").unlink()
    found, places = load_tokenizer(str(adapter), str(tmp_path / "base"))
    assert found.chat_template == "{{ messages }}"
    assert places == {"tokenizer": str(adapter), "chat template": str(tmp_path / "base")}


def test_the_generation_config_beside_an_adapter(tmp_path):
    assert load_generation_config(str(tmp_path)) is None
    GenerationConfig(eos_token_id=[2, 7], do_sample=True).save_pretrained(tmp_path)
    assert load_generation_config(str(tmp_path)).eos_token_id == [2, 7]


def test_a_class_that_transformers_does_not_have(tmp_path):
    config = LRQATConfig(target_modules=["q_proj"])
    config.auto_mapping = {"base_model_class": "MyModel", "parent_library": "mine"}
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"] is not None
    with pytest.raises(ValueError, match="was trained on a MyModel, which is not a class of"):
        load_model("base", "auto", PeftConfig.from_pretrained(str(tmp_path)))


def test_the_tokenizer_is_needed_by_training(make_base, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    with pytest.raises((OSError, ValueError)):
        load_base(str(tmp_path / "base"), "auto")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path / "base")
    assert load_base(str(tmp_path / "base"), "auto")[1] is not None
