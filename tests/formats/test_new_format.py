"""A new format is one class and one row of the table; the export, its check and the card follow."""

import pytest
import torch

from peft_lrqat.export import export_model, verify_export
from peft_lrqat.formats.base import Loaded, SafetensorsFormat
from peft_lrqat.formats.capabilities import capability_table
from peft_lrqat.formats.stored import StoredTensors, build
from peft_lrqat.formats.table import FORMATS


class Halves(SafetensorsFormat):
    """Integers as float16, and scales beside them."""

    name = "halves"
    symmetric_bits = (3, 4)
    asymmetric_bits = ()
    tags = ("halves",)
    snippet = "model = load_halves({auto_class})"

    def tensors_of(self, linear, activations):
        yield "halves", linear.codes.half()
        yield "scale", linear.scale

    def stored_bytes(self, target, activations=None):
        return 2 * target.num_weights + target.scale_bytes

    def config_entry(self, model):
        return {"quant_method": "halves", "layers": sorted(model.targets)}

    def load(self, path, model_class, dtype):
        config = model_class.config_class.from_pretrained(path)
        stored, weights = StoredTensors(path), {}
        for name in config.quantization_config["layers"]:
            codes, scale = stored.take(f"{name}.halves").float(), stored.take(f"{name}.scale")
            weights[f"{name}.weight"] = (codes * scale.float()).to(dtype)
        del config.quantization_config
        model, report = build(path, config, weights, stored, dtype)
        return Loaded(model=model, loader="the toy", report=report)


@pytest.fixture(autouse=True)
def _row(monkeypatch):
    monkeypatch.setitem(FORMATS, "halves", Halves())


def test_one_class_and_one_row_are_enough(make_model, tokenizer, tmp_path):
    model = make_model(bits=4)
    export_model(model, tmp_path / "out", format="halves", tokenizer=tokenizer, progress=False)
    found = verify_export(model, tmp_path / "out", format="halves")
    assert found.exact
    assert found.loader == "the toy"
    assert found.logits_difference == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "load_halves(AutoModelForCausalLM)" in card
    assert "- halves\n" in card
    with torch.no_grad():
        next(iter(model.get_base_model().model.layers)).mlp.up_proj.lrqat_scale["default"] *= 2
    found = verify_export(model, tmp_path / "out", format="halves")
    assert found.different_layers == ("model.layers.0.mlp.up_proj",)


def test_what_it_cannot_hold_is_refused(make_model, tmp_path):
    for fields, message in (
        ({"bits": 2}, "halves holds symmetric weights of 3, 4 bits, but these have 2"),
        ({"bits": 4, "activation_bits": 8}, "halves stores weights alone and cannot carry"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(make_model(**fields), tmp_path / "out", format="halves", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_table_of_the_documentation_shows_it():
    head, _, *rows = capability_table().splitlines()
    column = head.split(" | ").index("halves")
    cells = {row.split(" | ")[0]: row.split(" | ")[column] for row in rows}
    assert cells["| W4 per channel"] == "yes"
    assert cells["| W2 per channel"] == "-"
