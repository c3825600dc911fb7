"""The frozen weight: its bytes, what frees the original, what leaves it unchanged, and what its
fingerprint tells.
"""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.utils.integrations import init_empty_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LRQATModel, target_weight_bytes
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.quant import DOWNCASTS, Grid, WeightFormat, blocks, estimate_range, packed_bytes


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.bfloat16),
    "to-fp16": lambda module: module.to(dtype=torch.float16),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
}


def make_format(in_features, *, bits=4, downcast="fixed8", scale_dtype="bfloat16", **grid):
    return WeightFormat(
        grid=Grid(bits=bits, **grid),
        downcast=downcast,
        scale_dtype=scale_dtype,
        in_features=in_features,
    )


def make_layer(
    weight, *, estimator="minmax", p=4.0, base_dtype=None, bias=None, conv1d=False, **format
):
    """A downcast layer of ``weight`` (out, in)."""
    if conv1d:
        linear = Conv1D(*weight.shape)
        linear.weight = nn.Parameter(weight.T.contiguous())
        linear.bias = bias
    else:
        linear = nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight, linear.bias = nn.Parameter(weight.clone()), bias
    return DowncastLinear.from_linear(
        linear,
        make_format(weight.shape[1], **format),
        estimator=estimator,
        p=p,
        base_dtype=base_dtype or weight.dtype,
    )


def state(layer):
    return [t for t in (layer.phi, layer.scale0, layer.zero_point) if t is not None]


def same_state(one, two):
    return len(state(one)) == len(state(two)) and all(map(torch.equal, state(one), state(two)))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_bytes_follow_the_formula(downcast, group_size, symmetric):
    rows, width = 5, 24
    for bits in range(2, 9):
        layer = make_layer(
            torch.randn(rows, width),
            bits=bits,
            downcast=downcast,
            group_size=group_size,
            symmetric=symmetric,
        )
        row = {
            "fp32": 4 * width,
            "bf16": 2 * width,
            "fp16": 2 * width,
            "fixed8": width,
            "int": packed_bytes(width, bits),
        }
        groups = 1 if group_size == -1 else width // group_size
        assert layer.phi.nbytes == layer.phi.untyped_storage().nbytes() == rows * row[downcast]
        assert layer.scale0.nbytes == rows * groups * 4
        assert (
            (layer.zero_point is None) if symmetric else (layer.zero_point.nbytes == rows * groups)
        )
        assert sum(p.nbytes for p in layer.parameters()) == sum(t.nbytes for t in state(layer))
        assert not list(layer.buffers())


@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_reported_bytes_of_a_model_are_the_sum_over_its_layers(downcast, make_peft, lrqat_layers):
    model = make_peft(downcast=downcast, bits=3, symmetric=False)
    layers = lrqat_layers(model).values()
    assert target_weight_bytes(model) == sum(
        sum(t.nbytes for t in state(layer.base_layer)) for layer in layers
    )


@pytest.mark.parametrize("downcast", ["fixed8", "int"])
def test_original_weights_are_freed_one_by_one(make_base, make_config, downcast, monkeypatch):
    """Each weight is gone before the next is downcast, so the peak is one layer's float32
    temporaries above the model.
    """
    model = make_base("llama", torch.bfloat16)
    shapes = {
        m.weight.shape
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    }
    weights = {
        n: weakref.ref(m.weight)
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    }
    alive = []
    create = LRQATModel._create_and_replace

    def count(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
        alive.append(sum(ref() is not None for ref in weights.values()))
        return create(
            self, config, adapter_name, target, target_name, parent, current_key, **kwargs
        )

    monkeypatch.setattr(LRQATModel, "_create_and_replace", count)
    known = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    model = get_peft_model(model, make_config(downcast=downcast))
    assert alive == list(range(len(weights), 0, -1))
    assert not any(ref() is not None for ref in weights.values())
    gc.collect()
    left = [
        o
        for o in gc.get_objects()
        if issubclass(type(o), torch.Tensor)
        and id(o) not in known
        and o.shape in shapes
        and o.is_floating_point()
    ]
    assert left == []


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_casts_leave_the_integers_alone(downcast, cast):
    bias = nn.Parameter(torch.randn(6))
    layer = make_layer(
        torch.randn(6, 16), downcast=downcast, symmetric=False, group_size=8, bias=bias
    )
    before = [t.detach().clone() for t in state(layer)]
    moved = cast(copy.deepcopy(layer))
    wanted = cast(torch.zeros(1)).dtype
    assert all(
        torch.equal(now.to(was.dtype), was) for now, was in zip(state(moved), before, strict=True)
    )
    assert [t.dtype for t in state(moved)] == [t.dtype for t in before]
    assert moved.fingerprint == layer.fingerprint
    assert (
        moved.dtype
        == moved.bias.dtype
        == moved.stored_weight().dtype
        == moved.weight.dtype
        == wanted
    )
    assert torch.equal(moved.stored_weight(), layer.stored_weight().to(wanted))
    assert same_state(moved, layer)
    x = torch.randn(2, 16)
    assert moved(x).dtype == x.dtype
    assert moved(x.to(wanted)).dtype == wanted


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_factors_and_codes_alone(cast, make_peft, disturb, lrqat_layers):
    model = disturb(make_peft(downcast="bf16"))
    before = {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if "lrqat_" in n or "scale0" in n or "phi" in n
    }
    codes = {n: layer.quantized_codes() for n, layer in lrqat_layers(model).items()}
    cast(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n].to(was.dtype), was) for n, was in before.items())
    assert all(after[n].dtype == was.dtype for n, was in before.items())
    assert all(
        torch.equal(layer.quantized_codes(), codes[n]) for n, layer in lrqat_layers(model).items()
    )


