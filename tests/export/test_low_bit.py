"""Exports of low-bit bases: alone, under an adapter of some layers, with low-bit embeddings."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat import LowBitConfig, LRQATConfig, load_low_bit
from peft_lrqat.base.embedding import DowncastEmbedding
from peft_lrqat.cli.export import run_export
from peft_lrqat.demo import model_path
from peft_lrqat.export import export_model, verify_export


SETTINGS = {"bits": 4, "group_size": 32, "range_estimator": "minmax"}
FORMATS = ["compressed-tensors", "gguf", "gptq", "gemma", "packed", "dequantized"]


@pytest.fixture(scope="module")
def make_low_bit():
    """``make_low_bit(targets, **fields)``: a base; with ``targets``, an adapter on these."""

    def make(targets=None, train_embeddings=False, **fields):
        torch.manual_seed(0)
        settings = LowBitConfig(**{**SETTINGS, **fields})
        model = AutoModelForCausalLM.from_pretrained(model_path(), quantization_config=settings)
        if targets is not None:
            config = LRQATConfig(
                task_type="CAUSAL_LM",
                r=4,
                target_modules=targets,
                init_weights=False,
                train_embeddings=train_embeddings,
            )
            model = get_peft_model(model, config)
        return model.eval()

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]], ids=["base", "partial"])
@pytest.mark.parametrize("format", FORMATS)
def test_layers_without_adapters_ship_their_integers(
    format, targets, make_low_bit, tokenizer, tmp_path
):
    model = make_low_bit(targets, group_size=-1 if format == "gemma" else 32)
    export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    found = verify_export(model, tmp_path / "out", format=format)
    assert found.exact, found
    assert found.layers == 7 * model.config.num_hidden_layers
    assert ("trained with" in (tmp_path / "out" / "README.md").read_text()) == bool(targets)


def test_the_integers_are_those_of_the_base(make_low_bit, tmp_path):
    model = make_low_bit(["q_proj"])
    export_model(model, tmp_path / "out", format="packed", progress=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    base = model.get_base_model()
    assert torch.equal(again.get_submodule(name).phi, base.get_submodule(name).phi)


def test_unrounded_weights_are_refused(make_low_bit, tmp_path):
    model = make_low_bit(["q_proj"], downcast="fixed8")
    with pytest.raises(ValueError, match=r"has no factors for .*downcast='fixed8'"):
        export_model(model, tmp_path / "out", format="packed")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there(make_low_bit, tmp_path):
    with pytest.raises(ValueError, match="`adapter_name` is 'other', but the model has"):
        export_model(make_low_bit(["q_proj"]), tmp_path / "out", adapter_name="other")
    with pytest.raises(ValueError, match="the model has no adapter"):
        export_model(make_low_bit(), tmp_path / "out", adapter_name="other")


def test_rounded_inputs_of_some_layers_are_refused(make_low_bit, tmp_path):
    model = make_low_bit()
    config = LRQATConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], activation_bits=8)
    model = get_peft_model(model, config)
    with pytest.raises(ValueError, match="its input is not rounded, but that of other layers is"):
        export_model(model, tmp_path / "out", format="compressed-tensors")
    export_model(model, tmp_path / "out", activations="ignore", progress=False)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("format", FORMATS)
def test_low_bit_embeddings(format, trained, bits, make_low_bit, tokenizer, tmp_path):
    size = -1 if format == "gemma" else 32
    model = make_low_bit("all-linear", trained, embedding_bits=bits, group_size=size)
    out, plain = tmp_path / "out", format in ("compressed-tensors", "gptq", "gemma")
    words = {"format": format, "tokenizer": tokenizer, "progress": False}
    if plain:
        with pytest.raises(ValueError, match=r"holds no low-bit embeddings.*embeddings='plain'"):
            export_model(model, out, **words)
        assert not out.exists()
    export_model(model, out, **words, embeddings="plain" if plain else "low-bit")
    found = verify_export(model, out, format=format)
    assert found.exact, found
    card = (out / "README.md").read_text()
    assert ("embed" in card) != plain
    if format == "packed":
        with safe_open(out / "model.safetensors", framework="pt") as stored:
            names = set(stored.keys())
        assert "model.embed_tokens.codes" in names
        again = load_low_bit(str(out))
        assert isinstance(again.get_input_embeddings(), DowncastEmbedding)
        assert again.get_input_embeddings().format.grid.bits == bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("format", ["packed", "gguf"])
def test_ends_that_an_adapter_on_a_plain_model_does_not_train(format, bits, tokenizer, tmp_path):
    """They hold integers, as they are deployed, whatever the downcast of the targets."""
    torch.manual_seed(0)
    config = LRQATConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules="all-linear",
        init_weights=False,
        embedding_bits=bits,
        group_size=32,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path()), config).eval()
    assert model.get_input_embeddings().format.downcast == "int"
    words = {"format": format, "tokenizer": tokenizer, "progress": False}
    export_model(model, tmp_path / "out", **words)
    found = verify_export(model, tmp_path / "out", format=format)
    assert found.exact, found


@pytest.mark.parametrize("bits", [4, 8])
def test_llama_cpp_files_have_small_embeddings(bits, make_low_bit, tokenizer, tmp_path):
    import gguf

    model = make_low_bit("all-linear", embedding_bits=bits)
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    types = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
    }
    assert types["token_embd.weight"] == {4: "Q4_0", 8: "Q8_0"}[bits]


def test_the_command_exports_a_base(make_low_bit, tokenizer, tmp_path, capsys):
    make_low_bit().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ["--model", str(tmp_path / "base"), "--output", str(tmp_path / "out")]
    assert run_export([*words, "--format", "packed", "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(SystemExit):
        run_export(["--model", str(model_path()), "--output", str(tmp_path / "other")])
    assert "is no low-bit base" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_export(["--output", str(tmp_path / "other")])
    assert "give --adapter, or --model with a low-bit base" in capsys.readouterr().err
