"""The package's own format: a directory that is not whole or does not fit together is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_lrqat.export import export_model, load_quantized


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "out"
    export_model(
        make_model(bits=3, symmetric=False, group_size=16), folder, format="packed", progress=False
    )
    return folder


def edited(source, target, change):
    shutil.copytree(source, target)
    state, config = (
        load_file(source / "model.safetensors"),
        json.loads((source / "config.json").read_text()),
    )
    change(state, config)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


NAME = "model.layers.0.mlp.up_proj"


def module(field, value):
    def change(state, config):
        config["quantization_config"]["modules"][NAME][field] = value

    return change


def tensor(kind, edit):
    def change(state, config):
        state[f"{NAME}.{kind}"] = edit(state[f"{NAME}.{kind}"])

    return change


def spoiled(value):
    def edit(scale):
        scale[0, 0] = value
        return scale

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state, config: state.pop(f"{NAME}.codes"),
            f"`{NAME}` in .* is damaged: the codes are missing",
        ),
        (lambda state, config: state.pop(f"{NAME}.zero_points"), "the zero_points are missing"),
        (
            tensor("codes", lambda t: t[:, 1:].contiguous()),
            r"the codes must be \(192, 24\) of torch.uint8",
        ),
        (
            tensor("scale", lambda t: t.float()),
            "the scale must be .* of torch.bfloat16, but are .* of torch.float32",
        ),
        (tensor("scale", spoiled(torch.nan)), "scales must be finite and above 0"),
        (tensor("scale", spoiled(-1.0)), "scales must be finite and above 0"),
        (module("bits", 4), r"the codes must be \(192, 32\)"),
        (module("bits", 9), "`bits` must be 2 to 8"),
        (module("group_size", 7), "`group_size` must divide"),
        (module("symmetric", True), "zero_points are stored, but a symmetric grid has none"),
        (module("shape", [10**9, 10**9]), "the codes must be"),
        (module("shape", "none"), "is damaged"),
        (
            lambda state, config: state.pop("model.norm.weight"),
            "do not fit its config.json: model.norm.weight",
        ),
        (
            lambda state, config: state.update(extra=torch.ones(1)),
            "do not fit its config.json: extra",
        ),
        (
            lambda state, config: config["quantization_config"].update(format_version=6),
            "is of version 6 of the format",
        ),
        (
            lambda state, config: config["quantization_config"].update(quant_method="gptq"),
            "is quantised by gptq; load",
        ),
        (
            lambda state, config: config.pop("quantization_config"),
            "holds no model that `export_model",
        ),
        (lambda state, config: config.update(architectures=["AutoConfig"]), "has no model class"),
    ],
)
def test_damage(change, message, exported, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_quantized(edited(exported, tmp_path / "damaged", change))


def test_an_index_that_leads_elsewhere(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "own")
    (tmp_path / "own" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tmp_path / "own" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '../outside.safetensors', which is elsewhere"):
        load_quantized(tmp_path / "own")


def test_files_that_are_not_whole(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "cut")
    data = (exported / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"the weights in .* are not whole"):
        load_quantized(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the weights in .* are not whole"):
        load_quantized(tmp_path / "cut")
    with pytest.raises(ValueError, match="holds no model that `export_model"):
        load_quantized(tmp_path)


def test_another_dtype_is_rounded_to(exported):
    own, wide = load_quantized(exported), load_quantized(exported, dtype=torch.float32)
    assert own.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    for name, parameter in own.named_parameters():
        assert torch.equal(parameter.float(), wide.get_parameter(name))