def test_cast_of_a_merged_layer_casts_the_merged_weight():
    layer = make_layer(torch.randn(4, 8))
    layer.merged_weight = torch.randn(4, 8)
    wanted = layer.merged_weight.bfloat16()
    assert torch.equal(layer.bfloat16().weight, wanted)


def test_casts_there_and_back_give_the_same_layer():
    layer = make_layer(torch.randn(6, 16), downcast="fp32", group_size=8, symmetric=False)
    assert same_state(copy.deepcopy(layer).half().bfloat16().float(), layer)
    assert torch.equal(copy.deepcopy(layer).half().float().weight, layer.weight)


@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_conv1d_is_a_linear_with_another_layout(downcast):
    weight, bias = torch.randn(6, 16), nn.Parameter(torch.randn(6))
    linear = make_layer(weight, bias=bias, downcast=downcast, group_size=8)
    conv1d = make_layer(weight, bias=bias, downcast=downcast, group_size=8, conv1d=True)
    assert same_state(linear, conv1d)
    assert linear.fingerprint == conv1d.fingerprint
    assert (conv1d.in_features, conv1d.out_features) == (16, 6)
    assert torch.equal(conv1d.weight, linear.weight.T)
    x = torch.randn(2, 3, 16)
    assert torch.equal(conv1d(x), linear(x))
    plain = conv1d.to_plain(conv1d.stored_weight())
    assert type(plain) is Conv1D
    assert plain.weight.T.is_contiguous()  # the view that multiplies as the unmerged layer does
    assert plain.weight.shape == (16, 6)
    torch.testing.assert_close(plain(x), conv1d(x))
    assert (plain.nf, plain.nx, plain.bias) == (6, 16, bias)
    plain = linear.to_plain(linear.stored_weight())
    assert type(plain) is nn.Linear
    assert torch.equal(plain(x), linear(x))


@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_stored_weight_is_within_the_resolution(downcast):
    for bits in (2, 4, 8):
        weight = torch.randn(6, 16)
        layer = make_layer(
            weight, bits=bits, downcast=downcast, scale_dtype="float32", group_size=8
        )
        # Half of the last digit: of the integer, of its 8 - b fractional bits, or of a float's
        # mantissa below 2^(b-1).
        digit = {
            "int": 1,
            "fixed8": 2 ** (bits - 8),
            "bf16": 2 ** (bits - 9),
            "fp16": 2 ** (bits - 12),
            "fp32": 2 ** (bits - 24),
        }
        step = layer.format.grid.expand(layer.scale0, 16)
        assert ((layer.stored_weight() - weight).abs() <= 0.5001 * digit[downcast] * step).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_state_dict_there_and_back(symmetric):
    layer = make_layer(torch.randn(6, 16), bias=nn.Parameter(torch.randn(6)), symmetric=symmetric)
    other = make_layer(torch.randn(6, 16), bias=nn.Parameter(torch.randn(6)), symmetric=symmetric)
    names = {"phi", "scale0", "bias"} if symmetric else {"phi", "scale0", "bias", "zero_point"}
    assert set(layer.state_dict()) == names
    assert other.fingerprint != layer.fingerprint
    other.load_state_dict(layer.state_dict())
    assert same_state(layer, other)
    assert other.fingerprint == layer.fingerprint
    assert torch.equal(layer.weight, other.weight)
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")


@settings(max_examples=60, deadline=None)
@given(
    row=st.integers(0, 3),
    column=st.integers(0, 7),
    factor=st.sampled_from([0.0, -1.0, 0.5, 0.9, 0.99, 0.9999, 1.0, 1.0001, 1.01, 1.1, 10.0]),
    downcast=st.sampled_from(DOWNCASTS),
    symmetric=st.booleans(),
)
def test_fingerprint_changes_exactly_when_the_state_does(row, column, factor, downcast, symmetric):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    changed = weight.clone()
    changed[row, column] *= factor
    one, two = (make_layer(w, downcast=downcast, symmetric=symmetric) for w in (weight, changed))
    assert (one.fingerprint == two.fingerprint) == same_state(one, two)


