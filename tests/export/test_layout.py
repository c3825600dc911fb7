"""Exports have the names and shapes that a checkpoint of the architecture has."""

import json
import re

import pytest
import torch
import transformers
from mixtures import MIXTURES, experts_of, logits_of, make_mixture
from peft import get_peft_model
from safetensors import safe_open
from transformers.utils import logging

from peft_lrqat import LowBitConfig, LRQATConfig
from peft_lrqat.export import export_model, load_quantized, verify_export
from peft_lrqat.formats.table import FORMATS


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
MODELS = {
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4)
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(  # type: ignore[call-arg]  # a setting of all configs
            **SIZES, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
}


def names(directory):
    found = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.fixture(params=MODELS)
def model_and_checkpoint(request, tmp_path):
    base = MODELS[request.param]()
    base.save_pretrained(tmp_path / "plain")
    fields = {"target_modules": "all-linear", "r": 4, "bits": 4}
    model = get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", init_weights=False, **fields))
    return model.eval(), names(tmp_path / "plain")


def test_names_are_those_of_save_pretrained(model_and_checkpoint, tmp_path):
    model, expected = model_and_checkpoint
    export_model(model, tmp_path / "out", format="dequantized", progress=False)
    assert names(tmp_path / "out") == expected


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "gguf"])
def test_experts_load_as_they_were(format, model_and_checkpoint, tmp_path):
    model, _ = model_and_checkpoint
    model.get_base_model().to(torch.bfloat16)
    export_model(model, tmp_path / "out", format=format, progress=False)
    assert verify_export(model, tmp_path / "out", format=format).exact


