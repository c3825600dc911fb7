"""LR-QAT on the weights of experts: the same as on a linear layer for each expert."""

import copy
import json

import pytest
import torch
import transformers
from mixtures import MIXTURES, SIZES, experts_of, logits_of, make_mixture, tokens
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peft_lrqat import LowBitConfig, LRQATConfig
from peft_lrqat.base.experts import LowBitExperts
from peft_lrqat.cli import main
from peft_lrqat.loraquant import quantize_adapter
from peft_lrqat.lrqat.experts import LRQATExperts
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments
from peft_lrqat.trainer.plan import make_plan


def adapt(model, seed=0, **fields):
    fields = {"target_modules": "all-linear", "target_parameters": "all-experts", "r": 4} | fields
    torch.manual_seed(seed)
    return get_peft_model(model, LRQATConfig(task_type="CAUSAL_LM", **fields))


def disturbed(model, size=0.3, adapter="default"):
    """With factors and scales as if they were trained."""
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if name.endswith(f"lrqat_B.{adapter}"):
            p.data += size * torch.randn(p.shape, generator=generator)
        elif name.endswith(f"lrqat_scale.{adapter}"):
            p.data *= 1 + 0.1 * torch.rand(p.shape, generator=generator)
    return model.eval()


@pytest.fixture(params=MIXTURES)
def mixture(request):
    return make_mixture(request.param)


class OneByOne(nn.Module):
    """A linear layer for each expert."""

    def __init__(self, weights):
        super().__init__()
        self.linears = nn.ModuleList()
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.clone())
            self.linears.append(linear)

    def forward(self, x, counts):
        pairs = zip(self.linears, x.split(counts), strict=True)
        return torch.cat([linear(part) for linear, part in pairs if len(part)])


@pytest.mark.parametrize(
    "grid",
    [
        {"bits": 4},
        {"bits": 2, "symmetric": False, "group_size": 8},
        {"bits": 3, "downcast": "int", "clipped_gradient": "pass_through"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [False, True])
def test_outputs_and_gradients_are_those_of_linear_layers(grid, shared):
    mixture = make_mixture("mixtral", num_hidden_layers=1)
    weight = experts_of(mixture)[0].gate_up_proj.detach().clone()
    model = disturbed(adapt(mixture, experts_share_a=shared, **grid))
    layer = next(m for m in model.modules() if isinstance(m, LRQATExperts))
    settings = {"target_modules": r"linears\.\d", "r": 4, **grid}
    others = get_peft_model(OneByOne(weight), LRQATConfig(**settings))
    height = weight.shape[1]
    for e, other in enumerate(others.base_model.model.linears):
        other.lrqat_A["default"].data = layer.lrqat_A["default"].data[0 if shared else e].clone()
        other.lrqat_B["default"].data = layer.lrqat_B["default"].data[e].clone()
        rows = slice(e * height, (e + 1) * height)
        other.lrqat_scale["default"].data = layer.lrqat_scale["default"].data[rows].clone()
    counts = [3, 0, 1, 4]
    x, other_x = (torch.randn(8, 32, generator=torch.Generator().manual_seed(0)) for _ in "ab")
    y, other_y = layer(x.requires_grad_(), counts), others(other_x.requires_grad_(), counts)
    assert torch.equal(y, other_y)
    push = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(push)
    other_y.backward(push)
    assert torch.equal(x.grad, other_x.grad)
    linears = others.base_model.model.linears
    for kind in ("lrqat_A", "lrqat_B", "lrqat_scale"):
        found = getattr(layer, kind)["default"].grad
        parts = [getattr(linear, kind)["default"].grad for linear in linears]
        parts = [torch.zeros_like(parts[0]) if part is None else part for part in parts]
        if kind == "lrqat_scale":
            assert torch.equal(found, torch.cat(parts))
        elif kind == "lrqat_A" and shared:
            torch.testing.assert_close(found[0], torch.stack(parts).sum(0))
        else:
            assert torch.equal(found, torch.stack(parts))
            assert not found[1].any()  # it got no tokens
            assert all(found[e].any() for e in (0, 2, 3))


def test_merged_saved_and_loaded_it_is_the_same_model(mixture, tmp_path):
    plain, kinds = copy.deepcopy(mixture), [type(e) for e in experts_of(mixture)]
    names = sorted(mixture.state_dict())
    model = disturbed(adapt(mixture))
    trained = logits_of(model)
    assert not torch.equal(trained, logits_of(plain))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded), trained)
    model.merge_adapter()
    # The product with a whole matrix is summed in another order than with one made on the spot.
    torch.testing.assert_close(logits_of(model), trained, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), trained)
    merged = model.merge_and_unload()
    assert [type(e) for e in experts_of(merged)] == kinds
    assert sorted(merged.state_dict()) == names
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(again), logits_of(merged))


