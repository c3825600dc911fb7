"""Owners that do more with a layer than call it: read its weight, write into its output."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lrqat import LRQATConfig
from peft_lrqat.base.read_weight import ReadWeight


SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {"r": 4, "range_estimator": "minmax"}


class Reads(nn.Module):
    """Multiplies with the weight of a layer that it never calls."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.inner = nn.Linear(8, 12, bias=False) if kind is nn.Linear else kind(12, 8)
        self.transposed = kind is not nn.Linear

    def forward(self, x):
        weight = self.inner.weight
        return x @ (weight if self.transposed else weight.t())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", [nn.Linear, transformers.pytorch_utils.Conv1D])
def test_a_weight_that_is_read_acts_as_one_that_is_called(kind, bits):
    torch.manual_seed(0)
    config = LRQATConfig(target_modules=["inner"], bits=bits, init_weights=False, **SMALL)
    model = get_peft_model(nn.Sequential(Reads(kind)), config)
    layer = model.get_submodule("base_model.model.0.inner")
    x, upstream = torch.randn(5, 8), torch.randn(5, 12)
    found = []
    for run in (model, layer):
        y = run(x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append([y, *torch.autograd.grad(y, parameters, upstream)])
    for read, called in zip(*found, strict=True):
        torch.testing.assert_close(read, called, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        before = model.eval()(x)
        assert torch.equal(model.merge_and_unload()(x), before)


def test_wavlm_trains_and_merges():
    sizes = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4)}
    base = transformers.WavLMModel(
        transformers.WavLMConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            layerdrop=0.0,
            **sizes,
        )
    )
    config = LRQATConfig(target_modules="all-linear", bits=3, init_weights=False, **SMALL)
    model, audio = get_peft_model(base, config).eval(), torch.randn(2, 400)
    model(input_values=audio).last_hidden_state.pow(2).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.any() for grad in trained.values())
    with torch.no_grad():
        before = model(input_values=audio).last_hidden_state
        after = model.merge_and_unload().eval()(input_values=audio).last_hidden_state
    assert torch.equal(before, after)


class Large(TorchDispatchMode):
    """Notes float tensors of at least ``size`` entries."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.found += [tensor.shape] if tensor.numel() >= self.size else []
        return result


def test_asking_for_the_dtype_makes_no_weight(make_peft, lrqat_layers):
    layer = next(iter(lrqat_layers(make_peft()).values()))
    for owner in (layer, layer.base_layer):
        with Large(32 * 32) as large:
            weight = owner.weight
            assert isinstance(weight, torch.Tensor)
            assert (weight.dtype, weight.shape) == (torch.float32, (32, 32))
            assert (weight.device.type, weight.dim(), weight.size(0)) == ("cpu", 2, 32)
        assert not large.found
    assert type(layer.weight) is ReadWeight
    assert torch.equal(layer.base_layer.weight, layer.base_layer.stored_weight())
    assert torch.equal(copy.deepcopy(layer.base_layer.weight), layer.base_layer.stored_weight())


class Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Adapted(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x) + self.extra


def test_subclasses_that_compute_the_same_product_work():
    model = nn.Sequential(Same(8, 12))
    config = LRQATConfig(target_modules=["0"], init_weights=False, **SMALL)
    model, x = get_peft_model(model, config).eval(), torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model.merge_and_unload()(x), before)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "does not compute `x @ weight.T"),
        (Adapted, r"more than a weight and a bias \(\['bias', 'extra', 'weight'\]\)"),
        (nn.Bilinear, "LR-QAT works on torch.nn.Linear"),
    ],
)
def test_others_are_refused_for_the_true_reason(kind, reason):
    model = nn.Sequential(kind(8, 12, 4) if kind is nn.Bilinear else kind(8, 12))
    with pytest.raises(TypeError, match=reason):
        get_peft_model(model, LRQATConfig(target_modules=["0"], **SMALL))
    assert type(model[0]) is kind


def test_falcon_merges():
    base = transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES)).eval()
    config = LRQATConfig(target_modules="all-linear", init_weights=False, **SMALL)
    model, ids = get_peft_model(base, config).eval(), torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert torch.equal(model.merge_and_unload().eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 2, 3, 8), (0, 8)], ids=str)
def test_a_caller_may_write_into_the_output(shape, bias, activation_bits):
    """As after nn.Linear, also through views, and with the gradients that belong to it."""
    config = LRQATConfig(
        target_modules=["0"], init_weights=False, activation_bits=activation_bits, **SMALL
    )
    model = get_peft_model(nn.Sequential(nn.Linear(8, 12, bias=bias)), config)
    x = torch.randn(shape, requires_grad=True)
    found = []
    for write in (True, False):
        y = model(x)
        assert not y._is_view()
        parts = y.unflatten(-1, (2, 6)).transpose(-2, -3 if y.dim() > 2 else -2)
        if write:
            parts += 1
            parts *= 2
        else:
            parts = (parts + 1) * 2
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(parts.square().sum(), [x, *parameters]))
    for one, other in zip(*found, strict=True):
        # The gradient of the scales comes from G, once the output was written into.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_deberta_trains():
    base = transformers.DebertaForSequenceClassification(
        transformers.DebertaConfig(  # type: ignore[call-arg]  # a setting of all configs
            **SIZES,
            intermediate_size=64,
            max_position_embeddings=64,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            num_labels=3,
        )
    )
    config = LRQATConfig(target_modules="all-linear", task_type="SEQ_CLS", **SMALL)
    model = get_peft_model(base, config).train()
    ids, labels = torch.randint(3, 90, (2, 12)), torch.tensor([0, 1])
    model(input_ids=ids, labels=labels).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lrqat_B" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_factors_are_float32_whatever_the_default_dtype(dtype, make_base, make_config, logits_of):
    wanted = get_peft_model(make_base(), make_config())
    base = make_base()
    torch.set_default_dtype(dtype)
    try:
        model = get_peft_model(base, make_config())
        found = logits_of(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(found, logits_of(wanted))


FIELDS = {
    "weights": {},
    "groups": {"symmetric": False, "group_size": 16},
    "activations": {"activation_bits": 8, "kv_cache_bits": 4},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])
def test_compiling_breaks_no_graph(fields, loaded, make_base, make_peft, batch_for, tmp_path):
    from peft import PeftModel

    model = make_peft(**fields)
    if loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    batch = batch_for()
    torch._dynamo.reset()
    counters.clear()
    torch.compile(model.train(), backend="eager")(**batch)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_compiled_alone_blocks_share_their_graph_as_with_lora(make_base, make_config, batch_for):
    graphs = []
    for config in (LoraConfig(target_modules="all-linear"), make_config()):
        model = get_peft_model(make_base(), config).train()
        torch._dynamo.reset()
        counters.clear()
        for block in model.get_base_model().model.layers:
            block.compile(backend="eager")
        model(**batch_for())
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[1] <= graphs[0]