def test_experts_and_routers_are_ignored_by_name(model_and_checkpoint, tmp_path):
    model, checkpoint = model_and_checkpoint
    model.get_base_model().to(torch.bfloat16)
    export_model(model, tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    stay = {
        name.removesuffix(".weight")
        for name in checkpoint
        if ".experts." in name or name.endswith((".gate.weight", "lm_head.weight"))
    }
    assert stay <= set(config["ignore"])
    assert not [name for name in config["ignore"] if name.endswith(("q_proj", "embed_tokens"))]


def test_weights_that_a_checkpoint_stores_together_are_refused(monkeypatch, tmp_path):
    """Integers cannot be joined with other weights; the packed format has its own names."""
    from transformers.core_model_loading import Chunk, WeightConverter

    base = MODELS["llama"]()
    parts = [".self_attn.k_proj.weight", ".self_attn.v_proj.weight"]
    base._weight_conversions = [WeightConverter(".kv_proj.weight", parts, [Chunk(0)])]
    fields = {"target_modules": ["k_proj"], "bits": 4}
    model = get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", **fields)).eval()
    with pytest.raises(ValueError, match=r"store `.*k_proj\.weight` as .*kv_proj(.|\n)*together"):
        export_model(model, tmp_path / "out", format="dequantized", progress=False)
    assert not (tmp_path / "out").exists()
    export_model(model, tmp_path / "out", format="packed", progress=False)
    assert verify_export(model, tmp_path / "out", format="packed").exact


def trained_experts(name, **fields):
    settings = {"target_modules": "all-linear", "target_parameters": "all-experts", "r": 4}
    settings |= {"bits": 4, "group_size": 16, "init_weights": False, **fields}
    mixture = make_mixture(name, torch.bfloat16)
    return get_peft_model(mixture, LRQATConfig(task_type="CAUSAL_LM", **settings)).eval()


@pytest.mark.parametrize("format", ["packed", "dequantized", "compressed-tensors"])
@pytest.mark.parametrize("name", MIXTURES)
def test_low_bit_experts_load_bit_for_bit(format, name, tmp_path):
    model = trained_experts(name)
    if (name, format) == ("gpt_oss", "compressed-tensors"):
        with pytest.raises(ValueError, match="not as one linear layer for each expert; export it"):
            export_model(model, tmp_path / "out", format=format, progress=False)
        return
    export_model(model, tmp_path / "out", format=format, progress=False)
    assert verify_export(model, tmp_path / "out", format=format).exact
    make_mixture(name, torch.bfloat16).save_pretrained(tmp_path / "plain")
    expected = names(tmp_path / "plain")
    if format == "dequantized":
        assert names(tmp_path / "out") == expected
    if format == "compressed-tensors":
        experts = {n.removesuffix(".weight") for n in expected if re.search(r"experts\.\d", n)}
        packed = {n.removesuffix(".weight_packed") for n in names(tmp_path / "out")}
        assert experts
        assert experts <= packed
        config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert not [n for n in config["ignore"] if re.search(r"experts\.\d", n)]
        assert [n for n in config["ignore"] if n.endswith((".gate", ".router"))]


def test_a_packed_export_of_experts_is_a_low_bit_base(tmp_path):
    model = trained_experts("qwen3_moe", symmetric=False, bits=3)
    export_model(model, tmp_path / "out", format="packed", progress=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = load_quantized(tmp_path / "out")
    assert torch.equal(logits_of(base), logits_of(model))
    assert type(experts_of(plain)[0]).__name__ == "Qwen3MoeExperts"
    assert not [n for n, p in base.named_parameters() if p.dim() == 3]


def test_experts_alone(tmp_path):
    """Without any linear layer among the targets."""
    model = trained_experts("olmoe", target_modules=[])
    for format in ("packed", "dequantized", "compressed-tensors"):
        export_model(model, tmp_path / format, format=format, progress=False)
        assert verify_export(model, tmp_path / format, format=format).exact


@pytest.mark.parametrize("format", ["gptq", "gemma"])
def test_formats_without_experts_refuse_them_by_name(format, tmp_path):
    model = trained_experts("mixtral", group_size=-1)
    with pytest.raises(ValueError, match=f"experts.*: {format} holds no weights of experts"):
        export_model(model, tmp_path / "out", format=format, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_experts_of_a_low_bit_base(name, adapter, tmp_path):
    make_mixture(name, torch.bfloat16).save_pretrained(tmp_path / "plain")
    config = LowBitConfig(bits=4, group_size=16, target_parameters="all-experts")
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(tmp_path / "plain", quantization_config=config).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base").eval()
    if adapter:
        settings = {"target_modules": "all-linear", "r": 4, "init_weights": False}
        model = get_peft_model(model, LRQATConfig(task_type="CAUSAL_LM", **settings)).eval()
    for format in ("compressed-tensors", "packed", "dequantized"):
        export_model(model, tmp_path / format, format=format, progress=False)
        assert verify_export(model, tmp_path / format, format=format).exact


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"bits_pattern": {r".*self_attn.*": 8}}, "they have several widths or group sizes"),
        ({"bits_pattern": {"experts.down_proj": 8}}, "they have several widths or group sizes"),
        ({"target_parameters": ["experts.gate_up_proj"]}, r"experts\.0\.down_proj` stays plain"),
        ({"exclude_modules": r".*layers\.0\.mlp.*"}, r"layers\.0\.mlp\.experts.*` stays plain"),
    ],
    ids=str,
)
def test_experts_that_transformers_would_misread_are_refused(fields, what, tmp_path):
    """transformers 5.23 loads them, and computes with other weights or random ones."""
    model = trained_experts("qwen3_moe", **fields)
    with pytest.raises(ValueError, match=rf"only where all of them.*{what}"):
        export_model(model, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    export_model(model, tmp_path / "packed", format="packed", progress=False)
    assert verify_export(model, tmp_path / "packed", format="packed").exact


def test_plain_experts_beside_low_bit_layers_are_warned_of(caplog, tmp_path):
    logging.enable_propagation()
    export_model(trained_experts("qwen3_moe", target_parameters=None), tmp_path, progress=False)
    assert "stay plain: vLLM loads them beside low-bit" in caplog.text
