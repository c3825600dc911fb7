"""Memory of each process under FSDP2: of loading and of a step, measured and planned.

    python benchmarks/ranks.py                          # 1, 2 and 4 processes on one CPU
    python benchmarks/ranks.py --hidden 2048 --layers 4 --downcast int

A random Llama in bfloat16 is made low-bit, and trained by `LRQATTrainer` under the FSDP2
configuration of docs/many-gpus.md, with gloo, the same tokens in every process. Each process counts
the growth of its resident set since before the model (Linux; freed memory goes back at once): its
peak while the base is loaded and shared out, and its peak in the third step. The plan is that of
`lrqat plan --devices N`.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from memory import random_llama
from peft import get_peft_model
from process import MB, forget_peak, resident
from torch import distributed as dist
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import LowBitConfig, LRQATConfig, prepare_low_bit
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments
from peft_lrqat.trainer.plan import make_plan


PROCESSES = (1, 2, 4)
STEPS = 3
DOCUMENT = Path(__file__).parents[1] / "docs" / "many-gpus.md"


def configuration(**fields: object) -> str:
    """The FSDP2 configuration of the docs, on CPUs, without their bf16."""
    (text,) = re.findall(r"```yaml\n# fsdp2.yaml\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("mixed_", "num_processes"))]
    fields = {"mixed_precision": "'no'", "use_cpu": "true", **fields}
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in fields.items())]) + "\n"


class Peak(TrainerCallback):
    """The peak of the last step."""

    def __init__(self) -> None:
        self.loading = self.step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.loading = resident("VmHWM")
        forget_peak()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = resident("VmHWM")


def adapter(args: argparse.Namespace) -> LRQATConfig:
    return LRQATConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=args.r,
        bits=args.bits,
        group_size=args.group_size,
        downcast=args.downcast,
    )


def train(args: argparse.Namespace) -> None:
    """What each process does; its figures are a file."""
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    options = LRQATTrainingArguments(
        f"{args.folder}/out",
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_checkpointing=args.gradient_checkpointing,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards models on GPUs only, by this type.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    forget_peak()
    before = resident()
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{args.folder}/base")
    model = get_peft_model(model, adapter(args))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 4096, (64, args.tokens))]
    peak = Peak()
    LRQATTrainer(model=model, args=options, train_dataset=rows, callbacks=[peak]).train()
    rank = os.environ.get("RANK", "0")
    figures = {"loading": peak.loading - before, "step": peak.step - before}
    Path(args.folder, f"{rank}.json").write_text(json.dumps(figures))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(args: argparse.Namespace, processes: int) -> list[dict[str, int]]:
    """The figures of all processes."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = Path(args.folder, "fsdp2.yaml")
        config.write_text(configuration(num_processes=processes, main_process_port=port))
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    words = [*sys.argv[1:], "--folder", str(args.folder), "--train"]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, __file__, *words], capture_output=True, text=True, env=os.environ | at_once
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return [json.loads(Path(args.folder, f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256, help="of each process")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--downcast", default="fixed8")
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        random_llama(args.hidden, args.layers).save_pretrained(f"{folder}/plain")
        grid = LowBitConfig(bits=args.bits, group_size=args.group_size, downcast=args.downcast)
        prepare_low_bit(f"{folder}/plain", f"{folder}/base", grid, progress=False)
        plan = make_plan(f"{folder}/plain", adapter(args), tokens=args.tokens)
        print(f"{plan.weights / 1e6:.0f} M weights, {plan.trainable / 1e6:.1f} M trained; MB")
        print(f"{'processes':>9} {'step':>22} {'planned':>9} {'ratio':>6} {'loading':>22}")
        for processes in PROCESSES:
            found = measure(args, processes)
            planned = plan.peak_of_each(processes, args.gradient_checkpointing)
            worst = max(figures["step"] for figures in found)
            cells = [
                "/".join(f"{figures[kind] / MB:.0f}" for figures in found)
                for kind in ("step", "loading")
            ]
            print(
                f"{processes:9} {cells[0]:>22} {planned / MB:9.0f} {planned / worst:6.2f} "
                f"{cells[1]:>22}",
                flush=True,
            )
        print(f"planned for loading, in one process: {plan.loading_base / MB:.0f}")


if __name__ == "__main__":
    main()
