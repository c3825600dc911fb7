"""Low-bit bases through `from_pretrained`: made while loading, saved, loaded, damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitConfig, LRQATConfig, load_quantized
from peft_lrqat.base import quantizer
from peft_lrqat.base.downcast import DowncastLinear


GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "0.1.0"
SETTINGS = [
    {},
    {"bits": 3, "symmetric": False, "group_size": 8},
    {"bits": 2, "downcast": "fixed8"},
    {"bits": 8, "downcast": "bf16", "scale_dtype": "float32", "range_estimator": "minmax"},
    {"bits_pattern": {"down_proj": 8}, "group_size_pattern": {"q_proj": 8}},
]


@pytest.fixture(params=SETTINGS, ids=str)
def settings(request):
    return request.param


@pytest.fixture
def checkpoint(make_base, tmp_path):
    """A plain checkpoint on disk."""
    make_base("llama", torch.bfloat16).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(folder, **fields):
    if fields:
        fields = {"quantization_config": LowBitConfig(**fields)}
    return AutoModelForCausalLM.from_pretrained(folder, **fields).eval()


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, DowncastLinear)}


def test_its_integers_are_those_that_an_adapter_makes(
    checkpoint, settings, make_base, lrqat_layers
):
    base = load(checkpoint, **{"bits": 4, **settings})
    fields = {"target_modules": "all-linear", "downcast": "int", **settings}
    peft = get_peft_model(make_base("llama", torch.bfloat16), LRQATConfig(**fields))
    adapted = lrqat_layers(peft)
    found = layers(base)
    assert found.keys() == {n.removeprefix("base_model.model.") for n in adapted}
    for name, layer in found.items():
        other = adapted[f"base_model.model.{name}"].base_layer
        assert torch.equal(layer.phi, other.phi)
        assert torch.equal(layer.scale0, other.scale0)
        assert layer.fingerprint == other.fingerprint
        assert layer.base_dtype == other.base_dtype == torch.bfloat16


def test_saved_and_loaded_it_is_the_same(checkpoint, settings, logits_of, tmp_path):
    model = load(checkpoint, **{"bits": 4, **settings})
    model.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base")
    assert torch.equal(logits_of(again), logits_of(model))
    for name, layer in layers(again).items():
        assert layer.format == layers(model)[name].format
        assert layer.dtype == torch.bfloat16
        assert not any(p.requires_grad for p in (layer.phi, layer.scale0))
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_no_16_bit_weight_of_a_target_is_stored(checkpoint, tmp_path):
    load(checkpoint, bits=4).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert not any("proj.weight" in name for name in stored)
    assert sum(name.endswith(".phi") for name in stored) == 14


def test_shards_and_another_dtype(checkpoint, logits_of, tmp_path):
    model = load(checkpoint, bits=4)
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for name, layer in layers(again).items():
        assert layer.dtype == torch.float32
        assert layer.fingerprint == layers(model)[name].fingerprint
    assert logits_of(again).dtype == torch.float32


def test_conv1d(make_base, logits_of, tmp_path):
    make_base("gpt2").save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", bits=4, group_size=8)
    assert all(layer.is_conv1d for layer in layers(model).values())
    model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits_of(load(tmp_path / "base"), "gpt2"), logits_of(model, "gpt2"))


def test_tied_output_layer_stays_as_it_is(make_base, tmp_path):
    make_base("qwen2").save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", bits=4)
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(ValueError, match="`lm_head` is tied"):
        load(tmp_path / "plain", target_modules=["lm_head", "q_proj"])


def test_packed_exports_are_low_bit_bases():
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "export-packed").eval()
    ids = torch.arange(12).reshape(1, 12) * 5 % 32
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, load_quantized(GOLDEN / "export-packed")(ids).logits)
    assert len(layers(model)) == 6


def test_a_packed_export_saved_again_is_a_low_bit_base(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "export-packed").eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(12).reshape(1, 12) * 5 % 32
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("kind", ["phi", "scale0", "zero_point", "norm"])
def test_one_changed_bit_is_noticed(kind, checkpoint, tmp_path):
    load(checkpoint, bits=3, symmetric=False).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if kind in name)
    tensors[name].flatten().view(torch.uint8)[3] ^= 4
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="damaged or were changed.*" + name.rpartition(".")[0]):
        load(tmp_path / "base")


@pytest.mark.parametrize("kind", ["phi", "scale0", "norm"])
def test_a_missing_tensor_is_noticed(kind, checkpoint, tmp_path):
    load(checkpoint, bits=3).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if kind in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not whole|damaged"):
        load(tmp_path / "base")


def test_under_fsdp_the_first_process_alone_reads_the_files(checkpoint, tmp_path, monkeypatch):
    made = load(checkpoint, bits=4)
    made.save_pretrained(tmp_path / "base")

    read, digest = [], quantizer.digest
    monkeypatch.setattr(quantizer, "digest", lambda tensor: read.append(tensor) or digest(tensor))
    monkeypatch.setattr(quantizer, "is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(quantizer, "is_local_dist_rank_0", lambda: False)
    other = load(tmp_path / "base")
    for name, layer in layers(made).items():
        assert layers(other)[name].fingerprint == layer.fingerprint
    assert not read
    monkeypatch.setattr(quantizer, "is_local_dist_rank_0", lambda: True)
    load(tmp_path / "base")
    assert len(read) == len(made.config.quantization_config.digests)


def rewrite(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=8), "format_version` is 8.*pip install -U"),
        (lambda q: q.update(modules={}), "names no module"),
        (lambda q: next(iter(q["modules"].values())).update(bits=9), "2 to 8"),
        (lambda q: next(iter(q["modules"].values())).update(shape=[1]), "shape"),
        (lambda q: next(iter(q["modules"].values())).update(colour=1), "colour"),
        (lambda q: q["modules"].update(nowhere=next(iter(q["modules"].values()))), "nowhere"),
    ],
)
def test_bad_configurations_are_refused(change, message, checkpoint, tmp_path):
    load(checkpoint, bits=3).save_pretrained(tmp_path / "base")
    rewrite(tmp_path / "base", change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "base")


def test_a_config_of_another_architecture_is_refused(make_base, checkpoint, tmp_path):
    load(checkpoint, bits=3).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ValueError, match=r"has shape \(32, 96\)"):
        load(tmp_path / "base")


def test_weights_that_are_not_finite_are_refused(make_base, tmp_path):
    model = make_base("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model.layers.1.mlp.up_proj` have NaN"):
        load(tmp_path, bits=4)


def test_a_checkpoint_without_a_target_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weight for `model.layers.0.mlp.up_proj`"):
        load(checkpoint, bits=4)


def test_group_sizes_that_do_not_fit_are_refused(checkpoint):
    with pytest.raises(
        ValueError, match=r"`model.layers.0.self_attn.q_proj`.*7 does not divide 32"
    ):
        load(checkpoint, group_size=7)


def test_names_that_fit_nothing_are_refused(checkpoint):
    with pytest.raises(ValueError, match="names no Linear"):
        load(checkpoint, target_modules=["nowhere"])


def test_excluded_modules_stay_as_they_are(checkpoint):
    model = load(checkpoint, exclude_modules=["down_proj"])
    assert len(layers(model)) == 12
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_fields_are_those_of_the_adapter_with_the_same_defaults():
    base, adapter = LowBitConfig(), LRQATConfig()
    for name in ("bits", "group_size", "symmetric", "scale_dtype", "range_estimator", "range_p"):
        assert getattr(base, name) == getattr(adapter, name)


def test_the_trainer_refuses_the_base_alone(checkpoint, tmp_path):
    from transformers import Trainer, TrainingArguments

    with pytest.raises(ValueError, match="adapters"):
        Trainer(model=load(checkpoint, bits=4), args=TrainingArguments(tmp_path / "out"))


def test_generation_runs(checkpoint):
    model = load(checkpoint, bits=4)
    assert model.generate(torch.arange(5)[None] + 3, max_new_tokens=4).shape == (1, 9)


def test_a_copy_of_the_folder_is_the_same_base(checkpoint, logits_of, tmp_path):
    model = load(checkpoint, bits=4)
    model.save_pretrained(tmp_path / "base")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    assert torch.equal(logits_of(load(tmp_path / "elsewhere")), logits_of(model))
