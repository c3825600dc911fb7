"""The layers against PEFT's LoRA with the expanded factors: forward, merging and DoRA.

What they must not change stays the same.
"""

import copy

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat.loraquant import LoRAQuantConfig, LoRAQuantEmbedding, LoRAQuantLinear
from peft_lrqat.loraquant import layer as layer_module


pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")

TARGETS = ["embedding", "linear", "conv1d", "narrow"]
# Two products of K terms each and another order of summation: a few roundings of values around 1.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-6}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.linear = nn.Linear(16, 9)
        self.conv1d = Conv1D(13, 9)
        self.narrow = nn.Linear(13, 1, bias=False)

    def forward(self, ids):
        hidden = self.linear(self.embedding(ids))
        return self.narrow(self.conv1d(hidden)) + hidden.mean()


@pytest.fixture
def net():
    model = Net()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(0, 11, (3, 5))


@pytest.fixture
def make_pair(make_adapter):
    """Makes a copy of ``net`` with the packed adapter, and one with its twin in LoRA.

    ``make_pair(net, bits, **fields)``
    """

    def make(net, bits, targets=TARGETS, **fields):
        config, state, lora, twin = make_adapter(net, bits, targets, **fields)
        models = []
        for kind, tensors in ((config, state), (lora, twin)):
            model = get_peft_model(copy.deepcopy(net), kind)
            assert not set_peft_model_state_dict(model, tensors).unexpected_keys
            models.append(model.eval())
        return models

    return make


def same(x, y, dtype=torch.float32):
    torch.testing.assert_close(x, y, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_forward_is_that_of_lora_with_the_expanded_factors(
    bits, dtype, use_dora, net, ids, make_pair
):
    packed, lora = make_pair(net.to(dtype), bits, use_dora=use_dora, r=8, lora_alpha=5)
    for name in TARGETS:
        x = (
            ids
            if name == "embedding"
            else torch.randn(3, 5, getattr(packed, name).in_features, dtype=dtype)
        )
        y, expected, base = (getattr(m, name)(x) for m in (packed, lora, net))
        assert y.dtype == dtype
        same(y, expected, dtype)
        assert torch.equal(y, base) == (bits == "" and not use_dora)


@pytest.mark.parametrize("zero_points", [False, True], ids=["mid-rise", "zero-points"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
@torch.no_grad()
def test_grids_and_scales(scale_dtype, zero_points, net, ids, make_pair):
    packed, lora = make_pair(net, "4321", scale_dtype=scale_dtype, zero_points=zero_points)
    same(packed(ids), lora(ids))
    assert ("default" in packed.linear.loraquant_zero_points) == zero_points


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 32},
        {"r": 16, "lora_alpha": 3, "use_rslora": True},
        {"r": 4, "rank_pattern": {"linear": 16}, "alpha_pattern": {"conv.*": 100, "linear": 1}},
        {"r": 4, "lora_alpha": -8},
    ],
    ids=["plain", "rslora", "patterns", "negative"],
)
@torch.no_grad()
def test_scaling(fields, net, ids, make_pair):
    packed, lora = make_pair(net, "2211", **fields)
    same(packed(ids), lora(ids))


