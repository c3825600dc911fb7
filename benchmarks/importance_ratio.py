"""How far the policy that is served is from the one that trains, before anything is learnt.

    python benchmarks/importance_ratio.py

A model is trained on text in three ways, then brought into the form that a server runs. That form
samples texts, and each sampled token gets the ratio of its probability under the model in training
to that under the served one. Reinforcement learning corrects by this ratio, and a ratio of 1 means
that there is nothing to correct.
"""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from peft_lrqat import LRQATConfig
from peft_lrqat.demo import load_topics, model_path
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments
from peft_lrqat.trainer.data import make_blocks


WINDOW = 256


def adapter(args: argparse.Namespace) -> LRQATConfig:
    return LRQATConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        bits=args.bits,
        group_size=args.group_size,
    )


def rounded(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model with its linear layers rounded to the nearest integers."""
    return get_peft_model(copy.deepcopy(model), adapter(args)).merge_and_unload()


def lrqat(blocks: Dataset, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    set_seed(args.seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path()), adapter(args))
    LRQATTrainer(
        model=model,
        args=LRQATTrainingArguments(**options(args), learning_rate=5e-3),
        train_dataset=blocks,
        data_collator=default_data_collator,
    ).train()
    return model, copy.deepcopy(model).merge_and_unload()


def lora(low_bit: bool) -> Callable[[Dataset, argparse.Namespace], tuple[nn.Module, nn.Module]]:
    def run(blocks: Dataset, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
        set_seed(args.seed)
        base = AutoModelForCausalLM.from_pretrained(model_path())
        if low_bit:
            base = rounded(base, args)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=32, lora_alpha=32)
        model = get_peft_model(base, config)
        Trainer(
            model=model,
            args=TrainingArguments(**options(args), learning_rate=1e-3),
            train_dataset=blocks,
            data_collator=default_data_collator,
        ).train()
        return model, rounded(copy.deepcopy(model).merge_and_unload(), args)

    return run


WAYS = {
    "LR-QAT": lrqat,
    "LoRA on 4-bit weights": lora(low_bit=True),
    "LoRA on 32-bit weights": lora(low_bit=False),
}


def options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": args.output,
        "max_steps": args.steps,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": args.seed,
    }


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each token after the first: (texts, T) -> (texts, T - 1)."""
    logs = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logs.gather(-1, ids[:, 1:, None])[..., 0]


def ratios(training: nn.Module, served: nn.Module, prompts: Tensor, tokens: int) -> Tensor:
    """(texts, tokens): of each token that the served model samples."""
    served.eval()
    sample: Any = served
    ids = sample.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    training.train()
    logs = log_probabilities(training, ids) - log_probabilities(served, ids)
    return logs[:, prompts.shape[1] - 1 :].double().exp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="importance-ratio")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    train, heldout = (
        make_blocks(Dataset.from_dict({"text": load_topics(side)}), tokenizer, block_size=WINDOW)
        for side in ("train", "heldout")
    )
    prompts = torch.tensor(heldout.select(range(args.texts))["input_ids"])[:, :16]
    for name, way in WAYS.items():
        training, served = way(train, args)
        set_seed(args.seed)
        found = ratios(training, served, prompts, args.tokens)
        row = {
            "smallest": found.min().item(),
            "largest": found.max().item(),
            "mean distance from 1": (found - 1).abs().mean().item(),
        }
        print(json.dumps({"policy": name, **row, "tokens": found.numel()}))


if __name__ == "__main__":
    main()
