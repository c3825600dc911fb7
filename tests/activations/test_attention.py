"""Low-bit keys and values: rounded where they are cached, and only in decoders with targets."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_lrqat import LRQATConfig
from peft_lrqat.activations import attention as kv_cache
from peft_lrqat.activations.attention import WRAPPED, kv_cache_grid
from peft_lrqat.quant import Grid, quantized_tokens


DECODERS = ["llama", "mistral", "qwen2", "gemma", "gpt2", "opt", "t5", "classifier"]
# GPT-2's own file asks whether attention is eager.
BOTH = [(a, i) for a in DECODERS for i in ("sdpa", "eager") if (a, i) != ("gpt2", "eager")]
decoders_both_ways = pytest.mark.parametrize(("architecture", "implementation"), BOTH, ids="-".join)
decoders = pytest.mark.parametrize("architecture", DECODERS)


@pytest.fixture
def make_model(make_base, make_config, disturb):
    def make(architecture="llama", implementation="sdpa", dtype=torch.float32, **fields):
        base = make_base(architecture, dtype)
        base.set_attn_implementation(implementation)
        torch.manual_seed(2)  # of the factors A
        return disturb(get_peft_model(base, make_config(architecture, **fields)).eval())

    return make


@pytest.fixture
def seen(monkeypatch):
    """Collects (module, key, value) of every call of an attention function."""
    calls = []
    find = kv_cache._implementation

    def spying(name, attention):
        function = find(name, attention)

        def call(module, query, key, value, *args, **kwargs):
            calls.append((module, key.detach(), value.detach()))
            return function(module, query, key, value, *args, **kwargs)

        return call

    monkeypatch.setattr(kv_cache, "_implementation", spying)
    return calls


@decoders_both_ways
@pytest.mark.parametrize("symmetric", [True, False])
def test_keys_and_values_lie_on_a_grid_per_token_and_head(
    architecture, implementation, symmetric, make_model, logits_of, seen
):
    model = make_model(
        architecture, implementation, kv_cache_bits=3, activation_symmetric=symmetric
    )
    logits_of(model, architecture)
    rounded = [call for call in seen if kv_cache_grid(call[0]) is not None]
    assert len(rounded) == (
        4 if architecture == "t5" else 2
    )  # T5's decoder attends to itself and to the encoder
    for _, key, value in rounded:
        for tensor in (key, value):
            tokens = tensor.flatten(0, -2)
            assert max(len(token.unique()) for token in tokens) <= 8
            # Each head of each token has a range of its own.
            assert len(tokens.abs().amax(-1).unique()) > len(tokens) // 2
    others = [key for module, key, _ in seen if kv_cache_grid(module) is None]
    assert len(others) == (2 if architecture == "t5" else 0)
    assert all(len(key.flatten().unique()) > 100 for key in others)


@decoders_both_ways
def test_it_is_the_original_attention_on_rounded_keys_and_values(
    architecture, implementation, make_model, logits_of, monkeypatch
):
    """Mask and scale count, too: if rounding changes nothing, nothing changes."""
    expected = logits_of(make_model(architecture, implementation), architecture)
    model = make_model(architecture, implementation, kv_cache_bits=8)
    assert not torch.equal(logits_of(model, architecture), expected)
    monkeypatch.setattr(kv_cache, "fake_quantize_tokens", lambda x, grid: x)
    assert torch.equal(logits_of(model, architecture), expected)


@decoders
def test_merged_is_trained_bit_for_bit(architecture, make_model, logits_of):
    model = make_model(architecture, activation_bits=8, kv_cache_bits=4)
    trained = logits_of(model, architecture)
    model.merge_adapter()
    assert torch.equal(logits_of(model, architecture), trained)
    plain = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits_of(plain, architecture), trained)
    assert torch.equal(logits_of(copy.deepcopy(plain), architecture), trained)
    model.unmerge_adapter()
    assert torch.equal(logits_of(copy.deepcopy(model), architecture), trained)


@pytest.mark.parametrize(
    ("architecture", "implementation"), [c for c in BOTH if c[0] in ("llama", "gpt2", "t5")]
)
def test_generating_with_a_cache_changes_nothing(
    architecture, implementation, make_model, batch_for
):
    model = make_model(architecture, implementation, kv_cache_bits=4)
    ids = batch_for(architecture)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # padding on the left
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    options |= {
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    cached, uncached = model.generate(**options), model.generate(**options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    # A matrix product over one token sums in another order than one over all tokens. The difference
    # is far smaller than a step of the grid.
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    if architecture != "t5":
        static = model.generate(**options, cache_implementation="static", disable_compile=True)
        assert torch.equal(static.sequences, cached.sequences)


def test_padding_changes_no_other_token(make_model):
    model = make_model(kv_cache_bits=4, activation_bits=8)
    ids = torch.randint(3, 96, (1, 8))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        beside = model(
            input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    torch.testing.assert_close(beside[:, 4:], alone, atol=1e-4, rtol=1e-4)


def test_without_the_adapter_keys_and_values_stay(
    make_model, make_base, make_config, logits_of, tmp_path
):
    model, weights_only = make_model(kv_cache_bits=4), make_model()
    with model.disable_adapter(), weights_only.disable_adapter():
        frozen = logits_of(weights_only)
        assert torch.equal(logits_of(model), frozen)
    model.save_pretrained(tmp_path)
    native = make_base()
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(native.eval()), logits_of(model))
    native.disable_adapters()
    assert torch.equal(logits_of(native), frozen)
    native.enable_adapters()
    assert torch.equal(logits_of(native), logits_of(model))


def test_layers_without_targets_stay(make_model, logits_of, seen):
    model = make_model(
        kv_cache_bits=3, target_modules=["q_proj", "v_proj"], layers_to_transform=[1]
    )
    logits_of(model)
    assert [kv_cache_grid(module) for module, _, _ in seen] == [None, Grid(bits=3, symmetric=False)]


def test_each_adapter_has_its_own(make_model, make_config, disturb, logits_of):
    model = make_model(kv_cache_bits=4)
    trained = logits_of(model)
    model.add_adapter("none", make_config())
    model.add_adapter("two", make_config(kv_cache_bits=2))
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    grids = {}
    for name in ("none", "two", "default"):
        model.set_adapter(name)
        grids[name] = kv_cache_grid(attention)
    assert grids == {
        "none": None,
        "two": Grid(bits=2, symmetric=False),
        "default": Grid(bits=4, symmetric=False),
    }
    assert torch.equal(logits_of(model), trained)
    model.delete_adapter("two")
    assert model.config._attn_implementation == "lrqat_sdpa"
    model.delete_adapter("default")
    assert model.config._attn_implementation == "sdpa"
    assert kv_cache_grid(attention) is None


def test_an_adapter_that_is_added_later_rounds_as_the_first(make_model, make_config, logits_of):
    wanted = logits_of(make_model(kv_cache_bits=4))
    torch.manual_seed(2)
    model = make_model()
    plain = logits_of(model)
    own = {n: p for n, p in model.named_parameters() if ".lrqat_" in n}
    model.add_adapter("later", make_config(kv_cache_bits=4))
    for name, parameter in own.items():
        model.get_parameter(name.replace(".default", ".later")).data.copy_(parameter)
    model.set_adapter("later")
    assert torch.equal(logits_of(model), wanted)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), plain)


def test_layers_of_the_mlp_know_nothing_of_it(make_model):
    model = make_model(kv_cache_bits=4)
    holders = {n for n, m in model.named_modules() if "key_value_grids" in vars(m)}
    assert holders == {f"base_model.model.model.layers.{i}.self_attn" for i in (0, 1)}
    plain = model.merge_and_unload()
    holders = {n for n, m in plain.named_modules() if "key_value_grids" in vars(m)}
    assert holders == {f"model.layers.{i}.self_attn" for i in (0, 1)}


def test_merging_another_adapter_than_the_active_one_keeps_its_grid(make_model, make_config):
    model = make_model(kv_cache_bits=4)
    model.add_adapter("two", make_config(kv_cache_bits=2))
    attention = model.merge_and_unload(adapter_names=["two"]).model.layers[0].self_attn
    assert kv_cache_grid(attention) == Grid(bits=2, symmetric=False)


def test_configuration_on_disk_has_the_name_from_before(make_model, logits_of, tmp_path):
    model = make_model(implementation="eager", kv_cache_bits=4)
    assert model.config._attn_implementation == "lrqat_eager"
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    assert "lrqat" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    # A model of the same configuration has no target, and therefore plain attention.
    other = type(plain)(copy.deepcopy(plain.config)).eval()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(logits_of(other), logits_of(loaded))


@pytest.mark.parametrize("kind", ["adapter", "copy", "merged"])
def test_another_implementation_rounds_as_well(kind, make_model, logits_of, seen):
    model = make_model(kv_cache_bits=2)
    expected = logits_of(make_model(implementation="eager", kv_cache_bits=2))
    assert not torch.allclose(expected, logits_of(make_model()), atol=1e-2)
    if kind == "merged":
        model = model.merge_and_unload()
    elif kind == "copy":
        model = copy.deepcopy(model)
    base = model.get_base_model() if kind != "merged" else model
    base.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model), expected)
    assert base.config._attn_implementation == "lrqat_eager"


def test_the_last_adapter_takes_the_watch_over_implementations_with_it(make_model, make_config):
    model = make_model(kv_cache_bits=4)
    base = model.get_base_model()
    hooks = len(base._forward_pre_hooks)
    model.add_adapter("other", make_config(kv_cache_bits=8))
    assert len(base._forward_pre_hooks) == hooks
    for name in ("default", "other"):
        model.delete_adapter(name)
    assert len(base._forward_pre_hooks) == hooks - 1


def test_another_implementation_that_cannot_be_wrapped_is_refused(make_model, logits_of):
    model = make_model(kv_cache_bits=4)
    model.get_base_model().config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="is now 'flex_attention', which would not round keys"):
        logits_of(model)


def test_an_implementation_that_the_model_asks_for_is_refused_later_as_well(make_model, logits_of):
    model = make_model("gpt2", kv_cache_bits=4)
    model.get_base_model().set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"does something of its own .*=.sdpa"):
        logits_of(model)


def test_attention_of_other_models_is_untouched(make_model, make_base):
    make_model(kv_cache_bits=4)
    assert make_base().config._attn_implementation == "sdpa"
    functions = transformers.AttentionInterface()
    assert functions["sdpa"].__module__.startswith("transformers.")


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "somebody's"])
def test_implementation_that_cannot_be_wrapped_is_refused(implementation, make_base, make_config):
    base = make_base()
    base.config._attn_implementation = implementation
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(
        ValueError, match=r"attention implementation is .*'eager', 'sdpa' can be wrapped"
    ) as caught:
        get_peft_model(base, make_config(kv_cache_bits=4))
    assert repr(implementation) in str(caught.value)
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_model_that_asks_for_the_name_is_refused(make_base, make_config):
    base = make_base("gpt2")
    base.set_attn_implementation("eager")
    with pytest.raises(
        ValueError,
        match=r"GPT2.* does something of its own .* is 'eager'.*attn_implementation='sdpa'",
    ):
        get_peft_model(base, make_config("gpt2", kv_cache_bits=4))
    base.set_attn_implementation("sdpa")
    get_peft_model(base, make_config("gpt2", kv_cache_bits=4))


def test_model_without_the_interface_is_refused():
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
    )
    with pytest.raises(ValueError, match="BloomForCausalLM does not call attention through"):
        get_peft_model(bloom, LRQATConfig(target_modules="all-linear", kv_cache_bits=4))
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        ValueError,
        match="Sequential does not call attention through transformers' attention interface",
    ):
        get_peft_model(model, LRQATConfig(target_modules=["0"], kv_cache_bits=4))
    assert type(model[0]) is nn.Linear


def test_targets_outside_attention_are_refused(make_base, make_config):
    with pytest.raises(
        ValueError, match="no target module lies in an attention layer that keeps a cache"
    ):
        get_peft_model(
            make_base(), make_config(kv_cache_bits=4, target_modules=["up_proj", "down_proj"])
        )


def test_encoder_is_refused(make_config):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    encoder = transformers.BertModel(transformers.BertConfig(**sizes))
    with pytest.raises(
        ValueError, match="no target module lies in an attention layer that keeps a cache"
    ):
        get_peft_model(encoder, LRQATConfig(target_modules="all-linear", kv_cache_bits=4, r=4))


def test_masks_are_those_of_the_original():
    masks = transformers.AttentionMaskInterface()
    assert all(masks[wrapped] is masks[name] for name, wrapped in WRAPPED.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_go_straight_through(dtype, make_model, batch_for):
    model = make_model(dtype=dtype, kv_cache_bits=4).train()
    model(**batch_for()).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())


def test_rounding_is_that_of_tokens(make_model, seen, logits_of, monkeypatch):
    """Keys are rounded once, after the rotary embedding, as they are cached."""
    model = make_model(kv_cache_bits=4)
    grid = Grid(bits=4, symmetric=False)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(3, 15)[None], use_cache=True).past_key_values
    for layer, (_, key, value) in zip(cache.layers, seen, strict=True):
        assert torch.equal(key, quantized_tokens(layer.keys, grid))
        assert torch.equal(value, quantized_tokens(layer.values, grid))


def test_loaded_adapter_brings_it_back(make_model, make_base, logits_of, tmp_path):
    model = make_model(kv_cache_bits=4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert loaded.config._attn_implementation == "lrqat_sdpa"
    assert torch.equal(logits_of(loaded), logits_of(model))