def test_the_integers_do_not_depend_on_who_asks(mixture):
    """Forward in training and in evaluation, merging and export: one weight."""
    model = disturbed(adapt(mixture))
    ids = tokens()
    held = [logits_of(model, ids) for _ in range(3)]  # made, held, and used again
    assert torch.equal(held[0], held[1])
    assert torch.equal(held[1], held[2])
    with torch.enable_grad():
        assert torch.equal(model(ids).logits, held[0])
    layer = next(m for m in model.modules() if isinstance(m, LRQATExperts))
    codes, grid = layer.quantized_codes(), layer.base_layer.format.grid
    assert codes.shape == (layer.out_features, layer.in_features)
    dense = grid.values(codes.float(), layer.lrqat_scale["default"].bfloat16().float(), None)
    layer.merge()
    assert torch.equal(layer.base_layer.merged_weight, dense)


def test_on_a_low_bit_base_experts_are_trained_with_all_linear(mixture, tmp_path):
    mixture.save_pretrained(tmp_path / "plain")
    config = LowBitConfig(bits=4, target_parameters="all-experts", downcast="fixed8")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", quantization_config=copy.deepcopy(config)
        )

    on_base = disturbed(adapt(load(), target_parameters=None))
    on_plain = disturbed(adapt(mixture, bits=4))
    assert torch.equal(logits_of(on_base), logits_of(on_plain))
    on_base.save_pretrained(tmp_path / "adapter")
    # The one adapter serves both.
    for base in (load(), AutoModelForCausalLM.from_pretrained(tmp_path / "plain")):
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(logits_of(loaded), logits_of(on_plain))
    unloaded = on_base.unload()
    assert isinstance(experts_of(unloaded)[0], LowBitExperts)
    unloaded.save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()),
        logits_of(unloaded),
    )


def test_several_adapters(tmp_path):
    model = disturbed(adapt(make_mixture("qwen3_moe")))
    first = logits_of(model)
    settings = {"target_modules": "all-linear", "target_parameters": "all-experts", "r": 2}
    model.add_adapter("other", LRQATConfig(task_type="CAUSAL_LM", **settings))
    disturbed(model, size=0.8, adapter="other").set_adapter("other")
    second = logits_of(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits_of(model), second)


def test_a_shared_a_makes_the_adapter_smaller():
    sizes = {}
    for shared in (False, True):
        model = adapt(make_mixture("olmoe"), target_modules=[], experts_share_a=shared)
        parts = {n: p for n, p in model.named_parameters() if "lrqat_A" in n}
        assert {p.shape[0] for p in parts.values()} == {1 if shared else 4}
        sizes[shared] = sum(p.numel() for p in parts.values())
    assert sizes[False] == 4 * sizes[True]


def test_the_trainer_trains_them_and_shows_figures(tmp_path):
    model = adapt(make_mixture("qwen3_moe"), bits=3)
    row = {"input_ids": tokens(1, 16)[0].tolist()}
    row["labels"] = row["input_ids"]
    args = LRQATTrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=5e-3, scale_learning_rate=1e-3,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = LRQATTrainer(model=model, args=args, train_dataset=[row] * 8)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]
    last = trainer.state.log_history[-2]
    assert 0 < last["changed_integers"] < 1
    assert last["scale_change"] > 0
    moved = [p for n, p in model.named_parameters() if "experts" in n and "lrqat_B" in n]
    assert moved
    assert all(p.any() for p in moved)