@torch.no_grad()
def test_the_product_of_a_layer_by_hand(net, make_pair):
    packed, _ = make_pair(net, "4321", r=4, lora_alpha=6)
    x = torch.randn(7, 16)
    B, A = packed.linear.factors("default")
    same(packed.linear(x), net.linear(x) + 1.5 * x @ A.T @ B.T)
    assert torch.equal(packed.linear.get_delta_weight("default"), B @ A * 1.5)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merged_weights_are_those_of_lora(dtype, use_dora, safe_merge, bits, net, make_pair):
    packed, lora = make_pair(net.to(dtype), bits, use_dora=use_dora)
    for model in (packed, lora):
        model.merge_adapter(safe_merge=safe_merge)
    for name in TARGETS:
        weight, expected = (
            getattr(model, name).get_base_layer().weight for model in (packed, lora)
        )
        assert weight.dtype == dtype
        assert weight.is_contiguous()
        same(weight, expected, dtype)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_merging_changes_the_weight_and_not_the_output(use_dora, net, ids, make_pair):
    packed, _ = make_pair(net, "4321", use_dora=use_dora)
    before = packed(ids)
    packed.merge_adapter()
    assert not torch.equal(packed.linear.base_layer.weight, net.linear.weight)
    same(packed(ids), before)
    with packed.disable_adapter():
        same(packed(ids), net(ids))  # takes the adapter out for good, as LoRA does
    assert not packed.linear.merged
    same(packed(ids), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        packed.linear.unmerge()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_two_adapters_are_summed_and_merged_as_loras(use_dora, net, ids, make_adapter):
    models: list = [None, None]
    for adapter, bits in (("one", "4321"), ("two", "3311")):
        config, state, lora, twin = make_adapter(net, bits, TARGETS, use_dora=use_dora)
        for i, (kind, tensors) in enumerate(((config, state), (lora, twin))):
            if models[i] is None:
                models[i] = get_peft_model(copy.deepcopy(net), kind, adapter_name=adapter)
            else:
                models[i].add_adapter(adapter, kind)
            set_peft_model_state_dict(models[i], tensors, adapter_name=adapter)
    packed, lora = (model.eval() for model in models)
    for model in models:
        model.base_model.set_adapter(["one", "two"])
    same(packed(ids), lora(ids))
    alone = packed(ids)
    for model in models:
        model.merge_adapter(["one"])
        with pytest.warns(UserWarning, match="additionally merging two"):
            model.merge_adapter(["two"])
    for name in TARGETS:
        same(*(getattr(model, name).get_base_layer().weight for model in models))
    same(packed(ids), alone)
    packed.unmerge_adapter()
    same(packed(ids), alone)
    same(packed.linear.base_layer.weight, net.linear.weight)


@torch.no_grad()
def test_safe_merging_refuses_what_is_not_finite(net, make_pair):
    packed, _ = make_pair(net, "2")
    packed.linear.base_layer.weight[0, 0] = torch.inf
    before = packed.linear.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        packed.linear.merge(safe_merge=True)
    assert torch.equal(packed.linear.base_layer.weight, before)
    assert not packed.linear.merged


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.half)]
)
@torch.no_grad()
def test_conversions_change_no_stored_tensor(convert, net, make_pair):
    packed, _ = make_pair(net, "4321", use_dora=True, scale_dtype="float32", zero_points=True)
    before = {
        name: tensor.clone()
        for name, tensor in packed.state_dict().items()
        if ".loraquant_" in name
    }
    B, A = packed.linear.factors("default")
    convert(packed)
    after = {name: tensor for name, tensor in packed.state_dict().items() if ".loraquant_" in name}
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    assert packed.linear.base_layer.weight.dtype == convert(nn.Linear(1, 1)).weight.dtype
    assert all(torch.equal(x, y) for x, y in zip(packed.linear.factors("default"), (B, A)))


