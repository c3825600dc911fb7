"""Low-bit embeddings and output layers: made, saved, resized, trained through, tied or not."""

import copy
import json

import pytest
import torch
from formula import clip, straight_through
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import embedding
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peft_lrqat import LowBitConfig, LRQATConfig, prepare_low_bit
from peft_lrqat.base.embedding import DowncastEmbedding, TiedHead
from peft_lrqat.lrqat.embedding import LRQATEmbedding
from peft_lrqat.lrqat.size import deployed_weight_bytes


IDS = torch.arange(3, 23)[None]
# Qwen2's are tied here, Llama's not.
TIED = {"qwen2": True, "llama": False}


@pytest.fixture(params=TIED)
def architecture(request):
    return request.param


@pytest.fixture
def checkpoint(make_base, architecture, tmp_path):
    make_base(architecture, torch.bfloat16).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(folder, dtype="auto", **fields):
    if fields:
        fields = {"quantization_config": LowBitConfig(**{"bits": 4, **fields})}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **fields).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def plain_twin(folder, model, dtype="auto"):
    """The plain model with the weights that ``model`` computes with."""
    plain = load(folder, dtype)
    for name, layer in model.named_modules():
        if hasattr(layer, "stored_weight"):
            plain_layer = plain.get_submodule(name.removesuffix(".base_layer"))
            plain_layer.weight.data = layer.stored_weight()
    plain.tie_weights()
    return plain


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_it_computes_with_the_dequantised_weight(checkpoint, architecture, bits, symmetric):
    model = load(checkpoint, group_size=8, embedding_bits=bits, symmetric=symmetric)
    layer, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(layer, DowncastEmbedding)
    assert layer.format.grid.bits == bits
    assert isinstance(head, TiedHead) == TIED[architecture]
    assert torch.equal(layer(IDS), embedding(IDS, layer.stored_weight()))
    assert torch.equal(logits(model), logits(plain_twin(checkpoint, model)))
    assert model.dtype == torch.bfloat16


def test_packed_embeddings_take_their_bits(checkpoint, architecture):
    small, plain = load(checkpoint, embedding_bits=4), load(checkpoint, bits=4)
    before = sum(p.nbytes for p in plain.parameters())
    after = sum(p.nbytes for p in small.parameters())
    ends = 1 if TIED[architecture] else 2
    # 96 rows of 32 weights: 2 bytes each, then half a byte and a float32 scale for each row.
    assert before - after == ends * 96 * (64 - 16 - 4)


def test_artefact_round_trip(checkpoint, architecture, tmp_path):
    model = load(checkpoint, embedding_bits=8)
    model.save_pretrained(tmp_path / "saved")
    prepare_low_bit(
        checkpoint, tmp_path / "streamed", LowBitConfig(bits=4, embedding_bits=8), progress=False
    )
    stored = [load_file(tmp_path / n / "model.safetensors") for n in ("saved", "streamed")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    assert ("lm_head.phi" in stored[0]) != TIED[architecture]
    for name in ("saved", "streamed"):
        again = load(tmp_path / name)
        assert torch.equal(logits(again), logits(model))
        assert again.config.quantization_config.format_version == 3
    file = tmp_path / "saved" / "model.safetensors"
    stored[0]["model.embed_tokens.phi"][3, 5] ^= 1
    save_file(stored[0], file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embed_tokens.*not what was stored"):
        load(tmp_path / "saved")


def test_a_base_without_embeddings_is_of_the_version_before(checkpoint, tmp_path):
    load(checkpoint, bits=4).save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert written["format_version"] == 2
    assert "embedding_bits" not in written
    assert not any("embedding" in fields for fields in written["modules"].values())


def test_copies_and_ties_anew(checkpoint):
    model = load(checkpoint, embedding_bits=8)
    copied = copy.deepcopy(model)
    head = copied.get_output_embeddings()
    if isinstance(head, TiedHead):
        assert head.find() is copied.get_input_embeddings()
    expected = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copied), expected)


