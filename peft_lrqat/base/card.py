"""The model card of a low-bit base."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..shared.card import base_in_words, is_hub_id, table
from .config import LowBitConfig


def write_card(directory: Path, config: LowBitConfig) -> None:
    """Writes ``README.md`` for the low-bit base in ``directory``."""
    place, _, base = base_in_words(config.made_from)
    data = ModelCardData(
        license="other",
        license_name="same-as-base-model",
        library_name="transformers",
        tags=sorted({"peft_lrqat", "lr-qat", f"{config.bits}-bit"}),
        base_model=base if is_hub_id(config.made_from) else None,
        base_model_relation="quantized" if is_hub_id(config.made_from) else None,
    )
    how = f"rounded to nearest, first scales by {config.range_estimator}"
    if config.source:
        how = f"taken over from {config.source.get('quant_method')}, bit for bit"
    elif made := config.calibration:
        how = f"calibrated, by method {made['method']!r} on {made['tokens']:,} tokens"
    figures = {
        "bits": config.bits,
        "grid": config.grid_in_words(),
        "dtype of scales": config.scale_dtype,
        "quantised modules": len(config.modules),
        "integers": how,
    }
    text = f"""---
{data.to_yaml()}
---

# A {config.bits}-bit base for LR-QAT

Frozen integers of {place}, made by `peft_lrqat`. It runs as it is, and carries LR-QAT adapters.

```py
import peft_lrqat
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this repository or folder")
```

{table("measure", figures)}
Modules with other settings are listed in `config.json`.
"""
    ModelCard(text).save(directory / "README.md")
