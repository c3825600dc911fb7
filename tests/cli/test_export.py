"""`lrqat export`, `eval` and `recipe` follow the task, the adapter's folder and the model."""

import json
import shlex

import pytest
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from lrqat_command import main
from peft_lrqat import LRQATConfig
from peft_lrqat.demo import model_path


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the demo model with a chat template and a generation config of its own."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(model_path())
    fields = {"target_modules": ["q_proj"], "group_size": 32, "init_weights": False}
    get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", **fields)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 7], do_sample=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf"])
def test_what_lies_beside_the_adapter_is_exported(format, adapter, capsys, tmp_path):
    out = tmp_path / "out"
    words = ["export", "--adapter", str(adapter), "--output", str(out), "--format", format]
    assert main([*words, "--verify", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    kinds = ("tokenizer", "chat template", "generation config")
    assert found["sources"] == dict.fromkeys(kinds, str(adapter))
    assert f"tokenizer from {adapter}\n" in printed.err
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]


def test_a_classifier_is_exported_and_not_evaluated(capsys, tmp_path):
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    fields = {"target_modules": "all-linear", "init_weights": False}
    model = get_peft_model(base, LRQATConfig(task_type="SEQ_CLS", **fields))
    model.save_pretrained(tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter")]
    assert main(["export", *words, "--output", str(tmp_path / "out"), "--verify"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(SystemExit):
        main(["eval", *words, "--dataset", str(tmp_path / "text.txt")])
    assert "but the `task_type` of this adapter is SEQ_CLS" in capsys.readouterr().err


def test_a_recipe_for_a_model(capsys):
    words = ["recipe", "--for", "llama.cpp", "--bits", "3", "--model", str(model_path())]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored_bits_per_weight"] == 4.5
    assert found["file_bytes"] > 100_000
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "# stored at 4.50 bits per weight, scales included; the file takes about" in out
    assert "# gguf stores these weights at 4.50 bits each, but 3.50 bits" in out


def test_a_recipe_for_llama_cpp_at_two_bits(tmp_path, monkeypatch, capsys):
    gguf = pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "MODEL")
    tokenizer.save_pretrained(tmp_path / "MODEL")
    (tmp_path / "text.txt").write_text("Once upon a time there was a number. " * 60)
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "--for", "llama.cpp", "--bits", "2", "--model", "MODEL"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["prepare", "train", "export"]
    assert "# stored at 2.62 bits per weight, scales included; the file takes" in lines[3]
    for line in lines[:3]:
        _, *command = [{"TEXT": "text.txt"}.get(word, word) for word in shlex.split(line)]
        if command[0] == "prepare":
            command += ["--block_size", "16", "--calibration_tokens", "64"]
        if command[0] == "train":
            command += ["--block_size", "16", "--max_steps", "2", "--disable_tqdm", "true"]
        assert main(command) == 0, line
    assert "every weight is what was trained" in capsys.readouterr().out
    made = LRQATConfig.from_pretrained("ADAPTER")
    assert (made.k_quant, made.symmetric, made.group_size) == (True, False, 16)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader("DIRECTORY/model.gguf").tensors}
    assert "Q2_K" in types
    assert main(["info", "DIRECTORY/model.gguf"]) == 0


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a number, and it was rounded. " * 40)
    return file


def test_a_recipe_with_bits_by_layer_trains(text, capsys, tmp_path):
    model = str(model_path())
    words = ["recipe", "--average_bits", "2.5", "--model", model, "--dataset", str(text)]
    words += ["--block_size", "32", "--tokens", "128"]
    assert main([*words, "--group_size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 2.4 < found["average_bits"] <= 2.5
    assert found["bits_pattern"]
    assert main([*words, "--group_size", "32"]) == 0
    command, comment = capsys.readouterr().out.splitlines()
    assert comment.startswith("# 2.")
    assert "bits per weight on average, without scales; layers: " in comment
    trained = shlex.split(command)[1:]
    trained[trained.index("ADAPTER")] = str(tmp_path / "out")
    assert main([*trained, "--max_steps", "1", "--block_size", "32"]) == 0
    config = LRQATConfig.from_pretrained(tmp_path / "out")
    assert config.bits_pattern == found["bits_pattern"]
    assert (config.bits, config.group_size) == (found["bits"], 32)


def test_bits_by_layer_for_a_runtime(text, capsys):
    words = ["recipe", "--for", "vllm", "--average_bits", "5", "--model", str(model_path())]
    words += ["--dataset", str(text), "--block_size", "32", "--tokens", "64", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert {found["bits"], *found["bits_pattern"].values()} <= set(range(2, 9))
    assert found["group_size"] in (-1, 32, 64, 128)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--average_bits", "3"], "--average_bits needs --model, and --dataset"),
        (["--average_bits", "3", "--bits", "3"], "give --bits or --average_bits, not both"),
        (["--for", "vllm", "--tokens", "3"], "--tokens changes nothing without --average_bits"),
    ],
)
def test_what_bits_by_layer_need(words, message, capsys):
    with pytest.raises(SystemExit):
        main(["recipe", *words])
    assert message in capsys.readouterr().err
