"""What the model card of an LR-QAT adapter says."""

from __future__ import annotations

from ..shared.card import base_in_words, table, training_text, write_section
from ..shared.tasks import class_name
from .config import LRQATConfig


def describe_adapter(
    save_directory: str, config: LRQATConfig, subfolder: str | None = None
) -> None:
    """Creates or updates ``README.md`` in ``save_directory``: what this adapter is, how to install
    and load it.

    ``subfolder`` says where the adapter lies, relative to the card; None: beside the card.
    """
    tags = {"lr-qat", f"{config.bits}-bit", *scheme_tags(config)}
    write_section(save_directory, _section(config, subfolder), tags, config.base_model_name_or_path)


def scheme_tags(config: LRQATConfig) -> set[str]:
    """The usual short name, such as ``{"w4a8kv4"}``, if more than the weights is rounded."""
    if config.activation_bits is None and config.kv_cache_bits is None:
        return set()
    kv_cache = "" if config.kv_cache_bits is None else f"kv{config.kv_cache_bits}"
    return {f"w{config.bits}a{config.activation_bits or 16}{kv_cache}"}


def _section(config: LRQATConfig, subfolder: str | None) -> str:
    place, note, base = base_in_words(config.base_model_name_or_path)
    loader = class_name(config)
    folder = f', subfolder="{subfolder}"' if subfolder else ""
    grid, mixed = config.grid_in_words(), config.exceptions_in_words()
    origin = ""
    if config.base_made_from is not None:
        origin = f", a low-bit base made from {base_in_words(config.base_made_from)[0]}"
    first_range: str = config.range_estimator
    if config.range_estimator == "lp":
        first_range += f" (p = {config.range_p})"
    return f"""## LR-QAT adapter

A {config.bits}-bit weight-quantised model trained with LR-QAT (low-rank quantisation-aware
training, arXiv 2406.06385). PEFT alone does not know this adapter type: without the import below
it raises `KeyError: 'LRQAT'`.

```sh
pip install peft-lrqat
```

```py
import peft_lrqat  # registers the type LRQAT with PEFT
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained("{base}", dtype="{config.base_dtype}")
model = PeftModel.from_pretrained(base, "this repository or folder"{folder})
model = model.merge_and_unload()  # plain linear layers, weight = scale * integer
```

- base model: {place}{origin}, in {config.base_dtype}{note}; another base is refused
- weights: {config.bits} bits, {grid}, scales in {config.scale_dtype}{mixed}
{activation_text(config)}- rank {config.r}, lora_alpha {config.lora_alpha}
- frozen weights kept as `{config.downcast}` in training
- first ranges: {first_range}
{packed_text(config.packed_factors)}{training_text(config.training_record)}"""


def activation_text(config: LRQATConfig) -> str:
    """How the adapter rounds activations, keys and values, in Markdown; empty if it does not."""
    kind = "symmetric" if config.activation_symmetric else "asymmetric"
    text = ""
    if config.activation_bits is not None:
        text += (
            f"- inputs of these layers: {config.activation_bits} bits, {kind}, one range per "
            "token, found as they come\n"
        )
    if config.kv_cache_bits is not None:
        text += (
            f"- keys and values: {config.kv_cache_bits} bits, {kind}, one range per token and "
            "head\n"
        )
    if text:
        text += "- softmax, norms and residuals stay in the model's dtype\n"
    return text


def packed_text(fields: dict | None) -> str:
    """What packing the factors changed, in Markdown; nothing where they are plain."""
    if fields is None:
        return ""
    report = {
        name: value
        for name, value in fields.get("report", {}).items()
        if not isinstance(value, dict | list)
    }
    return (
        f"- the factors are packed (LoRAQuant, arXiv 2510.26690; method {fields.get('method')}), "
        "and float32 again once loaded\n\n" + table("measure of the packing", report)
    )
