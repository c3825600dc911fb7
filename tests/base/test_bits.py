"""Bits for each layer: the average is kept, and patterns give what was chosen."""

import pytest
import torch
from peft import get_peft_model

from peft_lrqat import LowBitConfig, LRQATConfig, choose_bits
from peft_lrqat.base.bits import as_pattern
from peft_lrqat.base.downcast import DowncastLinear


@pytest.fixture
def rows():
    return [{"input_ids": ids.tolist()} for ids in torch.randint(3, 90, (6, 16))]


def bits_of(model):
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): (
            module.format.grid.bits
        )
        for name, module in model.named_modules()
        if isinstance(module, DowncastLinear)
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_average_is_kept_and_the_pattern_gives_the_bits(kind, make_base, rows):
    model = make_base(kind)
    config = LowBitConfig(group_size=16)
    bits = choose_bits(model, rows, config, average_bits=2.75, widths=(2, 3, 4), progress=False)
    sizes = {name: model.get_submodule(name).weight.numel() for name in bits}
    average = sum(sizes[name] * b for name, b in bits.items()) / sum(sizes.values())
    assert 2.5 < average <= 2.75
    assert len(set(bits.values())) > 1
    common, pattern = as_pattern(bits)
    fields = {"bits": common, "bits_pattern": pattern, "group_size": 16}
    adapter = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", **fields)
    assert bits_of(get_peft_model(model, adapter)) == bits


def test_a_layer_that_matters_gets_more_bits(make_base, rows):
    model = make_base("llama")
    name = "model.layers.0.self_attn.v_proj"
    with torch.no_grad():
        # What it computes is made larger; the error of rounding it grows with it.
        model.get_submodule(name).weight.mul_(30)
    bits = choose_bits(
        model, rows, LowBitConfig(group_size=16), average_bits=2.3, widths=(2, 4), progress=False
    )
    assert bits[name] == 4


def test_layers_that_a_runtime_joins_get_the_same_bits(make_base, rows):
    joined = ("q_proj", "k_proj", "v_proj")
    bits = choose_bits(
        make_base("llama"),
        rows,
        LowBitConfig(group_size=16),
        average_bits=3,
        widths=(2, 3, 4, 8),
        fused=iter([joined]),
        progress=False,
    )
    for name, width in bits.items():
        parent, _, part = name.rpartition(".")
        if part in joined:
            assert {bits[f"{parent}.{other}"] for other in joined} == {width}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_bits": 1.5}, "must lie within the widths, 2, 3, 4, 5, 6, 8, but is 1.5"),
        ({"average_bits": 9}, "must lie within the widths"),
        ({"dataset": []}, "data has no rows"),
    ],
)
def test_what_is_refused(changes, message, make_base, rows):
    words = {"dataset": rows, "average_bits": 3, "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        choose_bits(make_base("llama"), config=LowBitConfig(group_size=16), **words)
