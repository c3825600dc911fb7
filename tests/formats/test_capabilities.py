"""The tables of formats and runtimes decide what is refused; the documentation shows them."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lrqat import LRQATConfig
from peft_lrqat.export import export_model, verify_export
from peft_lrqat.formats.capabilities import SETTINGS, capability_table
from peft_lrqat.formats.runtimes import RUNTIMES
from peft_lrqat.formats.table import FORMATS, format_named
from peft_lrqat.quant.grid import Grid


ROOT = Path(__file__).parents[2]


def test_the_table_in_the_docs_is_this_one():
    assert capability_table() in (ROOT / "docs" / "deploy.md").read_text()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_cell_of_a_format(name, tokenizer, tmp_path):
    """A yes of the table reads back bit for bit; all else is refused and leaves nothing."""
    torch.manual_seed(0)
    grid = SETTINGS[name]
    width = 160 if grid.group_size == 40 else 256
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    fields = {
        "bits": grid.bits,
        "symmetric": grid.symmetric,
        "balanced": grid.balanced,
        "group_size": grid.group_size,
        "init_weights": False,
    }
    model = get_peft_model(
        base, LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, **fields)
    ).eval()
    for format in FORMATS:
        reason = FORMATS[format].why_not(grid, "bfloat16")
        if reason is None:
            export_model(
                model, tmp_path / format, format=format, tokenizer=tokenizer, progress=False
            )
            found = verify_export(model, tmp_path / format, format=format)
            assert found.exact
            # Logits of about 1 in bfloat16: the same weights, summed in another order.
            assert found.logits_difference is None or found.logits_difference < 2**-5
        else:
            with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.q_proj`") as error:
                export_model(
                    model, tmp_path / format, format=format, tokenizer=tokenizer, progress=False
                )
            assert reason in str(error.value)
            assert not (tmp_path / format).exists()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_a_preset_allows_can_be_exported(runtime, bits, make_model, tokenizer, tmp_path):
    config = LRQATConfig.for_runtime(runtime, bits=bits, group_size=32)
    fields = {
        name: getattr(config, name) for name in ("bits", "group_size", "symmetric", "scale_dtype")
    }
    model = make_model(**fields)
    format = RUNTIMES[runtime].format.name
    export_model(model, tmp_path / "out", format=format, tokenizer=tokenizer, progress=False)
    assert verify_export(model, tmp_path / "out", format=format).exact


def test_presets():
    config = LRQATConfig.for_runtime("vllm", task_type="CAUSAL_LM", r=8)
    assert (config.bits, config.group_size, config.symmetric, config.scale_dtype, config.r) == (
        4,
        128,
        True,
        "bfloat16",
        8,
    )
    assert LRQATConfig.for_runtime("llama.cpp").group_size == 32
    assert LRQATConfig.for_runtime("transformers", bits=3, symmetric=False).symmetric is False
    for fields, message in (
        (
            {"runtime": "vllm", "group_size": 96},
            r"group sizes -1, 32, 64, 128 \(-1: one scale per row\), but .* is 96",
        ),
        ({"runtime": "vllm", "group_size_pattern": {"q_proj": 16}}, "but `group_size` is 16"),
        (
            {"runtime": "llama.cpp", "group_size": 48},
            "`group_size` must be a multiple of 32 for gguf, but is 48",
        ),
        (
            {"runtime": "llama.cpp", "bits": 8, "symmetric": False},
            "gguf holds asymmetric weights of 2, 3, 4, 5, 6, 7",
        ),
        ({"runtime": "transformers", "scale_dtype": "float32"}, "cannot hold scales in float32"),
        (
            {"runtime": "onnx"},
            "`runtime` must be one of 'transformers', 'vllm', 'llama.cpp', but is 'onnx'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            LRQATConfig.for_runtime(**fields)


def test_reasons():
    grid = Grid(bits=4, group_size=32)
    reasons = {name: format.why_not(grid, "bfloat16", 64) for name, format in FORMATS.items()}
    assert [name for name, reason in reasons.items() if reason is not None] == ["gemma"]
    assert "one scale per row (group_size=-1), but `group_size` is 32" in str(reasons["gemma"])
    assert all(runtime.why_not(grid, "bfloat16") is None for runtime in RUNTIMES.values())
    assert FORMATS["gguf"].why_not(Grid(bits=4), "bfloat16", 48) == (
        "the width of the weight must be a multiple of 32 for gguf, but is 48"
    )
    with pytest.raises(ValueError, match="`format` must be one of"):
        format_named("onnx")
