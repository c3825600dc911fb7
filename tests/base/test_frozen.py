"""What is frozen stays what it is: averages of weights, copies, writes through `.data`."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
)


FIELDS = {
    "fixed8": {},
    "int": {"downcast": "int", "symmetric": False, "group_size": 16},
}


@pytest.fixture(params=FIELDS.values(), ids=FIELDS)
def model(request, make_peft, disturb):
    return disturb(make_peft(bits=3, **request.param))


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize(
    "average",
    [
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"avg_fn": get_swa_avg_fn()},
    ],
    ids=["ema", "ema-one-by-one", "swa"],
)
def test_an_average_of_equal_weights_is_the_model(
    average, use_buffers, model, make_base, logits_of, lrqat_layers, tmp_path
):
    averaged = AveragedModel(model, use_buffers=use_buffers, **average)
    wanted = logits_of(model)
    for _ in range(4):
        averaged.update_parameters(model)
    torch.testing.assert_close(logits_of(averaged.module), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(model), wanted)
    averaged.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    # Averages of floats may be off by a rounding, in the layers without an adapter, too.
    torch.testing.assert_close(logits_of(loaded), logits_of(averaged.module), rtol=1e-5, atol=1e-5)
    state = averaged.module.state_dict()
    for name, tensor in model.state_dict().items():
        if "base_layer" in name or "fingerprint" in name:
            assert torch.equal(state[name], tensor), name


def test_an_average_of_a_run_is_that_of_its_factors(model, make_base, logits_of, tmp_path):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lrqat_B" in name:
                parameter.mul_(0.5)
    averaged.update_parameters(model)
    averaged.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert torch.equal(logits_of(loaded), logits_of(averaged.module))


def test_a_hand_written_average(model, logits_of):
    """As EMA callbacks have it: a copy, written through `.data`, then moved and copied again."""
    wanted = logits_of(model)
    average = copy.deepcopy(model)
    for _ in range(3):
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.data.copy_(0.9 * mine.data + (1 - 0.9) * theirs.data)
    for twin in (average, copy.deepcopy(average), average.to("cpu"), average.float()):
        torch.testing.assert_close(logits_of(twin), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits_of(model), wanted)


def test_parameters_that_are_replaced_by_data_change_nothing(model, logits_of):
    wanted = logits_of(model)
    for name, parameter in model.named_parameters():
        if "base_layer.phi" in name:
            parameter.data = torch.zeros_like(parameter)
    assert torch.equal(logits_of(model), wanted)


def test_copies_are_apart_when_another_weight_is_loaded(model, make_peft, logits_of):
    wanted = logits_of(model)
    twin = copy.deepcopy(model)
    other = {n: torch.zeros_like(t) for n, t in model.state_dict().items() if "base_layer.phi" in n}
    model.load_state_dict(other, strict=False)
    assert torch.equal(logits_of(twin), wanted)
    with pytest.raises(ValueError, match="was trained on another base model"):
        logits_of(model)


def test_a_copy_takes_no_memory_for_what_it_holds(model):
    twin = copy.deepcopy(model)
    for one, other in zip(model.modules(), twin.modules(), strict=True):
        if hasattr(one, "frozen"):
            assert one.frozen("phi").data_ptr() == other.frozen("phi").data_ptr()
            assert one.phi.data_ptr() == one.frozen("phi").data_ptr()
            assert other.phi.data_ptr() != one.phi.data_ptr()


def test_another_parameter_object_is_meant(model, logits_of):
    """FSDP2 and loaders of transformers put other parameters there."""
    layer = next(m for m in model.modules() if hasattr(m, "frozen"))
    layer.phi = torch.nn.Parameter(torch.zeros_like(layer.phi), requires_grad=False)
    assert not layer.frozen("phi").any()


def test_default_dtype_changes_no_frozen_weight(make_base, make_config, lrqat_layers):
    wanted = lrqat_layers(get_peft_model(make_base(), make_config()))
    base = make_base()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = lrqat_layers(get_peft_model(base, make_config()))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, layer in wanted.items():
        assert layer.base_layer.fingerprint == found[name].base_layer.fingerprint
