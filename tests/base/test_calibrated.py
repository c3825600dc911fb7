"""Calibrated low-bit bases: in place, from a checkpoint, after an interruption, with adapters."""

import json
import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DataCollatorWithPadding

from peft_lrqat import LowBitConfig, LRQATConfig, prepare_low_bit
from peft_lrqat.base import calibrated
from peft_lrqat.base.calibrated import CalibratedStart, calibrate_low_bit
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.calibration.calibrate import BlockAtWork
from peft_lrqat.calibration.reconstruct import Reconstruction
from peft_lrqat.quant import Grid


SETTINGS = {"bits": 2, "group_size": 16, "symmetric": False, "downcast": "fixed8"}


@pytest.fixture
def rows():
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (8, 12)).tolist()]


@pytest.fixture
def start(rows):
    def make(method="blocks", **fields):
        return CalibratedStart(
            **{"method": method, "dataset": rows, "progress": False, "device": "cpu", **fields}
        )

    return make


@pytest.mark.parametrize("method", ["blocks", "gptq"])
def test_a_checkpoint_becomes_what_a_model_in_memory_becomes(method, make_base, start, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    model = calibrate_low_bit(plain, LowBitConfig(**SETTINGS), start(method))
    ids = torch.randint(3, 90, (2, 7))
    model.save_pretrained(tmp_path / "saved")
    prepared = prepare_low_bit(
        str(tmp_path / "plain"),
        tmp_path / "prepared",
        LowBitConfig(**SETTINGS),
        start=start(method),
        progress=False,
    )
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("saved", "prepared"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert prepared.calibration["method"] == method
    assert prepared.calibration["tokens"] == 8 * 12
    card = (tmp_path / "prepared" / "README.md").read_text()
    assert f"calibrated, by method '{method}' on 96 tokens" in card
    for folder in ("saved", "prepared"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        layers = [m for m in again.modules() if isinstance(m, DowncastLinear)]
        assert len(layers) == 14
        assert {layer.range for layer in layers} == {method}
        assert torch.equal(again(ids).logits, model(ids).logits)
        stored = again.config.quantization_config
        assert stored.calibration == prepared.calibration


def test_adapters_start_from_the_calibrated_integers(make_base, start, tmp_path):
    base = calibrate_low_bit(make_base("llama"), LowBitConfig(**SETTINGS), start())
    model = get_peft_model(
        base, LRQATConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert layer.base_layer.range == "blocks"
    ids = torch.randint(3, 90, (2, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    logits = model.eval()(ids).logits
    assert torch.equal(model.merge_and_unload()(ids).logits, logits)


@pytest.mark.parametrize("method", ["blocks", "gptq"])
def test_other_parameters_are_left_as_they_are(method, make_base, start):
    model = make_base("llama")
    model.lm_head.requires_grad_(False)
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    calibrate_low_bit(model, LowBitConfig(**SETTINGS), start(method))
    kept = {n: p for n, p in model.named_parameters() if n in before}
    assert {"lm_head.weight", "model.norm.weight"} <= kept.keys()
    for name, parameter in kept.items():
        trained, value = before[name]
        assert parameter.grad is None
        assert parameter.requires_grad == trained
        assert torch.equal(parameter, value)


def test_an_interrupted_run_goes_on_after_the_last_block(make_base, start, tmp_path, monkeypatch):
    make_base("llama").save_pretrained(tmp_path / "plain")
    settings = LowBitConfig(**SETTINGS)

    def prepare(output):
        prepare_low_bit(
            str(tmp_path / "plain"), tmp_path / output, settings, start=start(), progress=False
        )

    prepare("whole")
    worked_on = []
    own = Reconstruction.__call__

    def stop_at_the_second(self, work: BlockAtWork, report):
        worked_on.append(next(iter(work.linears)).split(".")[2])
        if len(worked_on) == 2:
            raise KeyboardInterrupt
        return own(self, work, report)

    monkeypatch.setattr(Reconstruction, "__call__", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare("halved")
    assert not (tmp_path / "halved").exists()
    prepare("halved")
    assert worked_on == ["0", "1", "1"]
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "halved"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("whole", "halved")]
    for config in configs:
        config["quantization_config"].pop("made_from")
    assert configs[0] == configs[1]


def test_another_text_is_another_run(make_base, start, tmp_path, monkeypatch):
    make_base("llama").save_pretrained(tmp_path / "plain")
    settings = LowBitConfig(**SETTINGS)

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Reconstruction, "__call__", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare_low_bit(str(tmp_path / "plain"), tmp_path / "out", settings, start=start())
    other = start(dataset=[{"input_ids": [3] * 12}] * 8)
    with pytest.raises(ValueError, match="the beginning of another run"):
        prepare_low_bit(str(tmp_path / "plain"), tmp_path / "out", settings, start=other)


def test_rows_of_several_lengths_need_a_collator(tokenizer_for_padding, make_base, start):
    uneven = [{"input_ids": list(range(3, 3 + n))} for n in (5, 9, 7, 12)]
    with pytest.raises(ValueError, match="rows of one length, or a `data_collator` that pads"):
        start(dataset=uneven)
    padded = start(dataset=uneven, data_collator=tokenizer_for_padding)
    model = calibrate_low_bit(make_base("llama"), LowBitConfig(**SETTINGS), padded)
    assert isinstance(model.model.layers[0].mlp.up_proj, DowncastLinear)


@pytest.fixture
def tokenizer_for_padding():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"<pad>": 0, "a": 1}, unk_token="a")
    return DataCollatorWithPadding(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="<pad>")
    )


def test_activations_are_rounded_where_the_adapter_will_round_them(make_base, start):
    plain = calibrate_low_bit(make_base("llama"), LowBitConfig(**SETTINGS), start())
    grid = Grid(bits=4, symmetric=False)
    rounded = calibrate_low_bit(
        make_base("llama"), LowBitConfig(**SETTINGS), start(activations=grid)
    )
    one, other = (model.model.layers[1].mlp.down_proj.phi for model in (plain, rounded))
    assert not torch.equal(one, other)
    # A run goes on only where another one stopped that rounded them alike.
    settings = [m.config.quantization_config.calibration for m in (plain, rounded)]
    assert settings[1].pop("activations")["bits"] == 4
    assert settings[0] == settings[1]


def test_an_encoder_decoder(make_base, start):
    rows = [{"input_ids": ids, "labels": ids[:5]} for ids in torch.randint(3, 90, (4, 9)).tolist()]
    settings = LowBitConfig(**SETTINGS | {"exclude_modules": ["lm_head"]})
    model = calibrate_low_bit(make_base("t5"), settings, start(dataset=rows))
    kinds = {n for n, m in model.named_modules() if isinstance(m, DowncastLinear)}
    assert any(n.startswith("encoder") for n in kinds)
    assert any(n.startswith("decoder") for n in kinds)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"], ids=["untied", "tied"])
def test_embeddings_are_rounded_to_nearest(architecture, make_base, start, tmp_path):
    """Outside the blocks there is nothing to calibrate; both ways give the same base."""
    make_base(architecture).save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    settings = {**SETTINGS, "embedding_bits": 8}
    model = calibrate_low_bit(plain, LowBitConfig(**settings), start())
    model.save_pretrained(tmp_path / "saved")
    prepare_low_bit(
        str(tmp_path / "plain"), tmp_path / "prepared", LowBitConfig(**settings), start=start()
    )
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("saved", "prepared"))
    assert "model.embed_tokens.phi" in one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    ids = torch.randint(3, 90, (2, 7))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "prepared")
    assert torch.equal(again(ids).logits, model(ids).logits)


def refusals(make_base, start):
    infinite = make_base("llama")
    with torch.no_grad():
        infinite.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    yield infinite, SETTINGS, {}, "`model.layers.1.mlp.up_proj` have NaN or infinite"
    wide = SETTINGS | {"group_size": 10}
    yield make_base("llama"), wide, {}, "`group_size` must divide"


@pytest.mark.parametrize("number", range(2))
def test_refused(number, make_base, start):
    model, settings, fields, message = list(refusals(make_base, start))[number]
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrate_low_bit(model, LowBitConfig(**settings), start(**fields))
    assert not any(isinstance(m, DowncastLinear) for m in model.modules())


def test_no_rows_and_unknown_methods(start):
    with pytest.raises(ValueError, match="has no rows"):
        start(dataset=[])
    with pytest.raises(ValueError, match="`method` must be one of 'blocks', 'gptq'"):
        start("awq")


def test_a_quantised_model_is_refused(make_base, start):
    model = calibrate_low_bit(make_base("llama"), LowBitConfig(**SETTINGS), start())
    with pytest.raises(ValueError, match="quantised already"):
        calibrate_low_bit(model, LowBitConfig(**SETTINGS), start())


def test_integers_of_others_are_kept(make_base, start, tmp_path):
    """`--from` and calibration exclude each other."""
    from peft_lrqat import export_model

    model = get_peft_model(
        make_base("llama"), LRQATConfig(task_type="CAUSAL_LM", bits=4, group_size=32)
    )
    export_model(model, tmp_path / "gptq", format="gptq", progress=False)
    with pytest.raises(ValueError, match="calibration data changes nothing"):
        prepare_low_bit(str(tmp_path / "gptq"), tmp_path / "out", start=start())
    assert calibrated.METHODS.keys() == {"blocks", "gptq"}
