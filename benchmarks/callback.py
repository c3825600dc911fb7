"""The cost of LRQATCallback: its time per log, compared with the steps between two logs.

    python benchmarks/callback.py          # about 3 minutes on 2 idle cores

Two models: the demo model, and one of SmolLM2-135M's shape with random weights in bfloat16.
"""

import argparse
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import LRQATConfig
from peft_lrqat.demo import model_path
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments
from peft_lrqat.trainer.figures import LRQATCallback


SMOLLM2_SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def demo_model():
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


def smollm2_shape():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2_SHAPE)).to(torch.bfloat16)


MODELS = {
    "demo": (demo_model, 8, 256, 60),
    "smollm2": (smollm2_shape, 4, 512, 11),
}  # batch, tokens, steps


def measured(name: str) -> str:
    make, batch, length, steps = MODELS[name]
    model = get_peft_model(
        make(), LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", bits=3)
    )
    vocabulary = model.config.vocab_size
    ids = torch.randint(
        3, vocabulary, (batch * steps, length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as directory:
        args = LRQATTrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=batch,
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        trainer = LRQATTrainer(model=model, args=args, train_dataset=rows)
        (callback,) = (
            c for c in trainer.callback_handler.callbacks if isinstance(c, LRQATCallback)
        )
        spent = []
        measure = callback.measure

        def timed(model):
            start = time.perf_counter()
            result = measure(model)
            spent.append(time.perf_counter() - start)
            return result

        callback.measure = timed
        start = time.perf_counter()
        trainer.train()
        step = (time.perf_counter() - start - sum(spent)) / steps
    log = statistics.median(spent[1:])
    share = log / (args.logging_steps * step)
    return (
        f"{name}: step {step:.3f} s ({batch} x {length} tokens), figures of one log {log:.4f} s = "
        f"{log / step:.1%} of a step; every {args.logging_steps} steps: {share:.2%} of training"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    disable_progress_bar()
    set_verbosity_error()
    for name in parser.parse_args().models:
        print(measured(name), f"({torch.get_num_threads()} threads)", flush=True)