def test_fingerprint_depends_on_every_stored_bit_and_on_the_format():
    layer = make_layer(torch.randn(4, 8), symmetric=False, group_size=4)
    made = layer.fingerprint
    for tensor in state(layer):
        flat = tensor.detach().view(torch.uint8).view(-1)
        for i in range(len(flat)):
            flat[i] ^= 1
            assert layer._fingerprint() != made
            flat[i] ^= 1
    assert layer._fingerprint() == made
    weight = torch.zeros(4, 8)
    layers = [
        make_layer(weight, bits=b, downcast=d) for b in (2, 3, 4) for d in ("fixed8", "int", "fp32")
    ]
    assert len({layer.fingerprint for layer in layers}) == len(layers)
    assert all(0 <= layer.fingerprint < 2**63 for layer in layers)


@pytest.mark.parametrize("estimator", ["minmax", "lp"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_base_in_a_wider_dtype_gives_the_same_integers(narrow, estimator):
    weight = torch.randn(6, 16)
    trained = make_layer(weight.to(narrow), estimator=estimator, group_size=8)
    upcast = make_layer(
        weight.to(narrow).float(), estimator=estimator, group_size=8, base_dtype=narrow
    )
    original = make_layer(weight, estimator=estimator, group_size=8, base_dtype=narrow)
    assert trained.fingerprint == upcast.fingerprint == original.fingerprint
    assert same_state(trained, upcast)
    assert same_state(trained, original)
    assert original.dtype == torch.float32
    # Without the rounding, they would be others.
    assert not same_state(trained, make_layer(weight, estimator=estimator, group_size=8))


@pytest.mark.parametrize("estimator", ["minmax", "lp"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_all_zero_rows_stay_zero(downcast, symmetric, estimator):
    weight = torch.randn(4, 8)
    weight[1] = 0
    for scale_dtype in ("float32", "bfloat16", "float16"):
        layer = make_layer(
            weight,
            downcast=downcast,
            symmetric=symmetric,
            estimator=estimator,
            scale_dtype=scale_dtype,
        )
        assert (layer.scale0 > 0).all()
        assert torch.isfinite(layer.scale0).all()
        assert torch.equal(layer.stored_weight()[1], torch.zeros(8))
        assert layer.stored_weight()[0].abs().sum() > 0


@pytest.mark.parametrize("estimator", ["minmax", "lp"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 70_000)], ids=str)
def test_shapes_at_the_edge(shape, symmetric, estimator):
    weight = torch.randn(shape)
    for name in DOWNCASTS if estimator == "minmax" else ("int",):
        layer = make_layer(weight, downcast=name, bits=3, symmetric=symmetric, estimator=estimator)
        assert layer.phi.shape == (shape[0], layer.format.row_elements)
        restored = layer.stored_weight()
        assert restored.shape == shape
        assert torch.isfinite(restored).all()
        if shape[1] == 1 and symmetric:
            # One weight is its own largest: it lies on the last grid point, up to the rounding of
            # the scale to bfloat16.
            torch.testing.assert_close(restored, weight, rtol=2**-8, atol=0)
        assert layer(torch.randn(2, shape[1])).shape == (2, shape[0])


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight = torch.randn(13, 40)
    whole = [
        make_layer(weight, downcast=d, estimator="lp", group_size=8, symmetric=False)
        for d in DOWNCASTS
    ]
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    parts = [
        make_layer(weight, downcast=d, estimator="lp", group_size=8, symmetric=False)
        for d in DOWNCASTS
    ]
    assert all(map(same_state, whole, parts))
    assert all(
        torch.equal(one.stored_weight(), two.stored_weight())
        for one, two in zip(whole, parts, strict=True)
    )


def test_real_tensors_where_peft_builds_on_meta():
    weight = torch.randn(6, 16)
    outside = make_layer(weight, symmetric=False)
    linear = nn.Linear(16, 6, bias=False)
    linear.weight = nn.Parameter(weight)
    with init_empty_weights():
        inside = DowncastLinear.from_linear(
            linear,
            make_format(16, symmetric=False),
            estimator="minmax",
            p=4.0,
            base_dtype=torch.float32,
        )
        assert nn.Linear(2, 2).weight.is_meta
    assert same_state(outside, inside)
    assert inside.fingerprint == outside.fingerprint


@pytest.mark.parametrize(
    ("symmetric", "p"), [(True, 4.0), (False, 2.4)], ids=["symmetric", "asymmetric"]
)
def test_number_of_threads_changes_nothing(symmetric, p):
    # Rows above the 32768 elements from which torch splits the work.
    weight = torch.randn(1, 36_000)
    layers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            layers.append(make_layer(weight, estimator="lp", p=p, symmetric=symmetric, bits=3))
        finally:
            torch.set_num_threads(1)
    assert same_state(*layers)
    assert layers[0].fingerprint == layers[1].fingerprint


def test_scale0_is_what_the_estimator_says():
    weight = torch.randn(6, 16)
    layer = make_layer(weight, estimator="lp", group_size=8, symmetric=False)
    scale, zero_point = estimate_range(
        weight, layer.format.grid, estimator="lp", scale_dtype="bfloat16", p=4.0
    )
    assert torch.equal(layer.scale0, scale)
    assert torch.equal(layer.zero_point, zero_point)
    assert torch.equal(layer.scale0, layer.scale0.bfloat16().float())
