"""What the model card of an exported model says."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..formats.base import Format
from ..formats.sizes import StoredBits
from ..lrqat.card import activation_text, scheme_tags
from ..lrqat.config import LRQATConfig
from ..shared.card import base_in_words, is_hub_id, table, training_text


def write_card(
    directory: Path,
    config: LRQATConfig,
    format: Format,
    figures: dict[str, int],
    sizes: StoredBits,
    loader: str,
    activations: str = "write",
    trained: bool = True,
) -> None:
    """Writes ``README.md`` for the model that was exported into ``directory``.

    ``sizes``: bits per weight, trained and stored; ``loader``: the class of transformers that loads
    the model; ``trained``: False for a low-bit base alone.
    """
    place, _, base = base_in_words(config.base_model_name_or_path)
    tags = {"peft_lrqat", "lr-qat", f"{config.bits}-bit", *format.tags}
    if activations == "write":
        tags |= scheme_tags(config)
    data = ModelCardData(
        license="other",
        license_name="same-as-base-model",
        library_name=format.library_name,
        tags=sorted(tags),
        base_model=base if is_hub_id(config.base_model_name_or_path) else None,
    )
    mixed = "" if config.embedding_bits is None else f"; embeddings: {config.embedding_bits} bits"
    mixed += config.exceptions_in_words()
    waste = _waste(sizes) if format.is_small else ""
    text = f"""---
{data.to_yaml()}
---

{_heading(config, format, trained)}

```py
{format.code(loader, config.symmetric)}
```

- base model: {place}
- weights of the target layers: {config.bits} bits, {config.grid_in_words()}{mixed}
- stored at {sizes.stored:.2f} bits per weight, scales included{waste}
{_activations(config, activations)}
{table("measure", {name: f"{value:,}" for name, value in figures.items()})}
{training_text(config.training_record)}"""
    ModelCard(text).save(directory / "README.md")


def _heading(config: LRQATConfig, format: Format, trained: bool) -> str:
    if not trained:
        return f"""# A {config.bits}-bit model

A low-bit base of `peft_lrqat`, exported as `{format.name}`. The files hold its integers and
scales: the export changed no weight."""
    return f"""# A {config.bits}-bit model trained with LR-QAT

Low-rank quantisation-aware training (arXiv 2406.06385), exported by `peft_lrqat` as
`{format.name}`. The files hold the integers and scales of training: the export changed no
weight."""


def _waste(sizes: StoredBits) -> str:
    if not sizes.wasteful:
        return ""
    return f", although training needs {sizes.trained:.2f}: this format has no smaller blocks"


def _activations(config: LRQATConfig, activations: str) -> str:
    """How inputs were rounded in training, and whether these files say so."""
    text = activation_text(config)
    if text and activations == "ignore":
        text = "\nTrained with rounded activations, of which these files say nothing:\n\n" + text
    return text
