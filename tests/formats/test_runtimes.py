"""Presets are stored at about the bits that are trained, and joined layers are alike."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from peft_lrqat import LRQATConfig
from peft_lrqat.demo import model_path
from peft_lrqat.export import export_model
from peft_lrqat.export.linears import lrqat_layers, target_of
from peft_lrqat.formats.base import SafetensorsFormat
from peft_lrqat.formats.runtimes import RUNTIMES
from peft_lrqat.formats.sizes import stored_bits
from peft_lrqat.formats.table import FORMATS


@pytest.fixture
def said():
    """What the package logs."""
    messages = []

    class Listener(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("peft_lrqat")
    logger.addHandler(listener)
    yield messages
    logger.removeHandler(listener)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "gguf"])
def test_stored_bytes_are_those_of_the_tensors(format, bits, group_size, symmetric, make_model):
    from peft_lrqat.export.exporter import deployed_model

    model = make_model(bits=bits, group_size=group_size, symmetric=symmetric)
    deployed, kind = deployed_model(model, "default"), FORMATS[format]
    assert isinstance(kind, SafetensorsFormat)
    for target in list(deployed.targets.values())[:7]:
        if kind.why_not(target.grid, target.scale_dtype, target.in_features):
            continue
        linear = deployed.quantize(target)
        if linear.zero_point is not None:
            linear.zero_point.clamp_(min=1)
        tensors = dict(kind.tensors_of(linear, None)).values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert size == kind.stored_bytes(target)


@pytest.mark.parametrize(
    ("runtime", "bits", "group_size", "stored"),
    [
        ("llama.cpp", 2, -1, 2.625),  # in K blocks, like the next
        ("llama.cpp", 3, -1, 3.4375),
        ("llama.cpp", 4, 32, 4.5),
        ("llama.cpp", 5, 32, 5.5),
        ("llama.cpp", 6, 256, 6.5625),
        ("llama.cpp", 8, 32, 8.5),
        ("vllm", 4, 128, 4.125),
        ("transformers", 3, 128, 3.125),
    ],
)
def test_presets_take_the_fewest_bits(runtime, bits, group_size, stored, said):
    config = LRQATConfig.for_runtime(runtime, bits=bits, target_modules="all-linear")
    assert config.group_size == group_size
    assert config.k_quant == (group_size == -1)
    found = RUNTIMES[runtime].stored_bits(config.grid_of(bits, group_size))
    assert found.stored == pytest.approx(stored, abs=1e-4)
    waste = [message for message in said if "bits each" in message]
    trained = bits + 4 / 16 + 1 / 16 if config.k_quant else bits + 16 / group_size
    if not config.symmetric:
        trained += bits / 16
    assert bool(waste) == found.wasteful == (stored > 1.1 * trained)


def test_k_blocks_are_chosen_where_they_take_less():
    llama_cpp = RUNTIMES["llama.cpp"]
    assert llama_cpp.preset(2) == {
        "group_size": -1,
        "symmetric": False,
        "scale_dtype": "float16",
        "k_quant": True,
    }
    assert llama_cpp.preset(2, True)["symmetric"] is True
    assert "k_quant" in llama_cpp.preset(4, False)
    for preset in (
        llama_cpp.preset(4),
        llama_cpp.preset(3, False),
        llama_cpp.preset(2, shapes=[(512, 512), (512, 576)]),
        RUNTIMES["vllm"].preset(2),
    ):
        assert "k_quant" not in preset


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"bits": 2, "balanced": True}, (-1, True, True, "float16")),
        ({"bits": 4, "balanced": True}, (-1, True, True, "float16")),
        ({"bits": 3, "balanced": True}, (32, True, False, "bfloat16")),
        ({"bits": 2, "balanced": True, "k_quant": False}, (256, True, False, "bfloat16")),
        ({"bits": 2, "k_quant": False}, (256, True, False, "bfloat16")),
        ({"bits": 3, "scale_dtype": "bfloat16"}, (256, True, False, "bfloat16")),
        ({"bits": 5, "k_quant": True}, (-1, True, True, "float16")),
    ],
    ids=str,
)
def test_a_preset_goes_with_what_is_given(fields, found):
    config = LRQATConfig.for_runtime("llama.cpp", **fields)
    names = ("group_size", "symmetric", "k_quant", "scale_dtype")
    assert tuple(getattr(config, name) for name in names) == found


def test_layers_that_a_runtime_has_no_place_for():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96))
    for runtime in RUNTIMES:
        with pytest.raises(ValueError, match="cannot hold transformers' Conv1D layers"):
            LRQATConfig.for_runtime(runtime, model=model)


def test_a_preset_divides_the_widths_of_the_model():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path()))
    for runtime, bits, group_size in (("vllm", 4, 64), ("llama.cpp", 4, 32)):
        config = LRQATConfig.for_runtime(
            runtime, bits=bits, model=model, target_modules="all-linear"
        )
        assert config.group_size == group_size
    with pytest.raises(ValueError, match="has no linear layers to quantise"):
        LRQATConfig.for_runtime("vllm", model=torch.nn.Embedding(2, 2))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"]},
        {"target_modules": r".*\.(q|k|v|up)_proj"},
        {"target_modules": "all-linear", "bits_pattern": {"q_proj": 8}},
        {"target_modules": "all-linear", "group_size_pattern": {"gate_proj": 32}},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [3]},
    ],
    ids=str,
)
def test_vllm_joins_layers_that_must_be_alike(fields):
    with pytest.raises(
        ValueError, match=r"vllm joins `.*` into one layer, which must be quantised"
    ):
        LRQATConfig.for_runtime("vllm", task_type="CAUSAL_LM", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"target_modules": "all-linear", "bits_pattern": {"down_proj": 8}},
        {"target_modules": "all-linear", "bits_pattern": {"gate_proj": 8, "up_proj": 8}},
    ],
    ids=str,
)
def test_layers_that_are_alike_are_taken(fields):
    assert LRQATConfig.for_runtime("vllm", task_type="CAUSAL_LM", **fields).bits == 4


def test_an_export_says_what_is_stored(make_model, tokenizer, said, tmp_path):
    fields = {"bits": 2, "group_size": 32, "target_modules": ["q_proj"]}
    for format, waste in (("gguf", True), ("packed", False)):
        said.clear()
        model = make_model(**fields)
        options = {"format": format, "tokenizer": tokenizer, "progress": False}
        export_model(model, tmp_path / format, **options)
        targets = [target_of(name, layer) for name, layer in lrqat_layers(model).items()]
        bits = stored_bits(targets, FORMATS[format])
        assert bits.wasteful == waste
        card = (tmp_path / format / "README.md").read_text()
        assert f"stored at {bits.stored:.2f} bits per weight" in card
        assert ("although training needs 2.50" in card) == waste
        assert any("stores these weights at 4.50 bits each" in m for m in said) == waste


def test_an_export_names_the_runtime_that_does_not_load_it(make_model, said, tmp_path):
    export_model(make_model(target_modules=["q_proj"]), tmp_path / "out", progress=False)
    assert any("vllm joins" in message for message in said)
    said.clear()
    export_model(make_model(), tmp_path / "all", progress=False)
    assert not any("vllm joins" in message for message in said)
