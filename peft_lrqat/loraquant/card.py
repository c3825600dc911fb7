"""The section of a LORAQUANT adapter in its model card."""

from __future__ import annotations

from ..shared.card import base_in_words, table, write_section
from ..shared.tasks import class_name
from .config import LoRAQuantConfig


def describe_adapter(
    save_directory: str, config: LoRAQuantConfig, subfolder: str | None = None
) -> None:
    """Creates or updates ``README.md`` in ``save_directory``.

    It says what the adapter is and how to install and load it. ``subfolder`` is the place of the
    adapter, relative to the card; None: beside the card.
    """
    write_section(
        save_directory,
        _section(config, subfolder),
        {"loraquant", "lora"},
        config.base_model_name_or_path,
    )


def _section(config: LoRAQuantConfig, subfolder: str | None) -> str:
    place, note, base = base_in_words(config.base_model_name_or_path)
    folder = f', subfolder="{subfolder}"' if subfolder else ""
    auto_model = class_name(config)
    scales = f"one scale in {config.scale_dtype} per {config.group_size} entries"
    widths = sorted(set("".join(config.component_bits.values())), reverse=True)
    grid = "integer zero points above 1 bit" if config.zero_points else "no zero points"
    kind = ", DoRA" * config.use_dora + ", rank-stabilised" * config.use_rslora
    # Only what fits on a line; `adapter_config.json` has the whole report.
    report = {
        name: value for name, value in config.report.items() if not isinstance(value, dict | list)
    }
    return f"""## LORAQUANT adapter

A LoRA adapter whose factors are stored at a few bits (LoRAQuant, arXiv 2510.26690). PEFT alone does
not know this adapter type: without the import below, it raises `KeyError: 'LORAQUANT'`.

```sh
pip install peft-lrqat
```

```py
import peft_lrqat  # registers the type LORAQUANT with PEFT
from peft import PeftModel
from transformers import {auto_model}

base = {auto_model}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "this repository or folder"{folder})
```

- base model: {place}{note}
- method: {config.method}, {_recipe(config)}
- components of {", ".join(widths) or "no"} bits, {scales}, {grid}
- from a LoRA adapter of rank {config.r}, lora_alpha {config.lora_alpha}{kind}

{table("measure", report) if report else ""}"""


def _recipe(config: LoRAQuantConfig) -> str:
    published = (
        f"{config.bits_high} bits up to a share of {config.ratio} of the squared singular values "
        "and 1 bit beyond"
    )
    if config.method == "paper":
        return published
    if config.average_bits is None:
        return f"in the storage that {published} would take"
    return f"in {config.average_bits} bits of storage for each parameter of the LoRA adapter"
