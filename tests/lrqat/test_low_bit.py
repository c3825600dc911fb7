"""Adapters on a low-bit base: the same integers as on the plain model, grids from the base."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitConfig, LRQATConfig
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.export import export_model, load_quantized, verify_export


SETTINGS = [
    {"bits": 4},
    {"bits": 3, "symmetric": False, "group_size": 8},
    {"bits": 2, "downcast": "fixed8", "range_estimator": "minmax"},
    {"bits": 3, "bits_pattern": {"down_proj": 8}, "group_size_pattern": {"q_proj": 8}},
]


@pytest.fixture(params=SETTINGS, ids=str)
def settings(request):
    return {"downcast": "int", **request.param}


@pytest.fixture
def plain(make_base, tmp_path):
    """Makes the folder of a plain checkpoint."""
    make_base("llama", torch.bfloat16).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(folder, **fields):
    given = {"quantization_config": LowBitConfig(**fields)} if fields else {}
    return AutoModelForCausalLM.from_pretrained(folder, **given).eval()


@pytest.fixture
def stored(plain, tmp_path):
    """Makes the folder of a low-bit base: ``stored(**settings)``."""

    def make(**settings):
        load(plain, **settings).save_pretrained(tmp_path / "low-bit")
        return tmp_path / "low-bit"

    return make


def adapt(base, seed=0, **fields):
    torch.manual_seed(seed)
    return get_peft_model(base, LRQATConfig(target_modules="all-linear", r=4, **fields)).eval()


def test_logits_and_integers_are_those_of_the_plain_way(
    plain, stored, settings, disturb, logits_of, lrqat_layers
):
    one = disturb(adapt(load(plain), **settings))
    other = disturb(adapt(load(stored(**settings))))
    assert torch.equal(logits_of(one), logits_of(other))
    found = lrqat_layers(other)
    assert len(found) == 14
    for name, layer in lrqat_layers(one).items():
        assert torch.equal(layer.quantized_codes(), found[name].quantized_codes())


def test_a_base_under_adapters_is_not_saved(stored, logits_of, tmp_path):
    folder = stored(bits=4)
    model = adapt(load(folder))
    with pytest.raises(ValueError, match=r"adapters are attached to this low-bit base.*unload"):
        model.base_model.model.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.safetensors"))
    model.unload().save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(load(folder)))


def test_transformers_saves_its_own_adapters_of_a_base(stored, disturb, logits_of, tmp_path):
    folder = stored(bits=4)
    base = load(folder)
    base.add_adapter(LRQATConfig(target_modules=["q_proj"], r=4))
    disturb(base)
    base.save_pretrained(tmp_path / "adapter")
    again = load(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again), logits_of(base))


def test_the_config_says_what_the_base_has(plain, stored, settings):
    model = adapt(load(stored(**settings)))
    config, on_plain = model.peft_config["default"], adapt(load(plain), **settings)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, DowncastLinear):
            module = name.removesuffix(".base_layer")
            assert config.weight_format(module, layer.in_features) == layer.format
    for field in ("symmetric", "downcast", "scale_dtype", "range_estimator", "base_dtype"):
        assert getattr(config, field) == getattr(on_plain.peft_config["default"], field)


def test_the_users_config_stays_as_it_was(plain, stored):
    config = LRQATConfig(target_modules="all-linear")
    get_peft_model(load(stored(bits=3, group_size=8)), config)
    assert (config.bits, config.group_size, config.downcast) == (4, -1, "fixed8")


def test_adapters_of_either_way_load_on_either(
    plain, stored, settings, disturb, logits_of, tmp_path
):
    folder = stored(**settings)
    for make, other in ((plain, folder), (folder, plain)):
        fields = settings if make == plain else {}
        model = disturb(adapt(load(make), **fields))
        target = tmp_path / f"adapter-{make.name}"
        model.save_pretrained(target)
        again = PeftModel.from_pretrained(load(other), target).eval()
        assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 4),
        ("group_size", 16),
        ("symmetric", True),
        ("downcast", "fixed8"),
        ("scale_dtype", "float16"),
        ("bits_pattern", {"q_proj": 5}),
    ],
)
def test_a_field_that_disagrees_is_refused_by_name(field, value, stored):
    base = load(stored(bits=3, symmetric=False, group_size=8))
    with pytest.raises(ValueError, match=f"`{field.removesuffix('_pattern')}` is.*leave"):
        adapt(base, **{field: value})
    assert not any("lrqat" in name for name, _ in base.named_parameters())


def test_fields_that_agree_are_accepted(stored):
    base = load(stored(bits=3, symmetric=False, group_size=8))
    adapt(base, bits=3, symmetric=False, group_size=8, downcast="int")


def test_a_second_adapter_shares_the_base(stored, disturb, logits_of):
    model = adapt(load(stored(bits=3, symmetric=False)))
    model.add_adapter("second", LRQATConfig(target_modules=["q_proj"], r=2))
    assert model.peft_config["second"].bits == 3
    with pytest.raises(ValueError, match="`bits` is 4"):
        model.add_adapter("third", LRQATConfig(target_modules=["q_proj"], bits=4))


def test_without_the_adapter_it_is_the_base(stored, disturb, logits_of):
    folder = stored(bits=3)
    expected = logits_of(load(folder))
    model = disturb(adapt(load(folder)))
    assert not torch.equal(logits_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    base = model.unload()
    assert torch.equal(logits_of(base), expected)
    assert sum(isinstance(m, DowncastLinear) for m in base.modules()) == 14


def test_unloaded_it_is_saved_as_a_base(stored, disturb, logits_of, tmp_path):
    base = disturb(adapt(load(stored(bits=3)))).unload()
    base.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(base))


def test_merged_it_is_a_plain_model(stored, disturb, logits_of, tmp_path):
    model = disturb(adapt(load(stored(bits=3, group_size=8))))
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), expected)
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits_of(again), expected)


def test_layers_without_an_adapter_stay_low_bit_when_the_others_are_merged(
    stored, disturb, logits_of, tmp_path
):
    torch.manual_seed(0)
    base = load(stored(bits=3))
    model = disturb(get_peft_model(base, LRQATConfig(target_modules=["q_proj"], r=4)).eval())
    expected = logits_of(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert sum(isinstance(m, DowncastLinear) for m in again.modules()) == 12
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("format", ["packed", "dequantized"])
def test_exports_are_those_of_the_plain_way(format, stored, disturb, logits_of, tmp_path):
    model = disturb(adapt(load(stored(bits=3, symmetric=False, group_size=8))))
    export_model(model, tmp_path / "export", format=format)
    assert verify_export(model, tmp_path / "export", format=format).exact
    again = load_quantized(tmp_path / "export") if format == "packed" else load(tmp_path / "export")
    assert torch.equal(logits_of(again.eval()), logits_of(model))


def test_it_trains(stored, batch_for):
    model = adapt(load(stored(bits=3))).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert all("lrqat" in n for n, p in model.named_parameters() if p.requires_grad)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(5):
        loss = model(**batch_for("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_the_card_says_what_the_base_was_made_from(plain, stored, tmp_path):
    for number, base in enumerate((load(plain, bits=4), load(stored(bits=4)))):
        model = get_peft_model(base, LRQATConfig(target_modules="all-linear"))
        model.save_pretrained(tmp_path / str(number))
        card = (tmp_path / str(number) / "README.md").read_text()
        assert "a low-bit base made from a local directory, `plain`" in card
