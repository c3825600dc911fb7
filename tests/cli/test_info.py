"""`lrqat info`: what it says is what the files hold."""

import json
from pathlib import Path

import pytest
import torch
from commands_at_work import refusal, train
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from peft_lrqat import LRQATConfig
from peft_lrqat.cli import main


pytestmark = pytest.mark.usefixtures("own_place")


def info(capsys, *argv):
    capsys.readouterr()
    assert main(["info", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_adapter_and_what_it_becomes(base, capsys):
    train(base, "--learning_rate", "2e-2")
    found = info(capsys, "out", "--layers")
    assert found["type"] == "LRQAT adapter"
    assert found["base"] == str(base)
    assert found["base at hand"] is True
    assert found["settings"]["bits"] == 3
    assert found["training"]["steps"] == 3
    # q, k, v, o and three of the feed-forward part, 32 x 32 each.
    assert found["quantised layers"] == 7
    assert found["quantised weights"] == 7 * 32 * 32
    assert found["bytes of these as trained"] == 7 * (32 * 32 * 3 // 8 + 32 * 2)
    sizes = found["bytes of these by format"]
    for format in ("compressed-tensors", "packed"):
        assert main(["export", "--adapter", "out", "--output", format, "--format", format]) == 0
        # All else is the same, so that the difference is what the layers take.
        assert isinstance(sizes[format], int)
    assert sizes["packed"] < sizes["compressed-tensors"]
    assert found["runtimes"]["transformers"] == "as compressed-tensors"
    assert len(found["layers"]) == 7
    assert any(row["changed_integers"] > 0 for row in found["layers"].values())
    assert all(0 <= row["relative_change"] < 2 for row in found["layers"].values())

    exported = info(capsys, "compressed-tensors")
    assert exported["type"] == "compressed-tensors model"
    assert "vllm" in exported["runtimes"]


def test_sizes_are_those_of_the_files(base, capsys):
    train(base)
    found = info(capsys, "out")
    main(["export", "--adapter", "out", "--output", "gguf", "--format", "gguf"])
    file = info(capsys, "gguf")
    assert file["type"] == "GGUF file"
    assert file["architecture"] == "llama"
    # 7 layers of 1,024 weights in blocks of 32: 18 bytes each.
    assert file["tensors by type"]["Q4_0"] == 7
    assert found["bytes of these by format"]["gguf"] == 7 * 32 * 18


def test_rounded_inputs_count_where_a_format_says_them(base, capsys):
    train(base, "--activation_bits", "8", "--bits", "4")
    main(["export", "--adapter", "out", "--output", "ct"])
    sizes = info(capsys, "out")["bytes of these by format"]
    with safe_open("ct/model.safetensors", framework="pt") as stored:
        kept = [
            stored.get_tensor(key)
            for key in stored.keys()  # noqa: SIM118 (not a dict)
            if key.endswith(("weight_packed", "weight_scale"))
            or (key.endswith("proj.weight") and stored.get_slice(key).get_dtype() == "I8")
        ]
    assert sizes["compressed-tensors"] >= sum(t.nbytes for t in kept) > 0
    assert sizes["compressed-tensors"] == pytest.approx(sum(t.nbytes for t in kept), rel=0.05)


def test_a_low_bit_base(base, capsys):
    command = ["prepare", "--model", str(base), "--output", "low", "--bits", "4"]
    assert main([*command, "--target_modules", "all-linear"]) == 0
    found = info(capsys, "low")
    assert found["type"] == "low-bit base"
    assert found["settings"]["bits"] == 4
    assert found["quantised layers"] == 7
    assert "layers" not in found
    assert "must be an LR-QAT adapter" in refusal(capsys, ["info", "low", "--layers"])


def test_lora_and_packed_adapters(base, capsys):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained("lora")
    assert info(capsys, "lora")["type"] == "LORA adapter"
    assert main(["quantize-adapter", "lora", "tiny", "--average_bits", "4"]) == 0
    found = info(capsys, "tiny")
    assert found["type"] == "LORAQUANT adapter"
    assert found["settings"]["average_bits"] == 4
    assert found["report"]["nominal_bits_per_parameter"] <= 4


def test_for_people(base, capsys):
    train(base)
    capsys.readouterr()
    assert main(["info", "out", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "base at hand" in out
    assert "\n  bits " in out
    assert "model.layers.0.mlp.down_proj" in out


def test_a_plain_model(base, capsys):
    assert info(capsys, base)["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("place", ["nowhere", "text.txt"])
def test_nothing_there(capsys, place):
    assert "neither an adapter nor a model nor a GGUF" in refusal(capsys, ["info", place])


@pytest.mark.parametrize("size", [0, 10, 2000, 20_000])
@pytest.mark.parametrize("command", [["info"], ["eval", "--dataset", "text.txt"]])
def test_a_gguf_file_that_is_not_whole(base, capsys, size, command):
    train(base)
    assert main(["export", "--adapter", "out", "--format", "gguf", "--output", "gguf"]) == 0
    whole = Path("gguf/model.gguf").read_bytes()
    assert len(whole) > 20_000
    Path("gguf/model.gguf").write_bytes(whole[:size])
    name, *options = command
    line = refusal(capsys, [name, "gguf/model.gguf", *options])
    assert "gguf/model.gguf is no GGUF file, or is not whole" in line


def test_layers_that_only_some_formats_hold(base, capsys):
    config = LRQATConfig(
        target_modules="all-linear", embedding_bits=8, downcast="int", train_embeddings=True
    )
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained("ends")
    found = info(capsys, "ends")
    assert "embeddings='plain'" in found["bytes of these by format"]["compressed-tensors"]
    assert "embeddings='plain'" in found["runtimes"]["vllm"]
    assert isinstance(found["bytes of these by format"]["gguf"], int)
    small = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32)
    GPT2LMHeadModel(small).save_pretrained("gpt2")
    config = LRQATConfig(target_modules=["c_attn"])
    get_peft_model(GPT2LMHeadModel.from_pretrained("gpt2"), config).save_pretrained("other")
    found = info(capsys, "other")
    assert all("Conv1D" in reason for reason in found["runtimes"].values())
    assert isinstance(found["bytes of these by format"]["packed"], int)


def test_a_classifier_is_nothing_for_gguf(base, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = LRQATConfig(task_type="SEQ_CLS", target_modules="all-linear", bits=4)
    get_peft_model(model, config).save_pretrained("classifier")
    found = info(capsys, "classifier")
    assert "not SEQ_CLS" in found["bytes of these by format"]["gguf"]
    assert "not SEQ_CLS" in found["runtimes"]["llama.cpp"]
    assert isinstance(found["bytes of these by format"]["packed"], int)


def test_a_folder_of_adapters(base, capsys):
    train(base, output="several/one")
    line = refusal(capsys, ["info", "several"])
    assert line.endswith("GGUF file; adapters lie in its folders one")
    Path("empty").mkdir()
    assert refusal(capsys, ["info", "empty"]).endswith("nor a GGUF file")
