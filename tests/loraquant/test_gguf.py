"""Adapters as GGUF files: what llama.cpp adds is what PEFT adds."""

from importlib.util import find_spec

import pytest
import torch
import transformers
from exported import llama_cpp
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrqat_command import main
from peft_lrqat import (
    LoRAQuantConfig,
    LRQATConfig,
    adapter_to_gguf,
    dequantize_adapter,
    export_model,
    quantize_adapter,
)
from peft_lrqat.demo import model_path


gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


@pytest.fixture
def base(tmp_path):
    """``base(name)``: a directory with a random model."""

    def make(name="Llama", **fields):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES, **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


@pytest.fixture
def lora(base, tmp_path):
    """``lora(name, **fields)``: a directory with an adapter of a random model, far from zero."""

    def make(name="Llama", **fields):
        model = AutoModelForCausalLM.from_pretrained(base(name))
        targets = "all-linear"
        config = {"r": 4, "lora_alpha": 24, "target_modules": targets, "init_lora_weights": False}
        get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **{**config, **fields})
        ).save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    return make


def read(file):
    """Fields and tensors of a file."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    # The shapes of GGUF are reversed, those of the data are not.
    return fields, {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}


def logprobs(model, prompt):
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)


def test_the_tensors(lora, tmp_path):
    source = lora("Qwen2", target_modules=["q_proj", "down_proj"])
    file = adapter_to_gguf(source, tmp_path / "out")
    fields, tensors = read(file)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "qwen2"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 24
    stored = transformers.modeling_utils.load_state_dict(source / "adapter_model.safetensors")
    assert len(tensors) == len(stored) == 8
    for kind, short in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        for side in "AB":
            found = tensors[f"blk.1.{short}.weight.lora_{side.lower()}"]
            key = f"base_model.model.model.layers.1.{kind}.lora_{side}.weight"
            assert torch.equal(found.float(), stored[key])


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        ({"average_bits": 2}, ("Q4_0", "F16")),
        ({"average_bits": 6}, ("Q8_0", "F32")),  # more bits than a float16 has
        ({"method": "paper", "bits_high": 3, "ratio": 0.9}, ("Q4_0", "F16")),
        ({"average_bits": 2, "group_size": 24}, ("F16", "F16")),
    ],
    ids=str,
)
def test_the_factors_of_a_packed_adapter(recipe, kinds, lora, tmp_path):
    quantize_adapter(lora("Qwen2"), tmp_path / "small", LoRAQuantConfig(**recipe), progress=False)
    file = adapter_to_gguf(tmp_path / "small", tmp_path / "out")
    dequantize_adapter(tmp_path / "small", tmp_path / "plain", dtype=torch.float32)
    stored = transformers.modeling_utils.load_state_dict(
        tmp_path / "plain" / "adapter_model.safetensors"
    )
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.startswith("blk.0.ffn_up"):
            side = tensor.name[-1].upper()
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            wanted = stored[f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"]
            assert torch.equal(torch.from_numpy(values.copy()).float(), wanted)
            found[side] = tensor.tensor_type.name
    assert (found["A"], found["B"]) == kinds


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs xllamacpp")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("Llama", {"alpha_pattern": {"down_proj": 48}}),
        ("Qwen3", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_llama_cpp_says_what_the_model_says(name, fields, packed, lora, tmp_path):
    source = lora(name, **fields)
    if packed:
        quantize_adapter(source, tmp_path / "small", LoRAQuantConfig(average_bits=3))
        source = tmp_path / "small"
    file = adapter_to_gguf(source, tmp_path / "out")
    # The base model in a file whose 8-bit weights are those of the model here.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", bits=8, group_size=32)
    rounded = get_peft_model(plain, config).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    export_model(rounded, tmp_path / "gguf", format="gguf", tokenizer=tokenizer, progress=False)
    model = PeftModel.from_pretrained(rounded.merge_and_unload(), source).eval()
    # llama.cpp tells nothing of a token that is a part of a character.
    prompts = (list(range(first, 400, 5)) for first in range(5, 10))
    prompt = next(
        p for p in prompts if "\ufffd" not in tokenizer.decode(int(logprobs(model, p).argmax()))
    )
    wanted = logprobs(model, prompt)
    with model.disable_adapter():
        without = logprobs(model, prompt)
    answer = llama_cpp(tmp_path / "gguf" / "model.gguf", "complete", prompt, file)
    first = answer["choices"][0]["logprobs"]["content"][0]
    top = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
    difference = max(abs(float(wanted[index]) - value) for index, value in top.items())
    other = max(abs(float(without[index]) - value) for index, value in top.items())
    # llama.cpp rounds activations to 8 bits.
    assert difference < 0.02
    assert other > 10 * difference


def test_what_llama_cpp_cannot_add(lora, tmp_path):
    for fields, message in (
        ({"use_dora": True}, "llama.cpp has no DoRA"),
        ({"modules_to_save": ["lm_head"]}, "also has .*lm_head"),
        ({"bias": "all", "target_modules": ["q_proj"]}, "bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "also has .*embed_tokens"),
    ):
        name = "Qwen2" if "bias" in fields else "Llama"
        with pytest.raises(ValueError, match=message):
            adapter_to_gguf(lora(name, **fields), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="but the base model is a gemma"):
        adapter_to_gguf(lora("Gemma"), tmp_path / "out")
    with pytest.raises(FileExistsError):
        adapter_to_gguf(lora(), tmp_path / "lora")


def test_a_base_model_that_is_not_the_right_one(lora, tmp_path):
    source = lora()
    with pytest.raises(ValueError, match=r"`.*_proj` of the adapter is \(.*\), but .* has one of"):
        adapter_to_gguf(source, tmp_path / "out", base=model_path())
    with pytest.raises(ValueError, match=r"the base model /nowhere/x cannot be read \(.*--model"):
        adapter_to_gguf(source, tmp_path / "out", base="/nowhere/x")
    assert not (tmp_path / "out").exists()


def test_an_output_layer(lora, tmp_path):
    file = adapter_to_gguf(lora("Qwen2", target_modules=["lm_head"]), tmp_path / "out")
    assert read(file)[1].keys() == {"output.weight.lora_a", "output.weight.lora_b"}


def test_an_lrqat_adapter_is_exported_whole(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base())
    get_peft_model(model, LRQATConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lr")
    with pytest.raises(ValueError, match="act inside the rounding; export the model itself"):
        adapter_to_gguf(tmp_path / "lr", tmp_path / "out")


def test_the_command(lora, tmp_path, capsys):
    source = str(lora())
    words = ["dequantize-adapter", source, str(tmp_path / "out"), "--format", "gguf"]
    assert main(words) == 0
    assert "llama.cpp takes it with --lora" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter.gguf").exists()
    for more, message in (
        (["--dtype", "float16", "--format", "gguf"], "--dtype does not go with --format gguf"),
        (["--model", "base"], "--model changes nothing without --format gguf"),
    ):
        with pytest.raises(SystemExit):
            main(["dequantize-adapter", source, str(tmp_path / "other"), *more])
        assert message in capsys.readouterr().err
