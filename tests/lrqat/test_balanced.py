"""Balanced grids: values of half steps, trained, saved, merged, exported and loaded as they are."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import (
    CalibratedStart,
    LowBitConfig,
    LRQATConfig,
    calibrate_low_bit,
    prepare_low_bit,
)
from peft_lrqat.calibration.weights import TrainedWeight
from peft_lrqat.export import export_model, load_quantized, verify_export
from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.quant import Grid, WeightFormat, estimate_range


IDS = torch.arange(3, 23)[None]
FIELDS = {"target_modules": "all-linear", "group_size": 16, "balanced": True}


def config(**fields):
    return LRQATConfig(task_type="CAUSAL_LM", **{**FIELDS, "bits": 2, **fields})


@pytest.fixture
def trained(make_base, disturb):
    """An adapter on 2-bit balanced grids whose integers have moved."""
    return disturb(get_peft_model(make_base().to(torch.bfloat16), config()).eval())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def values_of(model):
    """Every weight of the target layers, in steps of its scale."""
    found = []
    for layer in model.modules():
        if isinstance(layer, LRQATLayer):
            w = layer.low_rank_weight("default")
            step = w.step().repeat_interleave(16, dim=1)
            found.append((layer.base_layer.stored_weight().float(), step))
    return found


# The grid


@pytest.mark.parametrize("bits", range(2, 9))
def test_values_lie_evenly_around_zero(bits):
    grid = Grid(bits=bits, balanced=True)
    codes = torch.arange(grid.qmin, grid.qmax + 1).float()[None]
    values = grid.values(codes.clone(), torch.ones(1, 1), None)[0]
    assert torch.equal(values, -values.flip(0))
    assert len(values) == 2**bits
    assert torch.equal(values.diff(), torch.ones(2**bits - 1))
    assert torch.equal(grid.units(values[None], torch.ones(1, 1), None), codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_grid_without_halves_holds_the_same_values(bits):
    grid = Grid(bits=bits, balanced=True)
    codes = torch.arange(grid.qmin, grid.qmax + 1)
    whole = 2 * codes + 1
    assert whole.min() >= grid.whole.qmin
    assert whole.max() <= grid.whole.qmax
    step = torch.rand(1, 1)
    expected = grid.values(codes.float()[None], step, None)
    assert torch.equal(grid.whole.values(whole.float()[None], step / 2, None), expected)


def test_a_balanced_grid_has_no_zero_point():
    with pytest.raises(ValueError, match="a balanced grid has no zero point"):
        Grid(bits=2, balanced=True, symmetric=False)
    for kind in (LRQATConfig, LowBitConfig):
        with pytest.raises(ValueError, match="`balanced` grids have no zero point"):
            kind(balanced=True, symmetric=False)


@pytest.mark.parametrize("estimator", ["minmax", "lp"])
def test_ranges_lose_less_at_two_bits(estimator):
    weight = torch.randn(16, 64)
    lost = {}
    for balanced in (False, True):
        grid = Grid(bits=2, balanced=balanced)
        scale, _ = estimate_range(weight, grid, estimator=estimator, scale_dtype="float32", p=2.0)
        codes = grid.units(weight, scale, None).round_().clamp_(grid.qmin, grid.qmax)
        lost[balanced] = (grid.values(codes, scale, None) - weight).square().sum()
    assert lost[True] < 0.8 * lost[False]


def test_the_smallest_grid_that_covers_every_weight():
    weight, grid = torch.randn(16, 64), Grid(bits=2, balanced=True)
    scale, _ = estimate_range(weight, grid, estimator="minmax", scale_dtype="float32", p=2.0)
    torch.testing.assert_close(1.5 * scale[:, 0], weight.abs().amax(1))


# Calibration


@pytest.mark.parametrize("downcast", ["int", "fixed8", "fp32"])
def test_a_trained_weight_has_the_gradients_of_the_formula(downcast):
    grid = Grid(bits=2, balanced=True, group_size=8)
    format = WeightFormat(grid=grid, downcast=downcast, scale_dtype="float32", in_features=16)
    weight, scale = torch.randn(5, 16), torch.rand(5, 2) + 0.3
    made = TrainedWeight(weight, scale, None, format, torch.float32)
    upstream = torch.randn(5, 16)
    (made() * upstream).sum().backward()
    w, s = made.weight.detach().clone().requires_grad_(), scale.clone().requires_grad_()
    step = s.repeat_interleave(8, dim=1)
    z = w / step - 0.5
    stored = z if downcast != "fixed8" else z + ((z * 64).round() / 64 - z).detach()
    q = stored + (stored.round() - stored).detach()
    q = torch.where(q < -2, -2.0, torch.where(q > 1, 1.0, q))
    (step * (q + 0.5) * upstream).sum().backward()
    torch.testing.assert_close(made.weight.grad, w.grad)
    torch.testing.assert_close(made.scale.grad, s.grad)


@pytest.mark.parametrize("method", ["gptq", "blocks"])
def test_a_calibrated_start(method, make_base, tmp_path):
    rows = [{"input_ids": ids} for ids in torch.randint(3, 90, (8, 16))]
    start = CalibratedStart(method=method, dataset=rows, progress=False)
    made = calibrate_low_bit(make_base(), LowBitConfig(bits=2, **FIELDS), start)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(made.eval()))
    model = get_peft_model(loaded, LRQATConfig(target_modules="all-linear"))
    assert model.peft_config["default"].balanced


# Saved, loaded, merged, exported


def test_what_is_deployed_lies_on_the_grid(trained):
    merged = trained.merge_and_unload()
    weight = merged.model.layers[0].mlp.up_proj.weight.float().view(-1, 16)
    # Four values for each group of 16 weights, two of each sign.
    for group in weight[:20]:
        found = group.unique()
        assert len(found) <= 4
        assert not (found == 0).any()


def test_saved_and_loaded(trained, make_base, tmp_path):
    trained.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["balanced"] is True
    loaded = PeftModel.from_pretrained(make_base().to(torch.bfloat16), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(trained))
    other = json.loads((tmp_path / "adapter_config.json").read_text())
    assert other["bits"] == 2


def test_a_base_with_other_values_is_refused(trained, make_base, tmp_path):
    trained.save_pretrained(tmp_path / "adapter")
    make_base().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    base = prepare_low_bit(tmp_path / "plain", tmp_path / "base", LowBitConfig(bits=2))
    del base
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="`balanced` is True, but the low-bit base holds"):
        PeftModel.from_pretrained(wrong, tmp_path / "adapter")


def test_a_stored_base(make_base, tmp_path):
    make_base().save_pretrained(tmp_path / "plain")
    prepare_low_bit(tmp_path / "plain", tmp_path / "base", LowBitConfig(bits=2, **FIELDS))
    written = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 4
    assert all(entry["balanced"] is True for entry in written["modules"].values())
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    settings = LowBitConfig(bits=2, **FIELDS)
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings
    ).eval()
    assert torch.equal(logits(stored), logits(made))


def test_a_base_without_halves_is_written_as_before(make_base, tmp_path):
    make_base().save_pretrained(tmp_path / "plain")
    prepare_low_bit(tmp_path / "plain", tmp_path / "base", LowBitConfig(bits=2))
    written = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 2
    assert "balanced" not in written
    assert not any("balanced" in entry for entry in written["modules"].values())


def test_a_packed_export(trained, tmp_path):
    export_model(trained, tmp_path / "packed", format="packed")
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 5
    assert verify_export(trained, tmp_path / "packed", format="packed").exact
    expected = logits(load_quantized(tmp_path / "packed"))
    # The same weights in bfloat16; products are summed in another order.
    assert (expected - logits(trained)).abs().max() < 2**-5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert (expected - logits(loaded)).abs().max() < 2**-5
