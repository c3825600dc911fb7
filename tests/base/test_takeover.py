"""Integers of GPTQ, AWQ and compressed-tensors checkpoints taken over as they are."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from peft_lrqat import LowBitConfig, LRQATConfig, export_model, load_low_bit
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.demo import model_path


@pytest.fixture
def folder(make_base, tmp_path):
    """A plain checkpoint on disk, in float16."""
    make_base("llama", torch.float16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, DowncastLinear)}


def check_weights(model, weights):
    found = layers(model)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].stored_weight().dtype == weight.dtype
        assert torch.equal(found[name].stored_weight(), weight)


def gptq_settings(bits, group_size, version, symmetric, **more):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "checkpoint_format": version,
        "desc_act": False,
        **more,
    }


@pytest.fixture
def gptq(folder, make_gptq, quantise_folder):
    """``gptq(...)``: the folder as a GPTQ checkpoint, and its weights by module."""

    def make(bits=4, group_size=16, version="gptq", symmetric=False, order=None, skip=()):
        def module(name, weight):
            if name.rpartition(".")[2] in skip:
                return None
            return make_gptq(
                *weight.shape,
                bits=bits,
                group_size=group_size,
                version=version,
                symmetric=symmetric,
                order=order,
            )

        settings = gptq_settings(bits, group_size, version, symmetric)
        return quantise_folder(folder, settings, module)

    return make


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, group_size, symmetric, version, folder, make_base, gptq, quantise_folder):
    # Widths and heights of the tiny model fill whole words at every width but 3 bits.
    skip = ("down_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if bits == 3 else ()
    weights = gptq(bits, group_size, version, symmetric, skip=skip)
    model = load_low_bit(folder)
    check_weights(model, weights)
    for name in weights:
        grid = model.get_submodule(name).format.grid
        assert (grid.bits, grid.symmetric, grid.group_size) == (bits, symmetric, group_size)
        assert model.get_submodule(name).format.scale_dtype == "float16"


def test_awq(folder, make_awq, quantise_folder):
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    weights = quantise_folder(
        folder, settings, lambda name, weight: make_awq(*weight.shape, group_size=16)
    )
    check_weights(load_low_bit(folder), weights)


def test_the_logits_are_those_of_the_weights(folder, gptq, logits_of):
    weights = gptq()
    model = load_low_bit(folder)
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float16).eval()
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(state | {f"{n}.weight": w for n, w in weights.items()})
    assert torch.equal(logits_of(model), logits_of(plain))


def test_modules_that_are_plain_there_stay_plain(folder, gptq):
    before = load_file(folder / "model.safetensors")
    gptq(skip=("down_proj", "q_proj"))
    model = load_low_bit(folder)
    assert len(layers(model)) == 10
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"):
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


def test_saved_it_is_a_low_bit_base(folder, gptq, logits_of, tmp_path):
    weights = gptq()
    model = load_low_bit(folder)
    model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    check_weights(again, weights)
    assert torch.equal(logits_of(again), logits_of(model))
    stored = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]
    assert stored["source"] == gptq_settings(4, 16, "gptq", False)
    assert (stored["bits"], stored["group_size"], stored["symmetric"]) == (4, 16, False)
    assert stored["scale_dtype"] == "float16"
    assert not any("qweight" in key for key in load_file(tmp_path / "base" / "model.safetensors"))


def test_shards(folder, gptq):
    weights = gptq()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    # Shards that cut modules apart: each part of one lies in another file.
    index = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        part = {name: tensors[name] for name in names if index[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    check_weights(load_low_bit(folder), weights)


# Act-order


def test_act_order_with_one_group_per_row_is_kept(folder, gptq):
    check = gptq(group_size=-1, order=lambda g_idx: g_idx)
    check_weights(load_low_bit(folder), check)


def test_groups_in_another_order_are_kept(folder, gptq):
    check_weights_of = gptq(order=lambda g_idx: g_idx.flip(0))
    check_weights(load_low_bit(folder), check_weights_of)


def test_a_group_that_is_not_there_is_named(folder, gptq):
    gptq(order=lambda g_idx: torch.where(g_idx == 1, -1, g_idx))
    with pytest.raises(ValueError, match="g_idx names group -1, but there are"):
        load_low_bit(folder)


def test_act_order_that_scatters_groups_is_refused(folder, gptq):
    gptq(order=lambda g_idx: g_idx[torch.randperm(len(g_idx))])
    with pytest.raises(ValueError, match=r"act-order.*desc_act=False.*static_groups"):
        load_low_bit(folder)


# compressed-tensors


@pytest.fixture
def compressed(make_peft, tmp_path):
    """``compressed(**fields)``: a directory that our exporter wrote in compressed-tensors."""

    def make(dtype=torch.bfloat16, **fields):
        model = make_peft("llama", dtype, **fields)
        export_model(model, tmp_path / "export", format="compressed-tensors")
        return tmp_path / "export"

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_as_transformers_loads_it(
    bits, symmetric, group_size, dtype, compressed
):
    scale_dtype = str(dtype).removeprefix("torch.")
    path = compressed(
        dtype, bits=bits, symmetric=symmetric, group_size=group_size, scale_dtype=scale_dtype
    )
    model = load_low_bit(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    check_weights(model, {n: m.weight for n, m in theirs.named_modules() if n in layers(model)})
    assert len(layers(model)) == 14
    with torch.no_grad():
        ids = torch.arange(12)[None]
        assert torch.equal(model(ids).logits, theirs(ids).logits)


def test_per_module_widths(compressed):
    path = compressed(bits=3, bits_pattern={"down_proj": 8}, group_size_pattern={"q_proj": 8})
    for name, layer in layers(load_low_bit(path)).items():
        assert layer.format.grid.bits == (8 if "down_proj" in name else 3)
        assert layer.format.grid.group_size == (8 if "q_proj" in name else -1)


# Our own exports


@pytest.fixture
def exported(tmp_path):
    """``exported(format, symmetric)``: a trained demo model and the directory of its export."""

    def make(format, symmetric):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16)
        config = LRQATConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            bits=4,
            group_size=32,
            symmetric=symmetric,
            range_estimator="minmax",
            init_weights=False,
        )
        trained = get_peft_model(base, config).eval()
        export_model(trained, tmp_path / "export", format=format)
        return trained, tmp_path / "export"

    return make


FORMATS = pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
SYMMETRIC = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@torch.no_grad()
def logits(model):
    return model(torch.arange(24)[None]).logits


@FORMATS
@SYMMETRIC
def test_our_exports_come_back(format, symmetric, exported):
    trained, path = exported(format, symmetric)
    model = load_low_bit(path).eval()
    merged = trained.merge_and_unload()
    assert torch.equal(logits(model), logits(merged))
    check_weights(model, {name: merged.get_submodule(name).weight for name in layers(model)})


def adapted(model, trained):
    config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    peft = get_peft_model(model, config).eval()
    if trained:
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lrqat_scale" in name:
                    parameter *= 1 + 0.2 * torch.rand_like(parameter)
                elif "lrqat_" in name:
                    parameter.normal_(std=0.5)
    return peft


@FORMATS
@SYMMETRIC
def test_a_fresh_adapter_exports_the_very_same_tensors(format, symmetric, exported, tmp_path):
    path = exported(format, symmetric)[1]
    export_model(adapted(load_low_bit(path), trained=False), tmp_path / "again", format=format)
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@FORMATS
@SYMMETRIC
def test_what_is_trained_leaves_in_the_same_format(format, symmetric, exported, tmp_path):
    path = exported(format, symmetric)[1]
    before = logits(load_low_bit(path).eval())
    # GPTQ holds scales in float16 alone, which training in that dtype gives.
    peft = adapted(load_low_bit(path), trained=True)
    assert not torch.equal(logits(peft), before)
    export_model(peft, tmp_path / "again", format=format)
    assert torch.equal(logits(load_low_bit(tmp_path / "again").eval()), logits(peft))


# Scales that training could not keep


def edit(folder, kind, change):
    """Changes the first tensor of a kind in place."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(f".{kind}"))
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name.rpartition(".")[0]


