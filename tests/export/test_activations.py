"""Rounded activations in an export: compressed-tensors where a runtime has kernels for them.

Elsewhere they are refused by name.
"""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from peft_lrqat import LRQATConfig
from peft_lrqat.export import export_model, verify_export
from peft_lrqat.formats.table import FORMATS


WRITTEN = [
    {"bits": 4},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "activation_symmetric": True},
    {"bits": 8},
    {"bits": 4, "bits_pattern": {"down_proj": 8}},
]
every_written = pytest.mark.parametrize(
    "fields", WRITTEN, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items())
)
IDS = torch.arange(32)[None]


@every_written
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_not_one_weight_changes(fields, dtype, make_model, tmp_path):
    model = make_model(dtype, activation_bits=8, **fields)
    export_model(model, tmp_path / "out", progress=False)
    found = verify_export(model, tmp_path / "out", format="compressed-tensors")
    assert found.exact
    assert found.layers == 42
    if dtype == torch.float32 and fields in ({"bits": 4}, {"bits": 8}):
        # transformers rounds the inputs as well, by the same formula. It sums the products of
        # weights in groups in another order, and an input near the middle between two integers may
        # then go to the other.
        assert found.logits_difference == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_loaded_model_rounds_its_inputs(symmetric, dtype, make_model, tmp_path):
    """The loaded model differs from the trained one by about as much as rounding itself does.

    In transformers, symmetric steps are max / 127.5 (max / 127 here and in vLLM's kernels), and
    steps are rounded to the model's dtype. So the same input may become a neighbouring integer.
    """
    model = make_model(dtype, activation_bits=8, activation_symmetric=symmetric, group_size=32)
    export_model(model, tmp_path / "out", progress=False)
    export_model(model, tmp_path / "weights", activations="ignore", progress=False)
    with torch.no_grad():
        trained = model(input_ids=IDS).logits.float()
        loaded, weights_alone = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype)(
                input_ids=IDS
            ).logits.float()
            for name in ("out", "weights")
        )
    rounding = (weights_alone - trained).square().mean()
    assert (loaded - weights_alone).square().mean() > rounding / 4
    assert (loaded - trained).square().mean() < 4 * rounding
    if dtype == torch.float32 and not symmetric:
        assert (loaded - trained).square().mean() < rounding / 4


@every_written
def test_files_say_it_as_vllm_reads_it(fields, make_model, tmp_path):
    export_model(make_model(activation_bits=8, **fields), tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["format"], written["quantization_status"]) == ("int-quantized", "compressed")
    for group in written["config_groups"].values():
        inputs, weights = group["input_activations"], group["weights"]
        assert (inputs["num_bits"], inputs["type"], inputs["strategy"], inputs["dynamic"]) == (
            8,
            "int",
            "token",
            True,
        )
        assert inputs["symmetric"] == fields.get("activation_symmetric", False)
        assert weights["symmetric"]
        assert weights["num_bits"] in (4, 8)
        assert weights["strategy"] == ("channel" if "group_size" not in fields else "group")
    assert "kv_cache_scheme" not in written
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
        assert weight.dtype == torch.int8
        assert int(weight.amin()) >= -(2 ** (fields["bits"] - 1))
        assert int(weight.amax()) < 2 ** (fields["bits"] - 1)
        assert (
            file.get_tensor("model.layers.0.self_attn.q_proj.weight_scale").dtype == torch.bfloat16
        )


def test_three_bits_in_a_container_of_four(make_model, tmp_path):
    model = make_model(bits=3, activation_bits=8)
    with pytest.raises(ValueError, match="these weights are symmetric, 3 bits"):
        export_model(model, tmp_path / "out", progress=False)
    export_model(model, tmp_path / "out", container_bits=4, progress=False)
    assert verify_export(model, tmp_path / "out", format="compressed-tensors").exact


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        (
            "gguf",
            {"activation_bits": 8, "group_size": 32},
            "llama.cpp rounds activations its own way",
        ),
        ("gptq", {"activation_bits": 8, "group_size": 32}, "gptq stores weights alone"),
        ("packed", {"activation_bits": 8}, "packed stores weights alone"),
        ("dequantized", {"activation_bits": 8}, "dequantized stores weights alone"),
        (
            "compressed-tensors",
            {"activation_bits": 4},
            "inputs of 8 bits, which vLLM has kernels for, but .* is 4",
        ),
        ("compressed-tensors", {"activation_bits": 8, "symmetric": False}, "asymmetric, 4 bits"),
        (
            "compressed-tensors",
            {"activation_bits": 8, "bits": 8, "group_size": 32},
            "8 bits, group size 32",
        ),
        (
            "compressed-tensors",
            {"kv_cache_bits": 8},
            "cannot carry `kv_cache_bits`=8: vLLM's low-bit cache",
        ),
        ("packed", {"kv_cache_bits": 4, "activation_bits": 8}, "cannot carry `kv_cache_bits`=4"),
    ],
    ids=lambda value: str(value).replace(" ", "-")[:40],
)
def test_refused_before_a_file_is_written(format, fields, message, make_model, tokenizer, tmp_path):
    model = make_model(**fields)
    with pytest.raises(ValueError, match=message) as error:
        export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    assert "activations='ignore'" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_weights_alone_when_asked_for(format, make_model, tokenizer, tmp_path):
    fields = {"activation_bits": 4, "kv_cache_bits": 4}
    size = -1 if format == "gemma" else 32
    options = {"format": format, "tokenizer": tokenizer, "progress": False}
    export_model(
        make_model(group_size=size, **fields), tmp_path / "out", activations="ignore", **options
    )
    export_model(make_model(group_size=size), tmp_path / "weights", **options)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in (tmp_path / "weights").iterdir()}
    for name in files - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "weights" / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained with rounded activations, of which these files say nothing" in card
    assert "w4a4kv4" not in card


def test_card_says_what_the_files_do(make_model, tmp_path):
    export_model(make_model(activation_bits=8), tmp_path / "out", progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- w4a8\n" in card
    assert "inputs of these layers: 8 bits, asymmetric, one range per token" in card
    assert "say nothing" not in card


def test_unknown_choice_is_refused(make_model, tmp_path):
    with pytest.raises(
        ValueError, match="`activations` must be one of 'write', 'ignore', but is 'drop'"
    ):
        export_model(make_model(), tmp_path / "out", activations="drop")


@pytest.mark.parametrize(
    ("runtime", "fields", "message"),
    [
        (
            "llama.cpp",
            {"activation_bits": 8},
            "llama.cpp cannot carry `activation_bits`=8: llama.cpp rounds",
        ),
        ("vllm", {"activation_bits": 4}, "but `activation_bits` is 4"),
        ("vllm", {"kv_cache_bits": 8}, "vllm cannot carry `kv_cache_bits`=8"),
        ("vllm", {"activation_bits": 8, "bits": 8}, "8 bits, group size 128"),
        ("transformers", {"activation_bits": 8, "bits": 3}, "3 bits"),
        ("transformers", {"kv_cache_bits": 4}, "transformers cannot carry `kv_cache_bits`=4"),
    ],
)
def test_runtime_that_cannot_is_refused_before_training(runtime, fields, message):
    with pytest.raises(ValueError, match=message):
        LRQATConfig.for_runtime(runtime, **fields)


@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_runtime_that_can(runtime):
    assert LRQATConfig.for_runtime(runtime, activation_bits=8).activation_bits == 8
    assert LRQATConfig.for_runtime(runtime, activation_bits=8, bits=8, group_size=-1).bits == 8
