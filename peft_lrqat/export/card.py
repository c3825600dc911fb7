"""What the model card of an exported model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..lrqat.card import activation_text, scheme_tags
from ..lrqat.config import LRQATConfig
from ..shared.card import base_in_words, is_hub_id, table, training_text


LOADING = {
    "compressed-tensors": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this repository or folder")  # needs `pip install compressed-tensors`""",
    "gguf": """# llama.cpp: llama-cli -m model.gguf; or, with plain weights in memory:
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("this repository or folder")
model = AutoModelForCausalLM.from_pretrained("this repository or folder", gguf_file="model.gguf", config=config)""",
    "gptq": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this repository or folder")  # needs a GPTQ backend such as gptqmodel""",
    "packed": """from peft_lrqat.export import load_quantized

model = load_quantized("this folder")""",
    "dequantized": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this repository or folder")""",
}


def write_card(
    directory: Path,
    config: LRQATConfig,
    format: str,
    summary: dict[str, Any],
    activations: str = "write",
) -> None:
    """Writes ``README.md`` for the model that was exported into ``directory``."""
    place, _, base = base_in_words(config.base_model_name_or_path)
    tags = scheme_tags(config) if activations == "write" else set()
    data = ModelCardData(
        license="other",
        license_name="same-as-base-model",
        library_name="gguf" if format == "gguf" else "transformers",
        tags=sorted(
            {
                "peft_lrqat",
                "lr-qat",
                f"{config.bits}-bit",
                *([format] if format != "dequantized" else []),
                *tags,
            }
        ),
        base_model=base if is_hub_id(config.base_model_name_or_path) else None,
    )
    groups = (
        "one scale per output channel"
        if config.group_size == -1
        else f"one scale per {config.group_size} weights"
    )
    mixed = ""
    if config.bits_pattern or config.group_size_pattern:
        mixed = (
            f"\n- by module: bits {config.bits_pattern}, group sizes {config.group_size_pattern}"
        )
    text = f"""---
{data.to_yaml()}
---

# A {config.bits}-bit model trained with LR-QAT

Low-rank quantisation-aware training (arXiv 2406.06385), exported by `peft_lrqat` as `{format}`: integers and scales of the files
are those of training, so that no weight was changed on the way.

```py
{LOADING[format]}
```

- base model: {place}
- weights of the target layers: {config.bits} bits, {"symmetric" if config.symmetric else "asymmetric"}, {groups}{mixed}
{_activations(config, activations)}
{table("measure", {name: f"{value:,}" for name, value in summary.items()})}
{training_text(config.training_record)}"""
    ModelCard(text).save(directory / "README.md")


def _activations(config: LRQATConfig, activations: str) -> str:
    """How inputs were rounded in training, and whether these files say so."""
    text = activation_text(config)
    if text and activations == "ignore":
        text = "\nTrained with rounded activations, of which these files say nothing:\n\n" + text
    return text