@pytest.mark.parametrize("count", [100, 90])
def test_resized(checkpoint, count, tmp_path):
    model = load(checkpoint, embedding_bits=8)
    expected = logits(model)
    assert model.resize_token_embeddings(96) is model.get_input_embeddings()
    model.resize_token_embeddings(count)
    both = min(count, 96)
    found = logits(model)
    assert found.shape[-1] == count == model.config.vocab_size
    assert torch.equal(found[..., :both], expected[..., :both])
    model.save_pretrained(tmp_path / "resized")
    assert torch.equal(logits(load(tmp_path / "resized")), found)


def test_new_rows_are_the_mean(checkpoint):
    model = load(checkpoint, embedding_bits=8)
    layer = model.get_input_embeddings()
    mean = layer.stored_weight().float().mean(0)
    model.resize_token_embeddings(None, pad_to_multiple_of=64)
    assert layer.num_embeddings == 128
    new = layer.stored_weight()[96:].float()
    assert ((new - mean).abs() <= layer.scale0[96:]).all()


def test_resizing_under_adapters_is_refused(checkpoint):
    config = LRQATConfig(target_modules="all-linear", train_embeddings=True)
    model = get_peft_model(load(checkpoint, embedding_bits=8), config)
    with pytest.raises(ValueError, match="before adapters are added"):
        model.get_base_model().resize_token_embeddings(100)