def test_experts_that_are_left_out_are_named_with_their_size(caplog):
    model = make_mixture("mixtral")
    size = sum(p.numel() for e in experts_of(model) for p in e.parameters())
    with caplog.at_level(logging.WARNING):
        logging.enable_propagation()
        adapt(model, target_parameters=None)
    assert f"4 expert weights stay as they are, for example `{'model.layers.0.mlp.experts.'}" in (
        caplog.text
    )
    assert f"{size:,} parameters together" in caplog.text
    assert "use `target_parameters='all-experts'`" in caplog.text


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_parameters": ["experts.up_proj"]},
            ValueError,
            "no weight of experts has this name",
        ),
        ({"group_size": 7}, ValueError, "experts.(down|gate_up)_proj`: .*group_size"),
        ({"target_parameters": "experts"}, ValueError, "a list of names of parameters"),
        ({"activation_bits": 8}, ValueError, "`activation_bits` is not for experts"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_model_stays(fields, error, message):
    model = make_mixture("mixtral")
    before = logits_of(model)
    with pytest.raises(error, match=message):
        adapt(model, target_modules=[], **fields)
    assert type(experts_of(model)[0]).__name__ == "MixtralExperts"
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_weights_that_are_not_finite_are_refused_by_name(name):
    model = make_mixture(name)
    experts_of(model)[1].down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj` has NaN"):
        adapt(model)
    assert not any(isinstance(m, LowBitExperts) for m in model.modules())


def test_experts_of_an_unknown_kind_are_refused_by_name():
    model = make_mixture("mixtral")
    for experts in experts_of(model):
        experts.__class__ = type("HomemadeExperts", (nn.Module,), {})
        for flag in ("has_gate", "is_transposed"):
            del vars(experts)[flag]
    with pytest.raises(ValueError, match=r"is in a HomemadeExperts, which does not say"):
        adapt(model)


def test_a_router_of_its_own_kind_stays_as_it_is(tmp_path):
    config = transformers.PhimoeConfig(**{**SIZES, "num_local_experts": 4, "eos_token_id": 2})
    config.architectures = ["PhimoeForCausalLM"]
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    kind = type(model.model.layers[0].mlp.router)
    fields = {"target_modules": "all-linear", "target_parameters": "all-experts"}
    settings = LRQATConfig(task_type="CAUSAL_LM", **fields)
    adapted = get_peft_model(model, settings)
    assert isinstance(adapted.base_model.model.model.layers[0].mlp.router, kind)
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    plan = make_plan(str(tmp_path), LRQATConfig(task_type="CAUSAL_LM", **fields), tokens=8)
    assert plan.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_model_without_experts_says_so(make_base):
    with pytest.raises(ValueError, match="keeps no weights of experts in one parameter"):
        adapt(make_base("llama"))


def test_factors_of_experts_are_not_packed(tmp_path):
    model = adapt(make_mixture("mixtral"), init_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="belong to 4 experts, which are not packed"):
        quantize_adapter(tmp_path / "adapter", tmp_path / "packed", progress=False)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_one_of_the_two_projections(mixture, kind):
    """The other one stays a parameter, and is computed with as it lies."""
    before = logits_of(mixture)
    model = adapt(mixture, target_modules=[], target_parameters=[f"experts.{kind}"], bits=8)
    experts = experts_of(model)[-1]
    assert isinstance(getattr(experts, kind), LRQATExperts)
    assert sum(isinstance(p, nn.Parameter) for p in experts.parameters(recurse=False)) >= 1
    torch.testing.assert_close(logits_of(model.eval()), before, rtol=0.2, atol=0.2)
    merged = model.merge_and_unload()
    assert type(experts_of(merged)[-1]).__name__.endswith("Experts")
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-4, atol=1e-4)


def low_bit_experts(model):
    return [name for name, m in model.named_modules() if isinstance(m, LRQATExperts)]


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"exclude_modules": r".*layers\.0.*"}, [1]),
        ({"exclude_modules": ["experts.down_proj"]}, [0, 1]),
        ({"exclude_modules": ["experts"]}, []),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, [1]),
        ({"modules_to_save": ["experts"]}, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("names", ["all-experts", ["experts.down_proj", "experts.gate_up_proj"]])
def test_what_else_chooses_modules_chooses_experts_too(fields, layers, names):
    model = adapt(make_mixture("qwen3_moe"), target_parameters=names, **fields)
    found = low_bit_experts(model)
    assert sorted({int(name.split("layers.")[1][0]) for name in found}) == layers
    if fields.get("exclude_modules") == ["experts.down_proj"]:
        assert not [name for name in found if name.endswith("down_proj")]


def test_experts_alone_need_no_target_modules():
    model = adapt(make_mixture("qwen3_moe"), target_modules=None, target_parameters=["all-experts"])
    assert len(low_bit_experts(model)) == 4
    assert not [n for n, _ in model.named_parameters() if "q_proj.lrqat" in n]


def test_loading_onto_the_meta_device_first(mixture, tmp_path):
    plain = copy.deepcopy(mixture)
    model = disturbed(adapt(mixture))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_info_knows_experts(tmp_path, capsys):
    adapt(make_mixture("qwen3_moe"), group_size=16).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = sum(p.numel() for e in experts_of(make_mixture("qwen3_moe")) for p in e.parameters())
    assert found["quantised weights"] > weights
    assert "holds no weights of experts" in str(found["bytes of these by format"]["gptq"])
