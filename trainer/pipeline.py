"""From a model's name to a trainer; the command line, the demo and the benchmarks use this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)
from transformers.utils.hub import cached_file

from peft_lrqat.export.linears import lrqat_layers, target_of
from peft_lrqat.formats.sizes import stored_bits
from peft_lrqat.formats.table import FORMATS
from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.lrqat.size import deployed_weight_bytes, target_weight_bytes
from peft_lrqat.shared.tasks import class_of
from peft_lrqat.shared.words import some

from .arguments import LRQATTrainingArguments
from .metrics import compute_metrics, preprocess_logits_for_metrics
from .trainer import LRQATTrainer


def load_model(
    name: str, dtype: str | torch.dtype, config: PeftConfig | None = None
) -> PreTrainedModel:
    """A base model for the task of an adapter; without one, a causal language model.

    A local directory becomes an absolute path, so that an adapter finds its base from anywhere.

    Raises:
        ValueError: tensors of the model are missing from its files, and the adapter does not bring
            them. transformers fills them with random numbers.
    """
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    loader = AutoModelForCausalLM if config is None else class_of(config)
    # A pair, which the annotation of transformers does not say.
    pair: Any = loader.from_pretrained(name, dtype=dtype, output_loading_info=True)
    model, report = pair
    brought = set(getattr(config, "modules_to_save", None) or ())
    missing = [key for key in report["missing_keys"] if not brought & set(key.split("."))]
    if missing:
        raise ValueError(
            f"a base model must be whole, but {some(missing)} of {type(model).__name__} are not in"
            f" the files of {name}: they would be random. Give a checkpoint that has them"
        )
    return model


def load_base(
    name: str, dtype: str | torch.dtype, config: PeftConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `load_model` loads, and its tokenizer."""
    model = load_model(name, dtype, config)
    return model, AutoTokenizer.from_pretrained(model.config.name_or_path)


def load_adapter(
    adapter: str, name: str | None, dtype: str | torch.dtype, **where: str | None
) -> PeftModel:
    """An adapter on its base model ``name``, which by default is the one that it names; evaluates.

    Args:
        adapter: a directory, or a name on the Hub.
        name: of the base model.
        dtype: of the base model.
        where: ``revision`` and ``subfolder`` of the adapter.
    """
    config = PeftConfig.from_pretrained(adapter, **where)
    name = name or config.base_model_name_or_path
    if name is None:
        raise ValueError(f"the adapter in {adapter} does not name its base model; give --model")
    model = load_model(name, dtype, config)
    rows = _embeddings_of(adapter, model, **where)
    embedded: Any = model.get_input_embeddings().weight if rows is not None else None
    if rows is not None and rows != embedded.shape[0]:
        # Tokens were added before training, and their embeddings were saved with the adapter.
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter, **where).eval()


def _embeddings_of(adapter: str, model: PreTrainedModel, **where: str | None) -> int | None:
    """How many tokens an adapter embeds, if it brings embeddings."""
    inputs = model.get_input_embeddings()
    ends = [f"{n}.weight" for n, module in model.named_modules() if module is inputs]
    file = find_file(adapter, SAFETENSORS_WEIGHTS_NAME, **where)
    if file is None or not ends:
        return None
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (not a dict)
            if key.endswith(ends[0]):
                return stored.get_slice(key).get_shape()[0]
    return None


def find_file(place: str, file: str, **where: str | None) -> str | None:
    """The path of a file in a directory or in a repository of the Hub; None if it has none."""
    options = {key: value for key, value in where.items() if value is not None}
    try:
        return cached_file(place, file, **options)
    except OSError:
        return None


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: LRQATTrainingArguments,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | None = None,
    teacher_model: PreTrainedModel | None = None,
) -> LRQATTrainer:
    """An `LRQATTrainer` for blocks of tokens, with perplexity as its metric."""
    return LRQATTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        teacher_model=teacher_model,
    )


def describe_size(model: PeftModel) -> str:
    """What the adapter quantises and what it trains, in one line."""
    training, deployed = target_weight_bytes(model), deployed_weight_bytes(model)
    trainable, _ = model.get_nb_trainable_parameters()
    names = [name for name, module in model.named_modules() if isinstance(module, LRQATLayer)]
    kinds = sorted({name.rpartition(".")[2] for name in names})
    return (
        f"{len(names)} layers quantised ({', '.join(kinds)}); target weights:"
        f" {training:,} bytes while training, {deployed:,} bytes deployed;"
        f" trainable parameters: {trainable:,}{_wasteful_formats(model)}"
    )


def _wasteful_formats(model: PeftModel) -> str:
    """The formats whose files take over a tenth more than what is trained; "" if none does."""
    targets = [target_of(name, layer) for name, layer in lrqat_layers(model).items()]
    found = []
    for format in FORMATS.values():
        # Plain weights are not meant to be small, and what a format cannot hold has no size.
        if format.is_small and all(format.why_not_target(t) is None for t in targets):
            bits = stored_bits(targets, format)
            if bits.wasteful:
                found.append(bits.remark(format))
    return "".join(f"\n{remark}" for remark in found)