def test_scales_of_zero_mean_the_weight_zero(folder, gptq):
    weights = gptq()

    def change(scales):
        scales[0, :3] = 0
        return scales

    name = edit(folder, "scales", change)
    model = load_low_bit(folder)
    weights[name][:3, :16] = 0
    check_weights(model, weights)
    assert (model.get_submodule(name).scale0 > 0).all()


def test_groups_of_zeros_have_a_normal_scale(folder, gptq):
    weights = gptq(bits=4, version="gptq_v2")

    def change(scales):
        scales[0] = 3e-6
        return scales

    name = edit(folder, "scales", change)
    tensors = load_file(folder / "model.safetensors")
    # The zero points of the first group as the codes of its 16 inputs.
    zeros = tensors[f"{name}.qzeros"].view(torch.uint8)[0]
    zeros = torch.stack([zeros & 15, zeros >> 4], dim=-1).flatten().int()
    tensors[f"{name}.qweight"][:2] = sum(zeros << (4 * i) for i in range(8))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layer = load_low_bit(folder).get_submodule(name)
    assert layer.format.scale_dtype == "float16"
    assert (layer.stored_weight()[:, :16] == 0).all()
    assert torch.equal(layer.stored_weight()[:, 16:], weights[name][:, 16:])


def test_scales_below_the_smallest_normal_number_stay_exact(folder, gptq):
    weights = gptq()
    small = 3e-6

    def change(scales):
        scales[0, :3] = small
        return scales

    name = edit(folder, "scales", change)
    layer = load_low_bit(folder).get_submodule(name)
    assert layer.format.scale_dtype == "float32"
    assert torch.equal(layer.scale0[:3, 0], torch.tensor(small).half().float().expand(3))
    assert torch.equal(layer.stored_weight()[:, 16:], weights[name][:, 16:])


