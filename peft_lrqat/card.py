"""What a saved adapter's model card says, added to the card that PEFT writes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData


if TYPE_CHECKING:
    from .config import LRQATConfig

# The section between these is written anew at every save; the text around it is somebody else's and stays.
BEGIN, END = "<!-- peft_lrqat: begin -->", "<!-- peft_lrqat: end -->"


def describe_adapter(save_directory: str, config: LRQATConfig) -> None:
    """Creates or updates ``README.md`` in ``save_directory``: what this adapter is, how to install and load it."""
    path = os.path.join(save_directory, "README.md")
    card = ModelCard.load(path) if os.path.exists(path) else ModelCard.from_template(ModelCardData())
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "peft_lrqat", "lr-qat", f"{config.bits}-bit"})
    if not card.data.get("license"):
        # An adapter derives from its base model, and nothing here knows that model's licence.
        card.data["license"] = "other"
        card.data["license_name"] = "same-as-base-model"
    if config.base_model_name_or_path and not card.data.get("base_model"):
        card.data["base_model"] = config.base_model_name_or_path
    before, _, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2]
    card.text = f"{before.rstrip()}\n\n{BEGIN}\n{_section(config)}{END}{after or chr(10)}"
    temporary = path + ".tmp"
    card.save(temporary)
    os.replace(temporary, path)


def _section(config: LRQATConfig) -> str:
    base = config.base_model_name_or_path or "the base model"
    groups = "one scale per output channel" if config.group_size == -1 else f"one scale per {config.group_size} weights"
    grid = "symmetric" if config.symmetric else "asymmetric"
    mixed = ""
    if config.bits_pattern or config.group_size_pattern:
        mixed = f"\n- by module: bits {config.bits_pattern}, group sizes {config.group_size_pattern}"
    return f"""## LR-QAT adapter

A {config.bits}-bit weight-quantised model trained with LR-QAT (low-rank quantisation-aware training, arXiv 2406.06385). PEFT alone
does not know this adapter type: without the import below it answers `KeyError: 'LRQAT'`.

```sh
pip install peft-lrqat
```

```py
import peft_lrqat  # registers the type LRQAT with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{config.base_dtype}")
model = PeftModel.from_pretrained(base, "this repository or folder")
model = model.merge_and_unload()  # plain linear layers, weight = scale * integer
```

- base model: `{base}`, in {config.base_dtype}; another base is refused
- weights: {config.bits} bits, {grid}, {groups}, scales in {config.scale_dtype}{mixed}
- rank {config.r}, lora_alpha {config.lora_alpha}, frozen weights kept as `{config.downcast}` in training
- first ranges: {config.range_estimator}{f" (p = {config.range_p})" if config.range_estimator == "lp" else ""}
"""
