"""One LR-QAT layer and its adapters: rounding at the start, exact merging, one set of integers."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LRQATConfig, LRQATLinear
from peft_lrqat.lrqat import layer as layer_module
from peft_lrqat.quant import DOWNCASTS, effective_scale, held, quantized_weight
from peft_lrqat.shared.tensor_cache import TensorCache


FORMATS = {
    "default": {},
    "int-grouped": {"downcast": "int", "bits": 3, "group_size": 8},
    "asymmetric": {"bits": 2, "symmetric": False, "group_size": 16, "scale_dtype": "float16"},
    "float": {"downcast": "bf16", "scale_dtype": "float32"},
}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def format(request):
    return request.param


def make_layer(
    in_features=16, out_features=6, dtype=torch.float32, bias=True, cache=None, **fields
):
    config = LRQATConfig(**{"r": 4, "range_estimator": "minmax", **fields})
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return LRQATLinear(
        linear, "default", config.weight_format("layer", in_features), config, cache=cache
    )


def linear_weights(model):
    """Returns the (out, in) weights of the plain linear layers, by name."""
    kinds = nn.Linear | Conv1D
    modules = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    return {
        name: (m.weight.T if isinstance(m, Conv1D) else m.weight) for name, m in modules.items()
    }


def round_to_nearest(weight, bits, group_size, downcast):
    """Quantises by hand on a symmetric grid; returns weight and codes.

    The scale is the smallest that covers the group, rounded to bfloat16.
    """
    groups = weight.float().unflatten(1, (weight.shape[1] // group_size, group_size))
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / qmax).bfloat16().float()
    phi = (groups / scale).clamp(qmin, qmax)
    if downcast == "fixed8":
        phi = (phi * 2 ** (8 - bits)).round() / 2 ** (8 - bits)
    codes = phi.round()
    return (codes * scale).flatten(1).to(weight.dtype), codes.flatten(1)


@pytest.mark.parametrize("downcast", ["fixed8", "int"])
def test_fresh_adapter_is_round_to_nearest(
    architecture, dtype, downcast, make_base, make_config, lrqat_layers, logits_of
):
    bits, group_size = 3, 8
    by_hand, model = make_base(architecture, dtype), make_base(architecture, dtype)
    model = get_peft_model(
        model, make_config(architecture, bits=bits, group_size=group_size, downcast=downcast)
    ).eval()
    weights = linear_weights(by_hand)
    layers = {
        name.removeprefix("base_model.model."): layer for name, layer in lrqat_layers(model).items()
    }
    assert set(weights) - set(layers) <= {"lm_head", "score"}
    with torch.no_grad():
        for name, layer in layers.items():
            weight, codes = round_to_nearest(weights[name], bits, group_size, downcast)
            assert torch.equal(layer.quantized_codes(), codes.to(torch.int8))
            assert torch.equal(layer._merged_weight("default", False), weight)
            read = layer.weight.T if layer.base_layer.is_conv1d else layer.weight
            assert torch.equal(read, weight)
            weights[name].copy_(weight)
    wanted, found = logits_of(by_hand, architecture), logits_of(model, architecture)
    if (
        architecture == "gpt2"
    ):  # Conv1D's own weight lies the other way round in memory and is summed in another order
        torch.testing.assert_close(found, wanted)
    else:
        assert torch.equal(found, wanted)


def test_fresh_adapter_with_lp_range_rounds_to_nearest(make_base, make_config, lrqat_layers):
    base = make_base()
    model = get_peft_model(make_base(), make_config(range_estimator="lp", downcast="int"))
    for name, layer in lrqat_layers(model).items():
        weight = linear_weights(base)[name.removeprefix("base_model.model.")]
        codes = (weight / layer.base_layer.scale0).round().clamp(-8, 7)
        assert torch.equal(layer.quantized_codes(), codes.to(torch.int8))
        # The search never ends with a wider grid than the one that covers every weight.
        assert (
            layer.base_layer.scale0 <= weight.abs().amax(1, keepdim=True) / 7 * (1 + 2**-8)
        ).all()


def expected_weight(layer):
    """Returns scale * (codes - zero point), from what ships."""
    base = layer.base_layer
    step = effective_scale(layer.lrqat_scale["default"].detach(), base.format.scale_dtype)
    codes = layer.quantized_codes().float()
    if base.zero_point is not None:
        codes -= base.format.grid.expand(base.zero_point.float(), layer.in_features)
    return (codes * base.format.grid.expand(step, layer.in_features)).to(base.dtype)


def test_merged_is_trained_bit_for_bit(
    architecture, dtype, make_peft, disturb, lrqat_layers, logits_of
):
    model = disturb(make_peft(architecture, dtype))
    trained = logits_of(model, architecture)
    expected = {name: expected_weight(layer) for name, layer in lrqat_layers(model).items()}
    phi = {name: layer.base_layer.phi.clone() for name, layer in lrqat_layers(model).items()}

    model.merge_adapter()
    for name, layer in lrqat_layers(model).items():
        merged = (
            layer.base_layer.weight.T if layer.base_layer.is_conv1d else layer.base_layer.weight
        )
        assert torch.equal(merged, expected[name])
    assert torch.equal(logits_of(model, architecture), trained)

    model.unmerge_adapter()
    assert all(
        torch.equal(layer.base_layer.phi, phi[name]) for name, layer in lrqat_layers(model).items()
    )
    assert torch.equal(logits_of(model, architecture), trained)

    plain = model.merge_and_unload()
    weights = linear_weights(plain)
    for name, weight in expected.items():
        assert torch.equal(weights[name.removeprefix("base_model.model.")], weight)
    assert not lrqat_layers(plain)
    assert not any("lrqat" in name or "base_layer" in name for name in plain.state_dict())
    assert torch.equal(logits_of(plain, architecture), trained)


def test_merged_is_trained_in_every_format(
    format, dtype, make_peft, disturb, lrqat_layers, logits_of
):
    model = disturb(make_peft(dtype=dtype, **format))
    trained = logits_of(model)
    layers = {
        name.removeprefix("base_model.model."): layer for name, layer in lrqat_layers(model).items()
    }
    expected = {name: expected_weight(layer) for name, layer in layers.items()}
    grids = {name: layer.base_layer.format.grid for name, layer in layers.items()}
    codes = {name: layer.quantized_codes() for name, layer in layers.items()}
    plain = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits_of(plain), trained)
    for name, weight in linear_weights(plain).items():
        if name in expected:
            assert torch.equal(weight, expected[name])
            assert weight.dtype == dtype
            assert grids[name].qmin <= codes[name].min()
            assert codes[name].max() <= grids[name].qmax
            distinct = [len(group.unique()) for group in grids[name].split(weight).flatten(0, 1)]
            assert max(distinct) <= 2 ** grids[name].bits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_merged_is_trained_under_autocast(
    architecture, make_peft, disturb, lrqat_layers, logits_of
):
    """Integers come from float32 under autocast, too; only the product with x is bfloat16."""
    model = disturb(make_peft(architecture))
    codes = {name: layer.quantized_codes() for name, layer in lrqat_layers(model).items()}
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits_of(model, architecture)
        assert all(
            torch.equal(layer.quantized_codes(), codes[name])
            for name, layer in lrqat_layers(model).items()
        )
        model.merge_adapter()
        assert torch.equal(logits_of(model, architecture), trained)
        model.unmerge_adapter()
        assert torch.equal(logits_of(model, architecture), trained)
        plain = model.merge_and_unload()
        assert torch.equal(logits_of(plain, architecture), trained)


def test_autocast_changes_the_dtype_of_the_result_as_in_a_linear():
    layer, x = make_layer(), torch.randn(3, 16)
    linear = nn.Linear(16, 6)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            wanted = linear(x).dtype
            assert layer(x).dtype == layer.base_layer(x).dtype == wanted
            layer.merge()
            assert layer(x).dtype == wanted
            layer.unmerge()


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_input_of_another_dtype_gives_the_result_in_it(dtype, input_dtype):
    layer, x = make_layer(dtype=dtype), torch.randn(3, 16).to(input_dtype)
    y = layer(x)
    assert y.dtype == input_dtype
    layer.merge()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_merging_there_and_back_leaves_no_trace(downcast):
    layer = make_layer(downcast=downcast)
    with torch.no_grad():
        layer.lrqat_B["default"].normal_()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 16)
    y = layer(x)
    for _ in range(3):
        layer.merge(safe_merge=True)
        assert layer.merged
        assert layer.merged_adapters == ["default"]
        layer.unmerge()
        assert not layer.merged
    after = layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(layer(x), y)
    assert layer.base_layer.merged_weight is None


def test_merging_twice_and_unmerging_twice_only_warns():
    layer = make_layer()
    layer.merge()
    with pytest.warns(UserWarning, match="already"):
        layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_safe_merge_refuses_a_broken_adapter():
    layer = make_layer(scale_dtype="float32")
    with torch.no_grad():
        layer.lrqat_scale["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="merged weight of adapter `default` is not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_factors_move_integers_as_the_equation_says(format):
    config = LRQATConfig(r=4, lora_alpha=2, range_estimator="minmax", **format)
    layer = LRQATLinear(nn.Linear(16, 6), "default", config.weight_format("layer", 16), config)
    with torch.no_grad():
        layer.lrqat_B["default"].normal_(std=10)
    base, grid = layer.base_layer, layer.base_layer.format.grid
    z = base.format.decode(base.phi) + 0.5 * (layer.lrqat_B["default"] @ layer.lrqat_A["default"])
    codes = layer.quantized_codes()
    clipped = z.clamp(grid.qmin, grid.qmax)
    # Nearest integer, up to the rounding of the product.
    assert ((codes.float() - clipped).abs() <= 0.5 + 1e-5).all()
    assert codes.dtype == (torch.int8 if grid.symmetric else torch.uint8)
    assert len(codes.unique()) > 2


@pytest.mark.parametrize("lora_alpha", [1, 8])
def test_random_factors_move_by_about_one_step(lora_alpha):
    layer = make_layer(
        in_features=256, out_features=256, r=16, lora_alpha=lora_alpha, init_weights=False
    )
    product = layer.scaling["default"] * layer.lrqat_B["default"] @ layer.lrqat_A["default"]
    assert 0.9 < product.std() < 1.1
    fresh = make_layer(in_features=256, out_features=256, r=16, lora_alpha=lora_alpha)
    assert not fresh.lrqat_B["default"].any()
    assert torch.equal(fresh.lrqat_scale["default"], fresh.base_layer.scale0)


def test_adapter_is_float32_whatever_the_base(dtype):
    layer = make_layer(dtype=dtype)
    assert {p.dtype for n, p in layer.named_parameters() if n.startswith("lrqat_")} == {
        torch.float32
    }
    layer.cast_adapter("default")
    assert {p.dtype for n, p in layer.named_parameters() if n.startswith("lrqat_")} == {dtype}
    x = torch.randn(2, 16)
    y = layer(x)
    y.sum().backward()
    assert {p.grad.dtype for n, p in layer.named_parameters() if n.startswith("lrqat_")} == {dtype}
    layer.merge()
    assert torch.equal(layer(x), y)


def test_disabled_layer_runs_the_stored_weight(format):
    layer = make_layer(**format)
    with torch.no_grad():
        layer.lrqat_B["default"].normal_(std=3)
    x = torch.randn(2, 16)
    stored = nn.functional.linear(x, layer.base_layer.stored_weight(), layer.base_layer.bias)
    assert not torch.equal(layer(x), stored)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), stored)
    assert not layer.merged
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), stored)


def test_two_active_adapters_are_refused():
    layer = make_layer()
    layer.update_layer("other", LRQATConfig(r=2))
    layer.set_adapter(["default", "other"])
    for call in (lambda: layer(torch.randn(1, 16)), layer.quantized_codes, layer.merge):
        with pytest.raises(
            ValueError, match=r"one set of integers: adapters \['default', 'other'\]"
        ):
            call()
    layer.set_adapter("default")
    layer.merge()
    with pytest.raises(
        ValueError, match=r"adapters \['default', 'other'\] cannot be merged together"
    ):
        layer.merge(adapter_names=["other"])
    assert layer.merged_adapters == ["default"]


def test_codes_need_an_adapter():
    layer = make_layer()
    layer.set_adapter([])
    with pytest.raises(ValueError, match="no adapter of this layer is active; give `adapter_name`"):
        layer.quantized_codes()
    assert layer.quantized_codes("default").shape == (6, 16)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_layers_at_the_edge_train_and_merge(shape, bias):
    layer = make_layer(in_features=shape[1], out_features=shape[0], bias=bias, r=1)
    x = torch.randn(2, 3, shape[1])
    y = layer(x)
    y.square().sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if "lrqat_" in n)
    layer.merge()
    assert torch.equal(layer(x), y)
    assert layer(x[:0]).shape == (0, 3, shape[0])


def test_compiled_layer_is_one_graph(dtype):
    """Forward and backward pass compile without a break."""
    layer, x = (
        make_layer(dtype=dtype, init_weights=False, group_size=8, symmetric=False),
        torch.randn(2, 16, dtype=dtype),
    )
    torch._dynamo.reset()
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
        layer.zero_grad()
    torch._dynamo.reset()
    assert len(results[0]) > 3
    assert all(map(torch.equal, *results))


@pytest.fixture
def made(monkeypatch):
    """Returns a list that grows whenever a layer makes its dense weight for inference."""
    calls = []

    def make(weight):
        calls.append(weight)
        return quantized_weight(weight)

    for module in (layer_module, held):
        monkeypatch.setattr(module, "quantized_weight", make)
    return calls


def infer(layer, x):
    with torch.no_grad():
        return layer(x)


def test_inference_makes_the_weight_once(made, dtype):
    layer = make_layer(dtype=dtype, init_weights=False, cache=TensorCache()).eval()
    x = torch.randn(3, 16, dtype=dtype)
    y = layer(x)
    assert not made
    assert all(torch.equal(infer(layer, x), y) for _ in range(3))
    assert len(made) == 1
    # The weight, and copies of A, B and the scales.
    assert layer.cache.bytes == 6 * 16 * dtype.itemsize + 4 * (4 * 16 + 6 * 4 + 6)


CHANGES = {
    "a step": lambda layer: torch.optim.SGD([layer.lrqat_B["default"]], lr=0.5).step(),
    "an average written through .data": lambda layer: layer.lrqat_A["default"].data.mul_(3),
    "one scale": lambda layer: layer.lrqat_scale["default"].data[0].mul_(2),
    "gamma": lambda layer: layer.scaling.update(default=7.0),
    "another dtype": lambda layer: layer.bfloat16(),
    "a loaded state": lambda layer: layer.load_state_dict(
        make_layer(init_weights=False).state_dict(), strict=False
    ),
    "another frozen weight": lambda layer: layer.load_state_dict(
        {n: t for n, t in make_layer().state_dict().items() if n.startswith("base_layer")},
        strict=False,
    ),
    "another adapter": lambda layer: layer.set_adapter("other"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_weight_reaches_inference(change, made):
    layer, x = (
        make_layer(init_weights=False, verify_base=False, cache=TensorCache()),
        torch.randn(3, 16),
    )
    layer.update_layer("other", LRQATConfig(r=2, init_weights=False))
    layer.eval()
    layer(x).square().sum().backward()
    before = infer(layer, x)
    with torch.no_grad():
        change(layer)
    layer._verified = dict.fromkeys(layer._verified, layer.base_layer.generation)
    after = infer(layer, x)
    assert torch.equal(after, infer(layer, x))
    assert len(made) == 2
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x))


def test_training_and_deleting_let_the_weight_go(made):
    layer, x = make_layer(cache=TensorCache()).eval(), torch.randn(3, 16)
    infer(layer, x)
    assert layer.cache.bytes
    layer(x)
    assert layer.cache.bytes == 0
    infer(layer, x)
    infer(layer.train(), x)
    assert layer.cache.bytes == 0
    infer(layer.eval(), x)
    layer.delete_adapter("default")
    assert layer.cache.bytes == 0


def test_long_inputs_and_full_caches_hold_nothing(made):
    layer = make_layer(cache=TensorCache()).eval()
    infer(layer, torch.randn(layer_module.CACHED_TOKENS + 1, 16))
    assert layer.cache.bytes == 0
    layer.cache.set_limit(100)
    x = torch.randn(1, 16)
    assert torch.equal(infer(layer, x), layer(x))
    assert layer.cache.bytes == 0


def test_copies_start_without_weights(made):
    layer, x = make_layer(cache=TensorCache()).eval(), torch.randn(1, 16)
    infer(layer, x)
    twin = copy.deepcopy(layer)
    assert twin.cache.bytes == 0
    assert torch.equal(infer(twin, x), infer(layer, x))


def test_repr_tells_the_format():
    text = repr(make_layer(bits=3, group_size=8, symmetric=False, downcast="int"))
    assert text.startswith("lrqat.LRQATLinear(")
    assert (
        "in_features=16, out_features=6, bias=True, bits=3, group_size=8, asymmetric, downcast=int"
        in text
    )


def test_clipped_weights_pass_gradients_on_where_the_config_says_so():
    """Each adapter follows its own config; the value of the layer is the same."""
    torch.manual_seed(0)
    layer = make_layer(bits=2, init_weights=False)
    layer.update_layer("other", LRQATConfig(r=4, clipped_gradient="pass_through"))
    own = {name: tensor for name, tensor in layer.state_dict().items() if name.endswith(".default")}
    layer.load_state_dict(
        {name.replace("default", "other"): tensor for name, tensor in own.items()}, strict=False
    )
    x, upstream, found = torch.randn(3, 16), torch.randn(3, 6), {}
    for name in ("default", "other"):
        layer.set_adapter(name)
        y = layer(x)
        found[name] = (
            y,
            *torch.autograd.grad(y, [layer.lrqat_A[name], layer.lrqat_B[name]], upstream),
        )
    assert torch.equal(found["default"][0], found["other"][0])
    scale, A, B = layer.lrqat_scale["other"], layer.lrqat_A["other"], layer.lrqat_B["other"]
    through = (
        layer.scaling["other"] * effective_scale(scale.detach(), "bfloat16") * (upstream.T @ x)
    )
    torch.testing.assert_close(found["other"][1:], (B.detach().T @ through, through @ A.detach().T))
    assert not torch.allclose(found["default"][1], found["other"][1])