@pytest.mark.parametrize("value", [-0.01, float("nan"), float("inf")])
def test_scales_that_are_no_step_are_refused(value, folder, gptq):
    gptq()

    def change(scales):
        scales[0, 0] = value
        return scales

    name = edit(folder, "scales", change)
    with pytest.raises(ValueError, match=rf"`{name}`: 1 of .* scales are negative or not finite"):
        load_low_bit(folder)


def test_scales_of_another_dtype_than_the_model_are_told(folder, gptq, monkeypatch):
    gptq()
    said = []
    monkeypatch.setattr("peft_lrqat.base.takeover.logger.warning", said.append)
    layer = next(iter(layers(load_low_bit(folder, dtype=torch.bfloat16)).values()))
    assert (layer.format.scale_dtype, layer.dtype) == ("float16", torch.bfloat16)
    assert "dtype=torch.float16" in said[0]
    said.clear()
    load_low_bit(folder)
    assert not said


# Bad input


def test_zero_points_that_readers_disagree_on_are_refused(folder, gptq):
    gptq()

    def change(qzeros):
        qzeros[0, 0] |= 15
        return qzeros

    edit(folder, "qzeros", change)
    with pytest.raises(ValueError, match=r"1 of its zero points are stored as 15.*gptq_v2"):
        load_low_bit(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "aqlm"}, "quantised by 'aqlm'.*gptq, awq, compressed-tensors"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "made for one kernel"),
        ({"quant_method": "gptq", "pack_dtype": "int16"}, "pack_dtype"),
        ({"quant_method": "awq", "version": "gemv"}, "must be gemm"),
        ({"quant_method": "awq", "bits": 3}, "must be 4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "pack-quantized"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"format": "pack-quantized", "input_activations": {"num_bits": 8}}
                },
            },
            "describes activations",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "kv_cache_scheme": {"num_bits": 8},
            },
            "KV cache",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "sparse",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "dicts"),
    ],
    ids=str,
)
def test_layouts_that_cannot_be_kept_are_refused(settings, message, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_low_bit(folder)


def drop(folder, kind):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(f".{kind}"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name.rpartition(".")[0]


@pytest.mark.parametrize("kind", ["qzeros", "scales"])
def test_a_missing_tensor_is_refused(kind, folder, gptq):
    gptq()
    name = drop(folder, kind)
    with pytest.raises(ValueError, match=rf"`{name}`: the files have no {kind}"):
        load_low_bit(folder)


def test_files_without_integers_are_refused(folder, gptq):
    gptq(skip=[f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")])
    with pytest.raises(ValueError, match="no `qweight` tensor"):
        load_low_bit(folder)


@pytest.mark.parametrize("kind", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_tensor_of_another_shape_is_refused(kind, folder, gptq):
    gptq()
    name = edit(folder, kind, lambda tensor: tensor[:-1].contiguous())
    with pytest.raises(ValueError, match=rf"GPTQ cannot be taken over: `{name}`"):
        load_low_bit(folder)


def test_a_checkpoint_that_lies_about_symmetry_is_refused(folder, gptq):
    gptq()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="calls itself symmetric"):
        load_low_bit(folder)


def test_weights_that_the_model_has_no_place_for_are_refused(folder, gptq):
    gptq()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"model.layers.1.*no linear layer"):
        load_low_bit(folder)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_that_the_model_has_no_place_for(value, folder, gptq):
    weights = gptq()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.bias"] = torch.full((32,), value, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if value:
        with pytest.raises(ValueError, match=f"bias for `{name}` that is not zero"):
            load_low_bit(folder)
    else:
        check_weights(load_low_bit(folder), weights)


# The door


def test_plain_and_stored_checkpoints_come_in_by_the_same_door(folder, logits_of, tmp_path):
    with pytest.raises(ValueError, match=r"not quantised.*LowBitConfig"):
        load_low_bit(folder)
    model = load_low_bit(folder, LowBitConfig(bits=3))
    model.save_pretrained(tmp_path / "base")
    again = load_low_bit(tmp_path / "base")
    assert torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(ValueError, match="already quantised by 'lrqat'"):
        load_low_bit(tmp_path / "base", LowBitConfig(bits=3))
