"""Scales of K blocks: trained, saved, loaded, merged, prepared, calibrated and exported."""

import json

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import (
    CalibratedStart,
    LowBitConfig,
    LRQATConfig,
    calibrate_low_bit,
    prepare_low_bit,
)
from peft_lrqat.export import export_model, load_quantized, verify_export
from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.quant import Grid
from peft_lrqat.quant.k_scales import split
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments


IDS = torch.arange(3, 23)[None]
FIELDS = {"bits": 2, "symmetric": False, "k_quant": True}


def config(**fields):
    return LRQATConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=4, **{**FIELDS, **fields}
    )


def make_wide():
    """The same random model at every call, whose widths 256 divides."""
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()


@pytest.fixture
def wide():
    return make_wide()


@pytest.fixture
def trained(wide):
    """An adapter whose factors and scales have been trained."""
    model = get_peft_model(wide, config())
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(3, 90, (16, 16)).tolist()]
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = LRQATTrainingArguments(
        output_dir="unused",
        max_steps=4,
        learning_rate=0.05,
        scale_learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    LRQATTrainer(model=model, args=options, train_dataset=rows).train()
    moved = [n for n, p in model.named_parameters() if p.requires_grad and (p != first[n]).any()]
    assert any("lrqat_scale" in name for name in moved)
    assert any("lrqat_B" in name for name in moved)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LRQATLayer)}


def test_every_scale_is_what_a_block_holds(trained):
    for layer in layers_of(trained).values():
        w = layer.low_rank_weight("default")
        assert w.format.grid == Grid(bits=2, symmetric=False, group_size=16, k_quant=True)
        step = w.step()
        assert torch.equal(split(step, w.zero_point, w.format.grid).scale, step)
        # The trained parameter itself lies between.
        assert not torch.equal(layer.lrqat_scale["default"], step)


def test_saved_and_loaded(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_wide(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(trained))


def test_merged_and_exported(trained, tmp_path):
    with pytest.raises(ValueError, match="cannot be represented exactly in torch"):
        export_model(trained, tmp_path / "ct", format="compressed-tensors", progress=False)
    for format in ("packed", "dequantized"):
        export_model(trained, tmp_path / format, format=format, progress=False)
        assert verify_export(trained, tmp_path / format, format=format).exact
    before = logits(trained)
    merged = trained.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=0.02, atol=0.02)
    packed = load_quantized(tmp_path / "packed")
    for name, parameter in merged.named_parameters():
        assert torch.equal(packed.get_parameter(name), parameter)


def test_a_packed_export_is_a_base_with_these_scales(trained, tmp_path):
    export_model(trained, tmp_path / "packed", format="packed", progress=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    again = get_peft_model(base, LRQATConfig(target_modules="all-linear"))
    assert again.peft_config["default"].k_quant
    assert again.peft_config["default"].scale_dtype == "float16"
    for name, layer in layers_of(again).items():
        wanted = layers_of(trained)[name].low_rank_weight("default").step()
        assert torch.equal(layer.low_rank_weight("default").step(), wanted)


def test_a_stored_base(wide, tmp_path):
    wide.save_pretrained(tmp_path / "plain")
    prepare_low_bit(tmp_path / "plain", tmp_path / "base", LowBitConfig(**FIELDS))
    written = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 4
    assert all(entry["k_quant"] is True for entry in written["modules"].values())
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=LowBitConfig(**FIELDS)
    ).eval()
    assert torch.equal(logits(stored), logits(made))
    with pytest.raises(ValueError, match="`k_quant` is False, but the low-bit base holds"):
        get_peft_model(stored, LRQATConfig(target_modules="all-linear", k_quant=False))


@pytest.mark.parametrize(
    "mixed", [{"bits_pattern": {"down_proj": 8}}, {"embedding_bits": 6}], ids=["layer", "embedding"]
)
@pytest.mark.parametrize("repeated", [True, False])
def test_a_base_with_widths_that_no_k_block_holds(mixed, repeated, wide, tmp_path):
    wide.save_pretrained(tmp_path / "plain")
    prepare_low_bit(tmp_path / "plain", tmp_path / "base", LowBitConfig(**FIELDS, **mixed))
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    asked = {**FIELDS, **mixed} if repeated else {}
    model = get_peft_model(stored, LRQATConfig(target_modules="all-linear", **asked))
    assert model.peft_config["default"].k_quant
    grids = {
        n: layer.low_rank_weight("default").format.grid for n, layer in layers_of(model).items()
    }
    plain = [name for name, grid in grids.items() if not grid.k_quant]
    assert plain == [name for name in grids if "bits_pattern" in mixed and "down_proj" in name]


def test_another_kind_of_scales_is_named(wide):
    model = get_peft_model(wide, config())
    other = {"bits": 2, "symmetric": False, "group_size": 16, "scale_dtype": "float16"}
    with pytest.raises(
        ValueError, match=r"asymmetric, k_quant, downcast=.*asks for.*asymmetric, dow"
    ):
        model.add_adapter("other", LRQATConfig(target_modules="all-linear", **other))


@pytest.mark.parametrize("method", ["gptq", "blocks"])
def test_a_calibrated_start(method, wide, tmp_path):
    rows = [{"input_ids": ids} for ids in torch.randint(3, 90, (8, 16))]
    start = CalibratedStart(method=method, dataset=rows, progress=False)
    made = calibrate_low_bit(wide, LowBitConfig(downcast="fixed8", **FIELDS), start)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(made.eval()))
    model = get_peft_model(loaded, LRQATConfig(target_modules="all-linear"))
    for layer in layers_of(model).values():
        base = layer.base_layer
        assert torch.equal(base.format.step(base.scale0, base.zero_point), base.scale0)


# Settings


def test_each_width_has_the_groups_of_its_blocks():
    made = config(bits_pattern={"down_proj": 4}, embedding_bits=8)
    assert made.weight_grid("q_proj").group_size == 16
    down = made.weight_grid("down_proj")
    assert (down.bits, down.group_size, down.k_quant) == (4, 32, True)
    assert config(group_size=64).weight_grid("q_proj").group_size == 64
    # Wider integers keep plain scales.
    made = config(bits=8, symmetric=True)
    assert made.weight_grid("q_proj") == Grid(bits=8)


def test_scales_of_another_dtype_are_refused():
    for kind in (LRQATConfig, LowBitConfig):
        assert kind(**FIELDS).scale_dtype == "float16"
        with pytest.raises(ValueError, match="scales in float16, but `scale_dtype` is 'bfloat16'"):
            kind(scale_dtype="bfloat16", **FIELDS)


def test_a_width_that_no_block_divides_is_refused_by_name(make_base):
    with pytest.raises(ValueError, match=r"`model.layers.0.*`: `k_quant` needs `in_features`"):
        get_peft_model(make_base(), config())
