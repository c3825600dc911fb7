"""The real low-bit cache equals the simulated one bit for bit, in fewer bytes.

transformers' own backends come within a step.
"""

import copy
from importlib.util import find_spec

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers.cache_utils import DynamicLayer, QuantizedCache

from peft_lrqat import LRQATConfig
from peft_lrqat.activations.cache import LowBitCacheLayer, low_bit_cache, pack_tokens, unpack_tokens
from peft_lrqat.quant import Grid, packed_bytes, quantized_tokens


GRIDS = [
    Grid(bits=bits, symmetric=symmetric) for bits in (2, 3, 4, 5, 8) for symmetric in (True, False)
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (1, 1, 1, 1), (2, 1, 4, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_and_unpacked_is_rounded(grid, shape, dtype):
    x = torch.randn(shape).to(dtype)
    if x.numel() > 100:
        x[0, 0, 0] = 0
        x[0, 0, 1].abs_()
    packed = pack_tokens(x, grid)
    assert packed.dtype == torch.uint8
    assert packed.shape == (
        *shape[:-1],
        packed_bytes(shape[-1], grid.bits) + (4 if grid.symmetric else 5),
    )
    assert torch.equal(unpack_tokens(packed, grid, shape[-1], dtype), quantized_tokens(x, grid))


@pytest.fixture
def make_model(make_base, make_config, disturb):
    def make(architecture="llama", dtype=torch.float32, implementation="sdpa", **fields):
        base = make_base(architecture, dtype)
        base.set_attn_implementation(implementation)
        torch.manual_seed(2)
        return disturb(get_peft_model(base, make_config(architecture, **fields)).eval())

    return make


def generate(model, ids, **options):
    fixed = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    fixed |= {"output_logits": True, "return_dict_in_generate": True}
    return model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **{**fixed, **options})


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gemma"])
def test_generation_is_the_simulated_one_bit_for_bit(
    architecture, bits, symmetric, implementation, make_model, batch_for, dtype
):
    model = make_model(
        architecture, dtype, implementation, kv_cache_bits=bits, activation_symmetric=symmetric
    )
    ids = batch_for(architecture)["input_ids"]
    ids[0, :4] = 0
    simulated, cache = generate(model, ids), low_bit_cache(model)
    real = generate(model, ids, past_key_values=cache)
    assert all(type(layer) is LowBitCacheLayer for layer in cache.layers)
    assert torch.equal(real.sequences, simulated.sequences)
    assert all(map(torch.equal, real.logits, simulated.logits))


def test_generation_of_gpt2(make_model, batch_for):
    model = make_model("gpt2", kv_cache_bits=4)
    ids = batch_for("gpt2")["input_ids"]
    real = generate(model, ids, past_key_values=low_bit_cache(model))
    assert all(map(torch.equal, real.logits, generate(model, ids).logits))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
def test_beams(options, make_model, batch_for):
    model = make_model(kv_cache_bits=4)
    ids = batch_for()["input_ids"]
    assert torch.equal(
        generate(model, ids, **options, past_key_values=low_bit_cache(model)).sequences,
        generate(model, ids, **options).sequences,
    )


def test_bytes(make_model, batch_for):
    model = make_model(kv_cache_bits=4)
    cache = low_bit_cache(model)
    generate(model, batch_for()["input_ids"], past_key_values=cache)
    for layer in cache.layers:
        assert layer.get_seq_length() == 12 + 15  # the last token is never read
        assert layer.keys.shape == layer.values.shape == (2, 2, 27, 8 // 2 + 5)
        assert layer.keys.dtype == torch.uint8


def test_cropped_and_reset(make_model):
    model = make_model(kv_cache_bits=4)
    ids = torch.randint(3, 96, (1, 10))
    cache = low_bit_cache(model)
    with torch.no_grad():
        whole = model(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=torch.cat([ids[:, :6], ids[:, :3]], 1), past_key_values=cache)
        cache.crop(-3)
        rest = model(input_ids=ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=1e-5)
        cache.reset()
        assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, whole)


def test_merged_model_has_one_too(make_model, batch_for):
    model = make_model(kv_cache_bits=4, activation_bits=8)
    ids = batch_for()["input_ids"]
    trained = generate(model, ids).sequences
    plain = model.merge_and_unload()
    assert torch.equal(
        generate(plain, ids, past_key_values=low_bit_cache(plain)).sequences, trained
    )


def test_sliding_windows_and_layers_without_targets_keep_their_own(make_model, batch_for):
    targets = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
    cache = low_bit_cache(make_model(kv_cache_bits=4, **targets))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, LowBitCacheLayer]
    config = transformers.MistralConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = get_peft_model(
        transformers.MistralForCausalLM(config),
        LRQATConfig(target_modules="all-linear", r=4, kv_cache_bits=4),
    )
    with pytest.raises(ValueError, match="each layer has a sliding window"):
        low_bit_cache(model)


def test_nothing_to_keep_in_low_bits_is_refused(make_model):
    with pytest.raises(ValueError, match="no adapter with `kv_cache_bits` is active"):
        low_bit_cache(make_model())
    model = make_model(kv_cache_bits=4)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="no adapter with `kv_cache_bits` is active"),
    ):
        low_bit_cache(model)
    with pytest.raises(ValueError, match="is for decoders"):
        low_bit_cache(make_model("t5", kv_cache_bits=4))


# transformers' own low-bit cache with the same groups, one token of one head; where its package is
# installed. (Its other backend, quanto, compiles an extension at the first use.)
@pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed")
def test_hqq_of_transformers_comes_within_a_step(make_model):
    """Its range need not include zero, and its zero points are tuned and not rounded.

    It also keeps the newest tokens in the model's dtype.
    """
    model = make_model(kv_cache_bits=4)
    options = {"nbits": 4, "q_group_size": 8, "axis_key": 1, "axis_value": 1, "residual_length": 1}
    cache = QuantizedCache("hqq", model.config, **options)
    ids = torch.randint(3, 96, (1, 24))
    with torch.no_grad():
        states = model(input_ids=ids, use_cache=True).past_key_values
        for real, layer in zip(cache.layers, states.layers, strict=True):
            real.update(layer.keys, layer.values)
            for theirs, x in (
                (real._quantized_keys, layer.keys),
                (real._quantized_values, layer.values),
            ):
                ours = quantized_tokens(x, Grid(bits=4, symmetric=False))
                step = (
                    x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
                ) / 15
                difference = (real._dequantize(theirs) - ours).abs() / step
                assert difference.max() <= 1.01
                assert difference.mean() <= 0.4
    simulated = generate(model, ids, max_new_tokens=8)
    real = generate(
        model, ids, max_new_tokens=8, past_key_values=QuantizedCache("hqq", model.config, **options)
    )
    spread = simulated.logits[0].std()
    # Compared as long as the tokens are the same.
    for a, b, one, other in zip(
        simulated.sequences[0, 24:],
        real.sequences[0, 24:],
        simulated.logits,
        real.logits,
        strict=True,
    ):
        assert (one - other).abs().max() < 0.3 * spread
        if a != b:
            break
