"""What earlier releases saved gives the integers and logits that it gave then."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_lrqat import LRQATLayer
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.export import load_quantized
from peft_lrqat.loraquant import LoRAQuantLayer


HERE = Path(__file__).parent
ADAPTERS = sorted(folder.parent for folder in HERE.glob("*/*/adapter_config.json"))
BASES = sorted(folder for folder in HERE.glob("*/low-bit*"))
EXPORTS = sorted(folder for folder in HERE.glob("*/export-*"))
INPUT_IDS = torch.arange(12).reshape(1, 12) * 5 % 32


def name_of(folder):
    return f"{folder.parent.name}/{folder.name}"


def integers(model):
    """Of every low-bit layer, with an adapter or without, by the layer's name."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LRQATLayer):
            found[f"{name}.codes"] = layer.quantized_codes()
        elif isinstance(layer, DowncastLinear) and not name.endswith(".base_layer"):
            found[f"{name}.codes"] = layer.format.decode(layer.phi)
        elif isinstance(layer, LoRAQuantLayer):
            found[f"{name}.codes"] = layer.loraquant_codes["default"]
    return found


def assert_same_logits(model, expected):
    with torch.no_grad():
        logits = model(INPUT_IDS).logits
    # Other processors sum in another order; a wrong integer moves logits of size 10 by 0.01 or
    # more.
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-3)


def test_the_first_release_is_there():
    assert {folder.parent.name for folder in ADAPTERS} >= {"0.1.0"}
    assert len([folder for folder in ADAPTERS if folder.parent.name == "0.1.0"]) == 9


@pytest.mark.parametrize("folder", ADAPTERS, ids=name_of)
def test_adapters_of_earlier_releases_load_with_the_same_integers_and_logits(folder):
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    expected = load_file(folder / "expected.safetensors")
    found = integers(model)
    assert found.keys() == expected.keys() - {"logits"}
    for name, codes in found.items():
        assert torch.equal(codes, expected[name]), name
    assert_same_logits(model, expected)


@pytest.mark.parametrize("folder", ADAPTERS, ids=name_of)
def test_saved_again_they_are_the_same(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    PeftModel.from_pretrained(base, folder).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    expected = load_file(folder / "expected.safetensors")
    for name, codes in integers(PeftModel.from_pretrained(base, tmp_path)).items():
        assert torch.equal(codes, expected[name]), name


@pytest.mark.parametrize("folder", EXPORTS, ids=name_of)
def test_packed_exports_of_earlier_releases_load_with_the_same_logits(folder):
    assert_same_logits(load_quantized(folder).eval(), load_file(folder / "expected.safetensors"))


def test_the_first_low_bit_bases_are_there():
    assert {name_of(folder) for folder in BASES} >= {
        "0.2.0/low-bit",
        "0.2.0/low-bit-asymmetric-groups",
        "0.2.0/low-bit-fixed8",
    }


@pytest.mark.parametrize("folder", BASES, ids=name_of)
def test_low_bit_bases_of_earlier_releases_load_with_the_same_integers_and_logits(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = load_file(folder / "expected.safetensors")
    found = integers(model)
    assert found.keys() == expected.keys() - {"logits"}
    assert all(torch.equal(codes, expected[name]) for name, codes in found.items())
    assert_same_logits(model, expected)
    model.save_pretrained(tmp_path)
    again = integers(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(codes, expected[name]) for name, codes in again.items())
