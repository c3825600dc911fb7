"""From a model's name to a trainer; the command line, the demo and the benchmarks use this."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.lrqat.size import deployed_weight_bytes, target_weight_bytes

from .arguments import LRQATTrainingArguments
from .metrics import compute_metrics, preprocess_logits_for_metrics
from .trainer import LRQATTrainer


def load_base(
    name: str, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer.

    A local directory becomes an absolute path, so that an adapter finds its base from anywhere.
    """
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(
        name
    )


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: LRQATTrainingArguments,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | None = None,
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
        f" trainable parameters: {trainable:,}"
    )
