"""A long run stays as it began: memory and time of a step, over thousands of steps.

    python benchmarks/steady.py                # LR-QAT, 2,000 steps of a tiny model
    python benchmarks/steady.py --distill      # with a teacher

Trains a tiny Llama with a log every 10 steps and a checkpoint every 100, of which two are kept, as
a long run does. After a quarter of the steps, the resident set (VmRSS) may grow by at most 4 MB,
and the median processor time of a step may drift by at most 10%. Exits with 1 otherwise.
"""

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from peft import get_peft_model
from process import MB, resident
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils.logging import set_verbosity_error

from peft_lrqat import LRQATConfig
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments


MAX_GROWTH = 4 * MB
MAX_DRIFT = 0.1
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Watch(TrainerCallback):
    """Processor seconds of every step, and the resident set at every twentieth of the run."""

    def __init__(self, steps):
        self.every = steps // 20
        self.seconds, self.memory, self.began = [], [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.began)
        if state.global_step % self.every == 0:
            gc.collect()
            self.memory.append((state.global_step, resident()))


def run(steps, distill):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    teacher = copy.deepcopy(base) if distill else None
    config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, bits=3)
    ids = torch.randint(3, 512, (256, 32), generator=torch.Generator().manual_seed(0))
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as directory:
        args = LRQATTrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=100,
            save_total_limit=2,
            distillation_weight=0.5 if distill else 0.0,
            report_to=[],
            disable_tqdm=True,
        )
        LRQATTrainer(
            model=get_peft_model(base, config),
            args=args,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            teacher_model=teacher,
            callbacks=[watch],
        ).train()
    return watch


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="a multiple of 20")
    parser.add_argument("--distill", action="store_true", help="with a teacher")
    options = parser.parse_args()
    set_verbosity_error()
    watch = run(options.steps, options.distill)
    settled = [(step, size) for step, size in watch.memory if step >= options.steps // 4]
    growth = settled[-1][1] - settled[0][1]
    quarter = options.steps // 4
    medians = [
        statistics.median(watch.seconds[start : start + quarter])
        for start in range(0, options.steps, quarter)
    ]
    drift = medians[-1] / medians[1] - 1
    for step, size in watch.memory[::2]:
        print(f"step {step:>6}: {size / MB:.1f} MB resident")
    print("median step by quarter of the run, ms: " + ", ".join(f"{1e3 * m:.2f}" for m in medians))
    print(f"after a quarter of the run: {growth / MB:+.2f} MB, step time {drift:+.1%}")
    if growth > MAX_GROWTH or drift > MAX_DRIFT:
        sys.exit("wrong: memory or the time of a step grows with the number of steps")


if __name__ == "__main__":
    main()
