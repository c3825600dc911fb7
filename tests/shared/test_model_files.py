"""Digests of stored models: exports that this package reads, and low-bit bases."""

import json
import shutil

import pytest
import torch
from damage import CASES, damaged
from exported import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitConfig, load_low_bit, sign_model
from peft_lrqat.demo import model_path
from peft_lrqat.export import export_model, load_quantized, verify_export


__all__ = ["make_model"]
IDS = torch.arange(24)[None] + 5
READERS = {
    "packed": load_quantized,
    "packed by transformers": lambda path: AutoModelForCausalLM.from_pretrained(path).eval(),
    "base": lambda path: AutoModelForCausalLM.from_pretrained(path).eval(),
    "gptq as a base": lambda path: load_low_bit(str(path)).eval(),
}


@pytest.fixture(scope="module")
def folders(make_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    fields = {"target_modules": ["q_proj", "down_proj"], "group_size": 32, "symmetric": False}
    model = make_model(bits=4, **fields)
    export_model(model, path / "packed", format="packed", progress=False, max_shard_size="90KB")
    half = make_model(bits=4, target_modules=["q_proj"], scale_dtype="float16", group_size=32)
    export_model(half, path / "gptq", format="gptq", progress=False)
    settings = LowBitConfig(bits=4, group_size=32, target_modules=["q_proj"])
    load_low_bit(str(model_path()), settings).save_pretrained(path / "base")
    return path


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(reader):
        return shutil.copytree(folders / reader.split()[0], tmp_path / "model")

    return copy


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def largest(folder):
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def flip(folder):
    """One bit of a tensor in the middle of the largest file."""
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("reader", READERS)
def test_one_bit_of_a_tensor_is_refused(reader, copy_of):
    folder = copy_of(reader)
    READERS[reader](folder)
    flip(folder)
    with pytest.raises(ValueError, match=r"damaged"):
        READERS[reader](folder)


@pytest.mark.parametrize("reader", READERS)
def test_edited_settings_are_refused_until_signed(reader, copy_of):
    folder = copy_of(reader)
    edit(folder, rms_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"settings .* not those that .*sign_model"):
        READERS[reader](folder)
    sign_model(folder)
    assert READERS[reader](folder).config.rms_norm_eps == 0.5


@pytest.mark.parametrize("reader", READERS)
def test_another_release_of_transformers_is_no_damage(reader, copy_of):
    folder = copy_of(reader)
    edit(folder, transformers_version="0.0.0")
    READERS[reader](folder)


@pytest.mark.parametrize("reader", ["packed", "gptq as a base"])
def test_tensors_edited_on_purpose_are_signed(reader, copy_of):
    folder = copy_of(reader)
    flip(folder)
    sign_model(folder)
    READERS[reader](folder)


@pytest.mark.parametrize("reader", ["packed", "packed by transformers"])
def test_an_export_without_digests_loads_with_one_notice(reader, copy_of, caplog):
    folder = copy_of(reader)
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    READERS[reader](folder)
    assert caplog.text.count("has no digests") == 1
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_every_file_of_every_safetensors_format_is_signed(make_model, tmp_path):
    model = make_model(bits=4, target_modules=["q_proj"])
    for name in ("packed", "gptq", "compressed-tensors", "dequantized"):
        export_model(model, tmp_path / name, format=name, max_shard_size="90KB", progress=False)
        for path in (tmp_path / name).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert set(file.metadata()) == {"format", "peft_lrqat"}


@pytest.mark.parametrize("format", ["packed", "gptq", "compressed-tensors", "dequantized"])
def test_verification_says_what_is_damaged(format, make_model, tmp_path):
    scale_dtype = "float16" if format == "gptq" else "bfloat16"
    model = make_model(bits=4, target_modules=["q_proj"], scale_dtype=scale_dtype)
    export_model(model, tmp_path / "out", format=format, progress=False)
    flip(tmp_path / "out")
    (problem,) = verify_export(model, tmp_path / "out", format=format).problems
    assert "is damaged" in problem


def test_a_base_saved_again_has_the_digest_of_its_own_settings(copy_of, tmp_path):
    folder = copy_of("base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.rms_norm_eps = 0.25
    model.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert loaded.config.rms_norm_eps == 0.25


def test_other_models_are_saved_as_they_were(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no safetensors file to sign"):
        sign_model(tmp_path)


@pytest.mark.parametrize("name", ["tensors", "config.json"])
@pytest.mark.parametrize("reader", READERS)
def test_no_damage_to_a_model_is_silent(reader, name, copy_of, caplog):
    """It is refused, or harmless, or gets a warning."""
    folder = copy_of(reader)
    path = largest(folder) if name == "tensors" else folder / name
    whole, wanted = path.read_bytes(), logits(READERS[reader](folder))
    generator = torch.Generator().manual_seed(0)
    # transformers reads the config before anyone is asked, and raises what it likes.
    errors = ValueError if reader == "packed" else Exception
    refused = 0
    for case in range(max(10, CASES // 3)):
        path.write_bytes(damaged(whole, generator))
        caplog.clear()
        try:
            model = READERS[reader](folder)
        except errors:
            refused += 1
            continue
        assert caplog.text or torch.equal(logits(model), wanted), case
    assert refused > 0