@torch.no_grad()
def test_autocast_gives_what_it_gives_lora(net, make_pair):
    packed, lora = make_pair(net, "4321")
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = packed.linear(x), lora.linear(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    same(y, expected, torch.bfloat16)


@torch.no_grad()
def test_mixed_batch_gives_every_row_its_adapter(net, make_adapter):
    model = None
    for adapter, bits, use_dora in (
        ("one", "4321", False),
        ("two", "3311", True),
        ("three", "", False),
    ):
        config, state, *_ = make_adapter(net, bits, TARGETS, use_dora=use_dora)
        if model is None:
            model = get_peft_model(copy.deepcopy(net), config, adapter_name=adapter).eval()
        else:
            model.add_adapter(adapter, config)
        set_peft_model_state_dict(model, state, adapter_name=adapter)
    names = ["two", "__base__", "one", "three", "one"]
    for target in TARGETS:
        layer = getattr(model, target)
        x = (
            torch.randint(0, 11, (5, 4))
            if target == "embedding"
            else torch.randn(5, 4, layer.in_features)
        )
        y = layer(x, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                expected = getattr(net, target)(x[row : row + 1])
            else:
                layer.set_adapter(name)
                expected = layer(x[row : row + 1])
            same(y[row : row + 1], expected)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=names[1:])
    layer.merge(adapter_names=["one"])
    with pytest.raises(ValueError, match="when there are merged adapters"):
        layer(x, adapter_names=names)


@torch.no_grad()
def test_factors_are_kept_until_something_changes(net, make_pair):
    packed, _ = make_pair(net, "4321")
    layer = packed.linear
    factors = layer.factors("default")
    assert layer.factors("default")[0] is factors[0]
    assert layer.factors("default", torch.float64)[0].dtype == torch.float64
    for change in (
        lambda: packed.load_state_dict(packed.state_dict()),
        lambda: packed.half(),
        lambda: packed.set_cache_limit(2**20),
    ):
        factors = layer.factors("default")
        change()
        assert layer.factors("default")[0] is not factors[0]
    assert layer.factors("default")[0] is layer.factors("default")[0]
    packed.set_cache_limit(0)
    assert layer.factors("default")[0] is not layer.factors("default")[0]
    packed.set_cache_limit(2**20)
    layer.factors("default")
    packed.delete_adapter("default")
    assert packed.linear._cache.bytes == 0


@torch.no_grad()
def test_new_values_are_seen(net, ids, make_adapter, make_pair):
    packed, _ = make_pair(net, "22")
    _, state, lora, twin = make_adapter(net, "22", TARGETS)
    packed(ids)
    set_peft_model_state_dict(packed, state)
    lora = get_peft_model(copy.deepcopy(net), lora).eval()
    set_peft_model_state_dict(lora, twin)
    same(packed(ids), lora(ids))


def test_factors_made_in_inference_mode_serve_for_gradients(net, make_pair):
    packed, lora = make_pair(net, "4321", use_dora=True)
    x = torch.randn(3, 16)
    with torch.inference_mode():
        packed.linear(x)
    gradients = []
    for model in (packed, lora):
        inputs = x.clone().requires_grad_()
        model.linear(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    same(*gradients)


def test_copies_act_the_same(net, ids, make_pair):
    packed, _ = make_pair(net, "4321")
    duplicate = copy.deepcopy(packed)
    assert torch.equal(duplicate(ids), packed(ids))
    duplicate.delete_adapter("default")
    assert torch.equal(duplicate.base_model.model(ids), net(ids))
    assert not torch.equal(packed(ids), net(ids))


def test_what_was_not_loaded_is_not_run(net, ids, make_adapter):
    config, *_ = make_adapter(net, "4321", TARGETS, use_dora=True)
    model = get_peft_model(net, config)
    with pytest.raises(ValueError, match=r"`embedding`: the magnitude must be 16 finite numbers"):
        model(ids)
    config.use_dora = False
    model = get_peft_model(Net(), config)
    with pytest.raises(
        ValueError,
        match=r"`embedding`: scales must be finite and not negative, but \d+ of \d+ are NaN",
    ):
        model(ids)


def test_nothing_is_trainable(net, make_pair):
    packed, _ = make_pair(net, "2")
    packed.set_adapter("default")
    packed.train()
    packed.enable_adapter_layers()
    assert not any(p.requires_grad for p in packed.parameters())


def test_kinds_of_layers(net, make_pair):
    packed, _ = make_pair(net, "2")
    assert isinstance(packed.embedding, LoRAQuantEmbedding)
    assert all(isinstance(getattr(packed, name), LoRAQuantLinear) for name in TARGETS[1:])
    assert repr(packed.linear).startswith("loraquant.LoRAQuantLinear(")
    assert packed.linear.weight is packed.linear.base_layer.weight
    assert packed.linear._get_available_adapters() == {"default"}


@torch.no_grad()
def test_an_embedding_that_is_multiplied_by_a_constant(net, ids, make_adapter):
    class Scaled(nn.Embedding):
        embed_scale = 4.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    net.embedding = Scaled(11, 16)
    for use_dora in (False, True):
        config, state, lora, twin = make_adapter(net, "4321", ["embedding"], use_dora=use_dora)
        outputs = []
        for kind, tensors in ((config, state), (lora, twin)):
            model = get_peft_model(copy.deepcopy(net), kind).eval()
            set_peft_model_state_dict(model, tensors)
            outputs.append(model.embedding(ids))
        same(*outputs)


class ByteLinear(nn.Linear):
    """A quantised layer as a library could make it: 8-bit codes, one scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.scale = linear.weight.detach().abs().max() / 127
        self.set(linear.weight.detach())

    def set(self, weight):
        self.weight = nn.Parameter(
            (weight / self.scale).round().clamp(-127, 127).to(torch.int8), requires_grad=False
        )

    def dequantize(self):
        return self.weight.float() * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)


class ByteBackend(QuantizationBackend):
    supports_merge, backend_name, layer_type = True, "bytes", "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().set(weight_data)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_quantised_base(use_dora, net, make_adapter, monkeypatch):
    backend = ByteBackend()
    monkeypatch.setattr(layer_module, "resolve_quantization_backend", lambda *_, **__: backend)
    config, state, *_ = make_adapter(net, "4321", ["linear"], use_dora=use_dora)
    net.linear = ByteLinear(net.linear)
    model = get_peft_model(copy.deepcopy(net), config).eval()
    set_peft_model_state_dict(model, state)
    x, codes = torch.randn(3, 16), net.linear.weight.clone()
    plain = nn.Linear(16, 9)
    plain.weight.copy_(net.linear.dequantize() + model.linear.get_delta_weight("default"))
    plain.bias.copy_(net.linear.bias)
    if use_dora:
        norm = plain.weight.norm(dim=1)
        plain.weight.mul_((state["base_model.model.linear.loraquant_magnitude"] / norm)[:, None])
    same(model.linear(x), plain(x))
    model.merge_adapter()
    assert model.linear.base_layer.weight.dtype == torch.int8
    assert (
        ((model.linear.get_base_weight() - plain.weight).abs() <= 0.5001 * net.linear.scale)
        .logical_or(
            plain.weight.abs() > 127 * net.linear.scale  # what the base's grid does not reach
        )
        .all()
    )
    backend.supports_merge = False
    model = get_peft_model(copy.deepcopy(net), config)
    set_peft_model_state_dict(model, state)
    with pytest.raises(
        ValueError, match="`linear` is quantised by bytes, whose weight cannot be changed"
    ):
        model.merge_adapter()
    assert torch.equal(model.linear.base_layer.weight, codes)


@torch.no_grad()
def test_a_weight_that_nobody_can_read_is_not_merged(net, make_adapter):
    config, state, *_ = make_adapter(net, "4321", ["linear"])
    net.linear = ByteLinear(net.linear)
    expected = net.linear(torch.ones(1, 16))
    model = get_peft_model(net, config).eval()
    set_peft_model_state_dict(model, state)
    assert not torch.equal(model.linear(torch.ones(1, 16)), expected)
    with pytest.raises(
        TypeError, match=r"the weight of `linear` as numbers, but it is torch\.int8"
    ):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning")
@torch.no_grad()
def test_compiled_layer_gives_the_same(net, make_pair):
    packed, _ = make_pair(net, "4321")
    x = torch.randn(3, 16)
    expected = packed.linear(x)
    for limit in (2**20, 0):
        packed.set_cache_limit(limit)
        torch.compiler.reset()
        same(torch.compile(packed.linear, backend="aot_eager", fullgraph=True)(x), expected)


def test_config_says_how_an_adapter_is_made(net):
    with pytest.raises(ValueError, match="quantize_adapter"):
        get_peft_model(net, LoRAQuantConfig(target_modules=["linear"]))
    assert type(net.linear) is nn.Linear
