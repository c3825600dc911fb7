"""The check of an export compares the whole model, as users load it, and finds what is wrong."""

import json
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_lrqat import LRQATConfig, LRQATLinear
from peft_lrqat.export import export_model, verify_export


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64}
TOKENS = {"vocab_size": 64, "decoder_start_token_id": 0}
HEADS = {"vocab_size": 64, "num_attention_heads": 2}
BERT = transformers.BertConfig(**SIZES)
DISTIL = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
MODELS: dict[str, tuple[Any, ...]] = {
    "distilbert-sequence": (  # its `pre_classifier` is trained in full, too
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(**DISTIL),
        "SEQ_CLS",
        None,
    ),
    "bert-sequence": (transformers.BertForSequenceClassification, BERT, "SEQ_CLS", None),
    "bert-token": (transformers.BertForTokenClassification, BERT, "TOKEN_CLS", None),
    "bert-questions": (transformers.BertForQuestionAnswering, BERT, "QUESTION_ANS", None),
    "bert-masked": (transformers.BertForMaskedLM, BERT, None, ["cls"]),
    "llama-sequence": (
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(**LLAMA),
        "SEQ_CLS",
        None,
    ),
    "llama-head": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**LLAMA),
        "CAUSAL_LM",
        ["lm_head"],
    ),
    "llama-tied": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
        "CAUSAL_LM",
        ["lm_head", "norm"],
    ),
}


def make(name):
    kind, config, task, saved = MODELS[name]
    torch.manual_seed(0)
    fields = {"target_modules": "all-linear", "bits": 4, "init_weights": False}
    model = get_peft_model(
        kind(config), LRQATConfig(task_type=task, modules_to_save=saved, **fields)
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "packed", "dequantized"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_heads_ship_in_every_format(name, format, tmp_path):
    model = make(name)
    export_model(model, tmp_path / "out", format=format, progress=False)
    found = verify_export(model, tmp_path / "out", format=format)
    assert found.keys == ()
    assert found.exact
    entry = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config")
    assert "modules_to_save" not in json.dumps(entry)
    if format == "gptq":
        return
    # As a user does, by the class of the task.
    kind = MODELS[name][0]
    ids = torch.arange(3, 9)[None]
    loaded = kind.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected, logits = model(ids), loaded(ids)
    if format != "packed":
        assert torch.equal(logits[0], expected[0])


# Their code reads or initialises the weights of layers that are still packed.
READERS = {
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, **TOKENS),
        "SEQ_2_SEQ_LM",
        None,
    ),
    "falcon": (
        transformers.FalconForCausalLM,
        transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, **HEADS),
        "CAUSAL_LM",
        None,
    ),
    "mamba": (
        transformers.MambaForCausalLM,
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, vocab_size=64),
        "CAUSAL_LM",
        None,
    ),
}


@pytest.mark.parametrize("format", ["compressed-tensors", "packed"])
@pytest.mark.parametrize("name", READERS)
def test_models_that_touch_weights_while_they_load(name, format, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, name, READERS[name])
    model = make(name)
    export_model(model, tmp_path / "out", format=format, progress=False)
    assert verify_export(model, tmp_path / "out", format=format).exact


def test_a_vision_model_with_a_trained_head(tmp_path):
    """Its config does not say whether embeddings are tied."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(intermediate_size=64, patch_size=8, num_labels=3, **VIT)  # type: ignore[call-arg]  # a setting of all configs
    fields = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    base = transformers.ViTForImageClassification(config)
    model = get_peft_model(base, LRQATConfig(bits=4, init_weights=False, **fields)).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight += 1
    export_model(model, tmp_path / "out", format="packed", progress=False)
    assert verify_export(model, tmp_path / "out", format="packed").exact


def edit(path, change):
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def without(name):
    return lambda state: state.pop(name)


def moved(name):
    def change(state):
        state[name] = state[name] + 1

    return change


def other_config(**fields):
    def change(path):
        written = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**written, **fields}))

    return change


@pytest.mark.parametrize("format", ["compressed-tensors", "dequantized"])
@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        (without("lm_head.weight"), "keys", "lm_head.weight (missing)"),
        (without("model.norm.weight"), "keys", "model.norm.weight (missing)"),
        (
            lambda state: state.update(extra=torch.ones(1)),
            "keys",
            "extra (unexpected)",
        ),
        (moved("lm_head.weight"), "different_tensors", "lm_head.weight"),
        (moved("model.embed_tokens.weight"), "different_tensors", "model.embed_tokens.weight"),
    ],
    ids=["head missing", "norm missing", "unexpected", "head", "embeddings"],
)
def test_what_is_wrong_is_named(format, change, field, expected, tmp_path):
    model = make("llama-head")
    export_model(model, tmp_path / "out", format=format, progress=False)
    edit(tmp_path / "out", change)
    found = verify_export(model, tmp_path / "out", format=format)
    assert not found.exact
    assert expected in getattr(found, field)


@pytest.mark.parametrize("format", ["compressed-tensors", "packed", "dequantized", "gptq"])
def test_another_activation_function_is_found_by_the_logits(format, tmp_path):
    model = make("llama-head")
    export_model(model, tmp_path / "out", format=format, progress=False)
    other_config(hidden_act="relu")(tmp_path / "out")
    found = verify_export(model, tmp_path / "out", format=format)
    assert found.different_layers == found.different_tensors == found.keys == ()
    assert not found.logits_agree
    assert not found.exact


def test_the_model_stays_as_it_was(tmp_path):
    model = make("llama-head").train()
    model.add_adapter("second", model.peft_config["default"])
    export_model(model, tmp_path / "out", format="packed", adapter_name="second", progress=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = verify_export(model, tmp_path / "out", format="packed", adapter_name="second")
    assert found.exact
    assert model.training
    assert model.active_adapters == ["default"]
    assert trained == {n for n, parameter in model.named_parameters() if parameter.requires_grad}


def test_zero_points_that_fill_no_words_are_refused_before_a_layer(tmp_path):
    config = transformers.LlamaConfig(**{**LLAMA, "intermediate_size": 84})
    base = transformers.LlamaForCausalLM(config)
    model = get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj`: gptq packs .* the 84 zero"):
        export_model(model, tmp_path / "out", format="gptq", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_generation_config_is_refused_before_a_layer(monkeypatch, tmp_path):
    from peft_lrqat.export import exporter

    model = make("llama-head")
    model.get_base_model().generation_config.temperature = -1.0
    monkeypatch.setattr(exporter, "quantized_linear", lambda *_: pytest.fail("a layer was made"))
    with pytest.raises(ValueError, match="refuses to save the `generation_config`"):
        export_model(model, tmp_path / "out", format="packed", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_was_merged_is_merged_afterwards(tmp_path):
    config = LRQATConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), config)
    model.add_adapter("other", config)
    model.merge_adapter(["default"])
    with torch.no_grad():
        before = model.eval()(input_ids=torch.arange(6).unsqueeze(0)).logits
    export_model(model, tmp_path, format="packed", adapter_name="other", progress=False)
    assert verify_export(model, tmp_path, format="packed", adapter_name="other").exact
    layers = [m for m in model.modules() if isinstance(m, LRQATLinear)]
    assert [layer.merged_adapters for layer in layers] == [["default"]] * len(layers)
    assert model.active_adapters == ["default"]
    with torch.no_grad():
        after = model(input_ids=torch.arange(6).unsqueeze(0)).logits
    assert torch.equal(after, before)
