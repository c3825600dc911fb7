"""Weights of experts in a low-bit base: computed with, stored, loaded and calibrated as others."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import MIXTURES, experts_of, logits_of, make_mixture, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import CalibratedStart, LowBitConfig, calibrate_low_bit
from peft_lrqat.base.experts import (
    DowncastExperts,
    ExpertWeights,
    LowBitExperts,
    by_expert,
    expert_weights,
    fuse_experts,
    put_expert_weights,
)
from peft_lrqat.base.prepare import prepare_low_bit
from peft_lrqat.quant import Grid, WeightFormat


GRID = {"bits": 4, "group_size": 16, "target_parameters": "all-experts"}


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return make_mixture(request.param)


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), out=st.integers(1, 3))
def test_each_expert_gets_its_tokens(counts, out):
    x = torch.arange(sum(counts), dtype=torch.float32).unsqueeze(-1)
    y = by_expert(x, counts, lambda e, part: part.expand(-1, out) + 100 * e, out)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert torch.equal(y, (x + 100 * owner.unsqueeze(-1)).expand(-1, out))


def test_layers_of_their_own_compute_what_the_parameters_did(mixture):
    ids, before = tokens(), logits_of(mixture)
    names = list(mixture.state_dict())
    apart = copy.deepcopy(mixture)
    for name, weights in expert_weights(apart).items():
        put_expert_weights(apart, name, weights)
    assert all(type(experts) is LowBitExperts for experts in experts_of(apart))
    torch.testing.assert_close(logits_of(apart), before, rtol=1e-4, atol=1e-4)
    loss = apart(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, mixture(input_ids=ids, labels=ids).loss)
    fuse_experts(apart)
    assert [type(e) for e in experts_of(apart)] == [type(e) for e in experts_of(mixture)]
    assert sorted(apart.state_dict()) == sorted(names)
    assert torch.equal(logits_of(apart), before)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_those_of_one_matrix(transposed):
    """Grids, scales and packing know rows only, so experts are rows."""
    torch.manual_seed(0)
    weight, experts = torch.randn(12, 16), 3
    fused = weight.unflatten(0, (experts, 4))
    owner = nn.Module()
    owner.is_transposed = transposed
    owner.weight = nn.Parameter(fused.mT.contiguous() if transposed else fused)
    plain = ExpertWeights.of(owner, "weight").make()
    assert torch.equal(plain.fused(), owner.weight)
    format = WeightFormat(
        grid=Grid(bits=4, group_size=8), downcast="int", scale_dtype="bfloat16", in_features=16
    )
    settings = {"estimator": "lp", "p": 4.0, "base_dtype": torch.float32}
    layer = DowncastExperts.from_linear(plain, format, **settings)
    dense = layer.stored_weight()
    x, counts = torch.randn(5, 16), [2, 0, 3]
    wanted = torch.cat([x[:2] @ dense[:4].T, x[2:] @ dense[8:].T])
    torch.testing.assert_close(layer(x, counts), wanted)
    assert layer.to_plain(dense).fused().shape == owner.weight.shape


@pytest.mark.parametrize("downcast", ["int", "fixed8"])
def test_a_stored_base_loads_as_it_was(mixture, downcast, tmp_path):
    mixture.save_pretrained(tmp_path / "plain")
    config = LowBitConfig(downcast=downcast, **GRID)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert not [n for n, p in made.named_parameters() if p.dim() == 3]
    made.save_pretrained(tmp_path / "low-bit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "low-bit").eval()
    assert torch.equal(logits_of(loaded), logits_of(made.eval()))
    written = json.loads((tmp_path / "low-bit/config.json").read_text())["quantization_config"]
    assert written["format_version"] == 6
    assert {m["experts"] for n, m in written["modules"].items() if ".experts." in n} == {4}
    prepare_low_bit(tmp_path / "plain", tmp_path / "prepared", config, progress=False)
    prepared = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared").eval()
    assert torch.equal(logits_of(prepared), logits_of(loaded))


def test_some_experts_low_bit_and_others_not(tmp_path):
    mixture = make_mixture("mixtral")
    mixture.save_pretrained(tmp_path / "plain")
    config = LowBitConfig(bits=4, target_parameters=["experts.down_proj"])
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    made.save_pretrained(tmp_path / "low-bit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "low-bit").eval()
    experts = experts_of(loaded)[0]
    assert isinstance(experts.down_proj, DowncastExperts)
    assert torch.equal(experts.gate_up_proj, experts_of(mixture)[0].gate_up_proj)
    assert torch.equal(logits_of(loaded), logits_of(made.eval()))


def test_without_the_setting_experts_stay(tmp_path):
    make_mixture("mixtral").save_pretrained(tmp_path / "plain")
    config = LowBitConfig(bits=4)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert type(experts_of(made)[0]).__name__ == "MixtralExperts"
    assert "target_parameters" not in made.config.quantization_config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 2}, "4 experts in MixtralForCausalLM, but 2"),
        ({"experts": 5}, "5 experts do not share 384 rows equally"),
        ({"experts": 0}, "another kind of module"),
    ],
)
def test_another_number_of_experts_is_refused(fields, message, tmp_path):
    make_mixture("mixtral").save_pretrained(tmp_path / "plain")
    config = LowBitConfig(**GRID)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    made.save_pretrained(tmp_path / "low-bit")
    file = tmp_path / "low-bit/config.json"
    written = json.loads(file.read_text())
    written["quantization_config"]["modules"]["model.layers.0.mlp.experts.gate_up_proj"] |= fields
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "low-bit")


def test_names_that_mean_no_experts_are_refused(tmp_path):
    model = make_mixture("mixtral")
    start = CalibratedStart(dataset=[{"input_ids": [1, 2]}], progress=False)
    for names in (["experts.up_proj"], ["q_proj"]):
        with pytest.raises(ValueError, match="no weight of experts has this name; one is `model"):
            calibrate_low_bit(model, LowBitConfig(target_parameters=names), start)
    with pytest.raises(ValueError, match="must be a list of names of parameters"):
        LowBitConfig(target_parameters="experts.down_proj")


def calibrated(mixture, method, **fields):
    rows = [{"input_ids": row.tolist()} for row in tokens(16, 24, seed=2)]
    start = CalibratedStart(method=method, dataset=rows, progress=False)
    config = LowBitConfig(bits=3, downcast="fixed8", target_parameters="all-experts", **fields)
    return calibrate_low_bit(copy.deepcopy(mixture), config, start), start


@pytest.mark.parametrize("method", ["blocks", "gptq"])
def test_calibration_lowers_the_loss_of_the_blocks(mixture, method, tmp_path):
    model, start = calibrated(mixture, method)
    assert len(start.losses) == 2
    before, after = map(sum, zip(*start.losses.values(), strict=True))
    assert after < before
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_gptq_rounds_an_expert_without_tokens_to_nearest():
    mixture = make_mixture("mixtral", num_hidden_layers=1, num_local_experts=5)
    router = mixture.model.layers[0].mlp.gate.weight
    with torch.no_grad():  # whatever the token is, two of the others win
        direction = router[0].clone()
        router.copy_(torch.tensor([1, -1, 0, 1.5, -1.5]).unsqueeze(-1) * direction)
    model, _ = calibrated(mixture, "gptq")
    layer = experts_of(model)[0].down_proj
    plain = expert_weights(mixture)["model.layers.0.mlp.experts.down_proj"].make()
    fields = {"estimator": "lp", "p": 2.0, "base_dtype": torch.float32}
    nearest = DowncastExperts.from_linear(plain, layer.format, **fields)
    rows = layer.rows(2)
    assert torch.equal(layer.scale0[rows], nearest.scale0[rows])
    difference = layer.phi[rows].int() - nearest.phi[rows].int()
    assert difference.abs().max() <= 1  # ties are stored a unit apart
    assert not torch.equal(layer.phi[layer.rows(0)], nearest.phi[layer.rows(0)])