def test_two_weights_that_the_config_ties_are_refused(make_base, tmp_path):
    make_base("qwen2", torch.bfloat16).save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.randn(96, 32, dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another weight for each"):
        load(tmp_path / "plain", embedding_bits=8)
    settings = LowBitConfig(embedding_bits=8)
    with pytest.raises(ValueError, match="another weight for each"):
        prepare_low_bit(tmp_path / "plain", tmp_path / "base", settings, progress=False)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert isinstance(load(tmp_path / "plain", embedding_bits=8).lm_head, TiedHead)


def test_two_weights_in_an_old_file_are_looked_at_too(make_base, tmp_path):
    model = make_base("qwen2", torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert isinstance(load(tmp_path, embedding_bits=8).lm_head, TiedHead)
    tensors["lm_head.weight"] = torch.randn(96, 32, dtype=torch.bfloat16)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="another weight for each"):
        load(tmp_path, embedding_bits=8)


@pytest.mark.parametrize("bits", [3, 9, 8.0, True])
def test_bits_that_are_refused(bits):
    with pytest.raises(ValueError, match="`embedding_bits` must be an integer from 4 to 8"):
        LowBitConfig(embedding_bits=bits)


def test_models_that_are_refused(make_base, tmp_path):
    make_base("t5").save_pretrained(tmp_path / "t5")
    make_base("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="tie the input embedding to the output layer alone"):
        AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path / "t5", quantization_config=LowBitConfig(embedding_bits=8)
        )
    model = make_base("llama")
    scaled = type("Scaled", (nn.Embedding,), {"forward": lambda self, ids: 2 * ids})
    model.set_input_embeddings(scaled(96, 32))
    with pytest.raises(ValueError, match="a Scaled that computes more than a look-up"):
        get_peft_model(model, LRQATConfig(target_modules="all-linear", embedding_bits=8))


def fields(**others):
    return {"target_modules": "all-linear", "downcast": "int", "r": 4, **others}


def moved(model):
    """An adapter as after training: other integers, other scales."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lrqat_B" in name:
                parameter.normal_(std=0.5)
            elif "lrqat_scale" in name:
                parameter *= 1 + 0.1 * torch.rand_like(parameter)
    return model.eval()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_adapters_of_either_way(checkpoint, architecture, trained, tmp_path):
    config = LRQATConfig(**fields(embedding_bits=8, train_embeddings=trained))
    model = get_peft_model(load(checkpoint), config).eval()
    low_bit = load(checkpoint, embedding_bits=8)
    assert torch.equal(logits(model), logits(low_bit))
    expected = logits(moved(model))
    kind = LRQATEmbedding if trained else DowncastEmbedding
    assert type(model.get_input_embeddings()) is kind
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(key.endswith(("phi", "scale0", "mark")) for key in saved)
    assert any("embed_tokens" in key for key in saved) == trained
    for base in (load(checkpoint), load(checkpoint, embedding_bits=8)):
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(logits(again), expected)
        with again.disable_adapter():
            assert torch.equal(logits(again), logits(low_bit))
        again.merge_adapter()
        assert torch.equal(logits(again), expected)
        again.unmerge_adapter()
        merged = again.merge_and_unload()
        assert torch.equal(logits(merged), expected)
        ends = merged.get_input_embeddings(), merged.get_output_embeddings()
        assert [type(end) for end in ends] == [nn.Embedding, nn.Linear]
        assert (ends[0].weight is ends[1].weight) == TIED[architecture]
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(logits(load(tmp_path / "merged")), expected)


@pytest.mark.parametrize("given", [{}, {"bits": 3}, {"embedding_bits": 8}])
def test_adapters_made_on_the_base_are_loaded_again(checkpoint, given, tmp_path):
    config = LRQATConfig(target_modules="all-linear", r=4, **given)
    model = moved(get_peft_model(load(checkpoint, bits=3, embedding_bits=8), config))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        load(checkpoint, bits=3, embedding_bits=8), tmp_path / "adapter"
    )
    assert torch.equal(logits(again.eval()), expected)


def test_unloaded_it_is_the_base(checkpoint):
    base = load(checkpoint, embedding_bits=8)
    expected = logits(base)
    model = get_peft_model(base, LRQATConfig(target_modules="all-linear", train_embeddings=True))
    again = moved(model).unload()
    assert torch.equal(logits(again), expected)
    assert type(again.get_input_embeddings()) is DowncastEmbedding
    assert again.config.tie_word_embeddings == isinstance(again.lm_head, TiedHead)


def test_settings_come_from_the_base_and_are_compared_with_it(checkpoint):
    model = get_peft_model(
        load(checkpoint, embedding_bits=8), LRQATConfig(target_modules="all-linear")
    )
    assert model.peft_config["default"].embedding_bits == 8
    with pytest.raises(ValueError, match="`embedding_bits` is 4, but the embeddings"):
        get_peft_model(load(checkpoint, embedding_bits=8), LRQATConfig(**fields(embedding_bits=4)))
    with pytest.raises(ValueError, match="low-bit base are plain"):
        get_peft_model(load(checkpoint, bits=4), LRQATConfig(**fields(embedding_bits=4)))
    with pytest.raises(ValueError, match="`train_embeddings` needs `embedding_bits`"):
        get_peft_model(load(checkpoint), LRQATConfig(**fields(train_embeddings=True)))


def test_named_targets_and_the_tied_head(checkpoint, architecture):
    asked = ["q_proj", "embed_tokens", "lm_head"]
    config = LRQATConfig(target_modules=asked, embedding_bits=8)
    model = get_peft_model(load(checkpoint), config)
    assert isinstance(model.get_input_embeddings(), LRQATEmbedding)
    regex = LRQATConfig(target_modules=r".*q_proj", embedding_bits=8, train_embeddings=True)
    model = get_peft_model(load(checkpoint), regex)
    assert isinstance(model.get_input_embeddings(), LRQATEmbedding)
    alone = LRQATConfig(target_modules=["q_proj", "lm_head"], embedding_bits=8)
    if TIED[architecture]:
        with pytest.raises(ValueError, match=r"computes with the integers of `model.embed_tokens`"):
            get_peft_model(load(checkpoint), alone)
    else:
        assert type(get_peft_model(load(checkpoint), alone).lm_head).__name__ == "LRQATLinear"


def test_one_config_serves_several_models(checkpoint, make_base):
    config = LRQATConfig(target_modules="all-linear", embedding_bits=8)
    get_peft_model(load(checkpoint), config)
    assert config.bits_pattern == {}
    model = get_peft_model(make_base("gpt2"), config)
    assert isinstance(model.get_base_model().transformer.wte, DowncastEmbedding)


def test_a_second_adapter(checkpoint):
    model = get_peft_model(load(checkpoint), LRQATConfig(**fields(embedding_bits=8)))
    model.add_adapter("other", LRQATConfig(**fields(embedding_bits=8)))
    with pytest.raises(ValueError, match="`embedding_bits` is 4"):
        model.add_adapter("third", LRQATConfig(**fields(embedding_bits=4)))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_modules_to_save_are_refused(checkpoint, name):
    with pytest.raises(ValueError, match="holds low-bit integers"):
        get_peft_model(
            load(checkpoint, embedding_bits=8),
            LRQATConfig(target_modules="all-linear", modules_to_save=[name]),
        )


def test_gradients_of_both_ends_meet_in_the_scales(checkpoint, architecture):
    """Against autograd of the plain formula, on the dense weight of the embedding."""
    base = load(checkpoint, torch.float32, embedding_bits=8)
    model = get_peft_model(base, LRQATConfig(target_modules=["embed_tokens"], r=4))
    layer = moved(model).get_input_embeddings()
    model(IDS, labels=IDS).loss.backward()
    found = {name: getattr(layer, name)["default"] for name in layer.adapter_layer_names}
    twin = plain_twin(checkpoint, model.get_base_model(), torch.float32)
    w = layer.low_rank_weight("default")
    A, B, scale = (found[n].detach().clone().requires_grad_() for n in found)
    z = w.format.decode(w.phi) + w.gamma * (B @ A)
    q = clip(straight_through(z.round(), z), w.format.grid.qmin, w.format.grid.qmax)
    step = scale + (w.step() - scale).detach()
    weight = step.repeat_interleave(q.shape[1] // step.shape[1], 1) * q
    names = ["model.embed_tokens.weight"]
    names += ["lm_head.weight"] if TIED[architecture] else []
    torch.func.functional_call(
        twin, dict.fromkeys(names, weight), (IDS,), {"labels": IDS}, tie_weights=False
    ).loss.backward()
    for name, plain in zip(found, (A, B, scale), strict=True):
        error = (found[name].grad - plain.grad).norm()
        # Sums of float32 in another order.
        assert error <= 1e-4 * plain.grad.norm(), name


def test_the_row_of_the_padding_gets_no_gradient(make_base):
    model = make_base("llama")
    assert model.get_input_embeddings().padding_idx == 0
    config = LRQATConfig(target_modules=["embed_tokens"], embedding_bits=8)
    model = get_peft_model(model, config)
    layer = model.get_input_embeddings()
    layer(torch.tensor([[0, 1, 5]])).sum().backward()
    scale = layer.lrqat_scale["default"].grad
    assert [bool(scale[row].any()) for row in (0, 1, 2, 5)] == [False, True, False, True]


def test_the_output_layer_takes_no_rounded_inputs_of_its_own(checkpoint, architecture):
    config = LRQATConfig(**fields(embedding_bits=8, train_embeddings=True, activation_bits=8))
    model = get_peft_model(load(checkpoint), config)
    assert model.get_input_embeddings().activations["default"] is None


def test_deployed_bytes_count_embeddings(checkpoint, architecture):
    with_ends = get_peft_model(load(checkpoint), LRQATConfig(**fields(embedding_bits=8)))
    without = get_peft_model(load(checkpoint), LRQATConfig(**fields()))
    ends = 1 if TIED[architecture] else 2
    difference = deployed_weight_bytes(with_ends) - deployed_weight_bytes(without)
    assert difference == ends * 96 * (32 + 2)


def test_generation_with_a_tied_head(checkpoint):
    model = get_peft_model(
        load(checkpoint, embedding_bits=8),
        LRQATConfig(target_modules="all-linear", train_embeddings=True),
    )
    moved(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(input_ids=IDS, **options)
    assert torch.equal(found, model.merge_and_unload().generate(input_ids=IDS, **options))
