"""Every format, read back by its loader, has the very weights that were trained.

What is refused is refused before anything is written.
"""

import json
import logging
import resource

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat import LRQATLayer
from peft_lrqat.demo import model_path
from peft_lrqat.export import export_model, verify_export
from peft_lrqat.export.exporter import is_untrained
from peft_lrqat.export.linears import quantized_linear
from peft_lrqat.formats.table import FORMATS
from peft_lrqat.quant.grid import Grid
from peft_lrqat.quant.packing import packed_bytes


SETTINGS = [
    {"bits": 2, "group_size": 32},
    {"bits": 3},
    {"bits": 3, "symmetric": False, "group_size": 16},
    {"bits": 4},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "symmetric": False},
    {"bits": 4, "symmetric": False, "group_size": 32},
    {"bits": 5, "downcast": "int"},
    {"bits": 8},
    {"bits": 8, "symmetric": False, "group_size": 32},
]


def layers_of(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LRQATLayer)}


def merged_weights(model):
    """By the path that was there before any export."""
    plain = model.merge_and_unload()
    return {
        name: module.weight
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
    }


def group_size_for(format):
    """Weights that share a scale: 32, or a row where a format holds nothing else."""
    return -1 if format == "gemma" else 32


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "fields", SETTINGS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items())
)
def test_not_one_weight_changes(format, fields, make_model, tokenizer, tmp_path):
    model = make_model(**fields)
    grid = Grid(
        bits=fields["bits"],
        symmetric=fields.get("symmetric", True),
        group_size=fields.get("group_size", -1),
    )
    if reason := FORMATS[format].why_not(grid, "bfloat16", 64):
        with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.q_proj`: ") as error:
            export_model(
                model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False
            )
        assert reason in str(error.value)
        assert not (tmp_path / "out").exists()
        return
    export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    found = verify_export(model, tmp_path / "out", format=format)
    assert found.exact
    assert found.layers == 42
    if format != "gptq":
        # The same weights in the same dtype, multiplied by the same code.
        assert found.logits_difference == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("format", FORMATS)
def test_other_dtypes_of_the_model(format, dtype, make_model, tokenizer, tmp_path):
    model = make_model(dtype, bits=4, group_size=group_size_for(format))
    export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    found = verify_export(model, tmp_path / "out", format=format)
    assert found.exact
    assert not found.logits_difference


@pytest.mark.parametrize(
    "fields", [{"bits": 4, "group_size": 32}, {"bits": 3}, {"bits": 8}], ids=str
)
def test_compressed_tensors_as_transformers_loads_it_by_default(
    fields, make_model, tokenizer, tmp_path
):
    model = make_model(**fields)
    export_model(model, tmp_path / "out", tokenizer=tokenizer, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("The for statement", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(input_ids=ids).logits)
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    weights = merged_weights(model)
    for name, module in loaded.named_modules():
        if name in layers_of(model):
            assert torch.equal(module.weight, weights[name])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["compressed-tensors", "packed", "gptq"])
def test_three_bits_in_a_container_of_four(format, symmetric, make_model, tmp_path):
    model = make_model(bits=3, group_size=32, symmetric=symmetric)
    export_model(model, tmp_path / "out", format=format, container_bits=4, progress=False)
    assert verify_export(model, tmp_path / "out", format=format).exact
    if format == "compressed-tensors":
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    for bits, message in (
        (2, "must be 3, the bits of the weights, to 8, but is 2"),
        (9, "but is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(
                model, tmp_path / "other", format=format, container_bits=bits, progress=False
            )


@pytest.mark.parametrize("format", ["compressed-tensors", "packed", "gptq", "gemma", "dequantized"])
def test_bytes_on_disk_are_those_of_the_formula(format, make_model, tmp_path):
    bits, size = 4, group_size_for(format)
    model = make_model(bits=bits, group_size=size)
    export_model(model, tmp_path / "out", format=format, progress=False)
    expected = 0
    for layer in layers_of(model).values():
        rows, columns = layer.out_features, layer.in_features
        groups = max(1, columns // size)
        expected += {
            "compressed-tensors": rows * -(-columns * bits // 32) * 4 + 2 * rows * groups + 16,
            "packed": rows * packed_bytes(columns, bits) + 2 * rows * groups,
            "gptq": rows * columns * bits // 8
            + 2 * rows * groups
            + groups * rows * bits // 8
            + 4 * columns,
            "gemma": rows * columns * bits // 8 + 4 * rows + 8,
            "dequantized": 2 * rows * columns,
        }[format]
    stored, others = 0, 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            inside = name.rpartition(".")[0] in layers_of(model)
            stored += tensor.numel() * tensor.element_size() * inside
            others += not inside
    assert stored == expected
    assert others == 14  # embeddings, which the head shares, and norms


def test_widths_that_differ_by_module(make_model, tokenizer, tmp_path):
    fields = {"bits": 3, "bits_pattern": {"down_proj": 4}, "group_size_pattern": {"q_proj": 32}}
    for format in ("compressed-tensors", "packed", "gguf", "dequantized"):
        model = make_model(**fields)
        export_model(model, tmp_path / format, format=format, tokenizer=tokenizer, progress=False)
        assert verify_export(model, tmp_path / format, format=format).exact
    with pytest.raises(
        ValueError, match="transformers loads asymmetric compressed-tensors of one width"
    ):
        export_model(make_model(symmetric=False, **fields), tmp_path / "asymmetric", progress=False)
    model = make_model(bits=4, group_size_pattern={"q_proj": 32})
    with pytest.raises(ValueError, match="gptq has one width and group size for the whole model"):
        export_model(model, tmp_path / "gptq", format="gptq", progress=False)


def test_only_some_layers_are_targets(make_model, tokenizer, tmp_path):
    for format in ("compressed-tensors", "packed", "gguf"):
        model = make_model(bits=4, target_modules=["q_proj", "down_proj"])
        export_model(model, tmp_path / format, format=format, tokenizer=tokenizer, progress=False)
        assert verify_export(model, tmp_path / format, format=format).exact


@pytest.mark.parametrize("format", ["compressed-tensors", "gemma", "packed", "dequantized"])
def test_several_files_with_an_index(format, make_model, tmp_path):
    model = make_model(bits=4)
    export_model(model, tmp_path / "out", format=format, max_shard_size="60KB", progress=False)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = 0
    for name in files:
        with safe_open(tmp_path / "out" / name, framework="pt") as file:
            keys = list(file.keys())
            tensors = [file.get_tensor(key) for key in keys]
            size = sum(t.numel() * t.element_size() for t in tensors)
            assert size <= 60_000 or len(tensors) == 1
            sizes += size
            assert {key: index["weight_map"][key] for key in keys} == dict.fromkeys(keys, name)
    assert index["metadata"]["total_size"] == sizes
    assert verify_export(model, tmp_path / "out", format=format).exact


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5", "classifier"])
@pytest.mark.parametrize("format", ["packed", "dequantized", "compressed-tensors", "gemma"])
def test_other_architectures(format, architecture, make_peft, disturb, tmp_path):
    make_peft(architecture, torch.bfloat16)  # the base is made once, and that takes random numbers
    torch.manual_seed(0)
    model = disturb(make_peft(architecture, torch.bfloat16, bits=3))
    refused = {
        (
            "gpt2",
            "compressed-tensors",
        ): "cannot hold transformers' Conv1D layers",
        (
            "gpt2",
            "gemma",
        ): "cannot hold transformers' Conv1D layers",
        ("t5", "gemma"): r"`.*\.wo`: transformers keeps this layer of a T5For.* in float32",
    }
    if message := refused.get((architecture, format)):
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path / "out", format=format, progress=False)
        assert not (tmp_path / "out").exists()
        return
    expected = {
        name: weight.clone() for name, weight in model.merge_and_unload().state_dict().items()
    }
    torch.manual_seed(0)
    model = disturb(make_peft(architecture, torch.bfloat16, bits=3))
    export_model(model, tmp_path / "out", format=format, progress=False)
    if model.peft_config["default"].task_type != "SEQ_CLS":
        assert verify_export(model, tmp_path / "out", format=format).logits_difference == 0
    loaded = load(model, tmp_path / "out", format)
    FORMATS[format].unpack(loaded)
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def load(model, path, format):
    from transformers import CompressedTensorsConfig

    from peft_lrqat.export import load_quantized

    if format == "packed":
        return load_quantized(path)
    options = {}
    if format == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return type(model.get_base_model()).from_pretrained(path, dtype=torch.bfloat16, **options)


def test_a_trained_head_ships_as_it_was_trained(make_peft, tmp_path):
    model = make_peft(
        "llama", torch.bfloat16, modules_to_save=["lm_head"], target_modules=["q_proj"]
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 1
    trained = model.get_base_model().lm_head.modules_to_save["default"].weight
    export_model(model, tmp_path / "out", format="dequantized", progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, trained.to(torch.bfloat16))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_head_that_training_parted_from_the_embeddings(
    saved, format, make_model, tokenizer, tmp_path
):
    model = make_model(bits=4, group_size=group_size_for(format), modules_to_save=[saved])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += torch.randn_like(parameter)
    export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    assert verify_export(model, tmp_path / "out", format=format).exact
    assert model.get_base_model().config.tie_word_embeddings is True
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    export_model(make_model(bits=3), tmp_path / "tied", format="packed", progress=False)
    assert (
        json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"] is True
    )


@pytest.mark.parametrize("format", FORMATS)
def test_trained_tokens_ship_as_they_were_trained(format, make_model, tokenizer, tmp_path):
    size = group_size_for(format)
    model = make_model(bits=4, group_size=size, trainable_token_indices=[3, 5, 90])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += torch.randn_like(parameter)
    export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    assert verify_export(model, tmp_path / "out", format=format).exact
    if format == "dequantized":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        wanted = model.merge_and_unload()
        assert torch.equal(loaded.lm_head.weight, wanted.lm_head.weight)
        assert torch.equal(loaded.model.embed_tokens.weight, wanted.model.embed_tokens.weight)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_gptq_with_zero_points(make_model, tmp_path):
    model = make_model(bits=2, symmetric=False, group_size=32)
    zero_points = [
        layer.low_rank_weight("default").zero_point for layer in layers_of(model).values()
    ]
    assert all(zero_point.all() for zero_point in zero_points)
    export_model(model, tmp_path / "out", format="gptq", progress=False)
    assert verify_export(model, tmp_path / "out", format="gptq").exact
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["sym"], written["bits"], written["checkpoint_format"]) == (False, 2, "gptq")
    zero_points[0][0, 0] = 0
    with pytest.raises(
        ValueError,
        match=r"1 groups of `.*` have the zero point 0, which GPTQ v1 cannot store; use",
    ):
        export_model(model, tmp_path / "other", format="gptq", progress=False)
    assert not (tmp_path / "other").exists()


def test_three_bits_of_gptq_lie_across_words(tmp_path, make_model):
    """As the layout is written down: of 32 integers the 11th is in two words, and the 22nd."""
    model = make_model(bits=3, group_size=32)
    export_model(model, tmp_path / "out", format="gptq", progress=False)
    name, layer = next(iter(layers_of(model).items()))
    codes = quantized_linear(name, layer, "default").codes[0].long() + 4
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        words = [int(word) & 0xFFFFFFFF for word in file.get_tensor(f"{name}.qweight")[:3, 0]]
    whole = words[0] | words[1] << 32 | words[2] << 64
    assert [whole >> 3 * i & 7 for i in range(32)] == codes[:32].tolist()


def test_a_merged_model_exports_the_same(make_model, tmp_path):
    model = make_model(bits=3)
    export_model(model, tmp_path / "before", format="packed", progress=False)
    model.merge_adapter()
    export_model(model, tmp_path / "after", format="packed", progress=False)
    assert (tmp_path / "before/model.safetensors").read_bytes() == (
        tmp_path / "after/model.safetensors"
    ).read_bytes()


def test_one_of_several_adapters(make_model, tmp_path):
    model = make_model(bits=3)
    model.add_adapter("second", model.peft_config["default"])
    export_model(model, tmp_path / "first", format="packed", progress=False)
    export_model(model, tmp_path / "second", format="packed", adapter_name="second", progress=False)
    assert (
        verify_export(
            model, tmp_path / "second", format="packed", adapter_name="second"
        ).different_layers
        == ()
    )
    assert (
        len(
            verify_export(
                model, tmp_path / "second", format="packed", adapter_name="default"
            ).different_layers
        )
        == 42
    )


def test_an_untrained_adapter_is_said_to_be_round_to_nearest(make_model, tmp_path, caplog):
    logger = logging.getLogger("peft_lrqat.export.exporter")
    logger.addHandler(caplog.handler)
    try:
        export_model(
            make_model(trained=False, bits=3), tmp_path / "out", format="packed", progress=False
        )
        assert "is untrained: what is exported equals round-to-nearest" in caplog.text
        caplog.clear()
        export_model(make_model(bits=3), tmp_path / "other", format="packed", progress=False)
        assert "untrained" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    assert is_untrained(make_model(trained=False, bits=3), "default")


def test_the_directory_is_complete_and_its_card_says_how_to_load(make_model, tokenizer, tmp_path):
    for format in FORMATS:
        export_model(
            make_model(bits=4, group_size=group_size_for(format)),
            tmp_path / format,
            format=format,
            tokenizer=tokenizer,
            progress=False,
        )
        names = {path.name for path in (tmp_path / format).iterdir()}
        weights = "model.gguf" if format == "gguf" else "model.safetensors"
        assert {
            "config.json",
            "generation_config.json",
            weights,
            "tokenizer.json",
            "README.md",
        } <= names
        assert json.loads((tmp_path / format / "config.json").read_text())["dtype"] == "bfloat16"
        card = (tmp_path / format / "README.md").read_text()
        assert "A 4-bit model trained with LR-QAT" in card
        groups = "output channel" if format == "gemma" else "32 weights"
        assert f"4 bits, symmetric, one scale per {groups}" in card
        assert str(tmp_path) not in card


def test_targets_that_are_there_already(make_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="full exists, and nothing is written over it"):
        export_model(make_model(bits=3), tmp_path / "full", format="packed", progress=False)
    (tmp_path / "empty").mkdir()
    export_model(make_model(bits=3), tmp_path / "empty", format="packed", progress=False)
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize("format", ["packed", "gguf"])
def test_a_full_disk_leaves_nothing(format, make_model, tokenizer, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|\d+ requested and \d+ written"):
            export_model(
                make_model(bits=4),
                tmp_path / "out",
                format=format,
                tokenizer=tokenizer,
                progress=False,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_lrqat_model(make_base, tmp_path):
    message = (
        "only a PeftModel with an LR-QAT adapter, or a low-bit base, can be exported, "
        "but this is a "
    )
    lora = get_peft_model(make_base("llama"), LoraConfig(target_modules=["q_proj"]))
    for model in (make_base("llama"), lora):
        with pytest.raises(ValueError, match=message + type(model).__name__):
            export_model(model, tmp_path / "out", progress=False)


def test_other_refusals(make_model, tokenizer, tmp_path):
    model = make_model(bits=4, scale_dtype="float32")
    for format in ("compressed-tensors", "gguf", "gptq"):
        with pytest.raises(
            ValueError, match="cannot hold scales in float32; train with scale_dtype='bfloat16'"
        ):
            export_model(
                model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False
            )
    with pytest.raises(ValueError, match="`format` must be one of 'compressed-tensors'"):
        export_model(model, tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="size"):
        export_model(make_model(bits=4), tmp_path / "out", max_shard_size="five")
    with pytest.raises(ValueError, match="`adapter_name` is 'other', but the model has"):
        export_model(model, tmp_path / "out", adapter_name="other")
    model = make_model(bits=4)
    with torch.no_grad():
        next(iter(layers_of(model).values())).lrqat_scale["default"][0] = 1e-7
    with pytest.raises(
        ValueError,
        match=r"1 of 64 scales of `.*` \(such as 1e-07\) cannot be represented exactly",
    ):
        export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_one_layer_at_a_time_is_in_memory(make_model, tmp_path, monkeypatch):
    """No more than one layer's integers are alive while they are written."""
    import weakref

    from peft_lrqat.export import exporter

    alive, most = weakref.WeakSet(), 0

    def counted(*args):
        nonlocal most
        linear = real(*args)
        most = max(most, len(alive) + 1)
        alive.add(linear.codes)
        return linear

    real = exporter.quantized_linear
    monkeypatch.setattr(exporter, "quantized_linear", counted)
    export_model(make_model(bits=4), tmp_path / "out", format="packed", progress=False)
    # The one before may still have a name while the next is made.
    assert most <= 2


def test_verification_finds_what_differs(make_model, tmp_path):
    model = make_model(bits=3)
    export_model(model, tmp_path / "out", format="packed", progress=False)
    name, layer = next(iter(layers_of(model).items()))
    with torch.no_grad():
        layer.lrqat_scale["default"][0] *= 2
        model.get_base_model().model.norm.weight[0] += 1
    found = verify_export(model, tmp_path / "out", format="packed")
    assert not found.exact
    assert found.different_layers == (name,)
    assert found.different_tensors == ("model.norm.weight",)
    assert found.logits_difference > 0
    assert isinstance(model, PeftModel)


TEMPLATES = {
    "default": "{{ messages[0].content }}",
    "rag": "{{ messages[0].content }} from a file",
    "tool_use": "{{ messages[0].content }} with tools",
}


@pytest.mark.parametrize("format", FORMATS)
def test_all_chat_templates_are_kept(format, make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = TEMPLATES
    model = make_model(bits=4, group_size=group_size_for(format))
    export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES
    if format == "gguf":
        fields = pytest.importorskip("gguf").GGUFReader(tmp_path / "out" / "model.gguf").fields
        assert fields["tokenizer.chat_template"].contents() == TEMPLATES["default"]
        assert fields["tokenizer.chat_templates"].contents() == ["rag", "tool_use"]
        for name in ("rag", "tool_use"):
            assert fields[f"tokenizer.chat_template.{name}"].contents() == TEMPLATES[name]


def test_a_chat_template_that_gguf_cannot_name(make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = {**TEMPLATES, "tool use": "{{ messages[0].content }}"}
    with pytest.raises(ValueError, match="the tokenizer has one called 'tool use'; rename it"):
        export_model(
            make_model(bits=4),
            tmp_path / "out",
            format="gguf",
            tokenizer=tokenizer,
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []
