"""`lrqat plan` against measured peaks of training, for three models on this machine.

    python benchmarks/plan.py

Each model is trained for two steps by benchmarks/memory.py in a process of its own, and the peak of
its resident set is compared with the plan. On Linux with glibc, freed memory stays with the process
for later, so that a resident set is larger than what is in use; here every larger piece goes back
at once (MALLOC_MMAP_THRESHOLD_), and what is left is what a GPU's allocator reports.

    python benchmarks/plan.py --shapes

prints plans for the shapes of well-known models.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from peft_lrqat import LRQATConfig
from peft_lrqat.trainer.plan import Plan, make_plan


MB = 2**20
MEMORY = Path(__file__).with_name("memory.py")
MODELS = ((1024, 8, 512), (512, 4, 2048), (2048, 3, 1024))  # hidden size, blocks, tokens
DOWNCASTS = ("fixed8", "int")


def measured(hidden: int, layers: int, tokens: int, downcast: str) -> float:
    command = [sys.executable, str(MEMORY), "--variant", f"LR-QAT, {downcast}", "--device", "cpu"]
    command += ["--hidden", str(hidden), "--layers", str(layers), "--tokens", str(tokens)]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **at_once}
    )
    row = json.loads(done.stdout)
    return (row["peak"] - row["start"]) / MB


def planned(hidden: int, layers: int, tokens: int, downcast: str) -> float:
    config = LlamaConfig(  # as in memory.py
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        adapter = LRQATConfig(target_modules="all-linear", bits=4, downcast=downcast)
        return make_plan(folder, adapter, tokens=tokens).peak(checkpointing=False) / MB


# hidden size, width of the MLP, blocks, heads, key-value heads, vocabulary
SHAPES = {
    "1B (Llama 3.2)": (2048, 8192, 16, 32, 8, 128256),
    "8B (Llama 3.1)": (4096, 14336, 32, 32, 8, 128256),
    "14B (Qwen 3)": (5120, 17408, 40, 40, 8, 151936),
    "32B (Qwen 3)": (5120, 25600, 64, 64, 8, 151936),
    "70B (Llama 3.1)": (8192, 28672, 80, 64, 8, 128256),
}


def print_shapes(tokens: int) -> None:
    """Plans of a Llama with those shapes, GB."""
    names = ("fixed8", "int", "int, checkpointed", "shipped, 4 bits", "shipped, 2 bits", "16 bits")
    print(f"{'':18}" + "".join(f"{name:>19}" for name in names))
    for name, (hidden, width, blocks, heads, kv_heads, vocabulary) in SHAPES.items():
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=128 if hidden > 2048 else 64,
            vocab_size=vocabulary,
            tie_word_embeddings=hidden == 2048,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)

            def plan(folder: str = folder, **fields: Any) -> Plan:
                adapter = LRQATConfig(target_modules="all-linear", group_size=128, **fields)
                return make_plan(folder, adapter, tokens=tokens)

            fixed8, packed = plan(bits=4), plan(bits=4, downcast="int")
            two = plan(bits=2, symmetric=False, downcast="int")
        sizes = [fixed8.peak(False), packed.peak(False), packed.peak(True)]
        shipped = [found.shipped["packed"] for found in (packed, two)]
        cells = [*sizes, *shipped, packed.plain]
        print(f"{name:18}" + "".join(f"{int(size) / 1e9:19.1f}" for size in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--tokens", type=int, default=2048, help="with --shapes")
    args = parser.parse_args()
    if args.shapes:
        print_shapes(args.tokens)
        return
    head = "hidden, blocks, tokens, kept as"
    print(f"{head:34} {'measured, MB':>13} {'planned, MB':>12} {'ratio':>6}")
    worst = 0.0
    for shape in MODELS:
        for downcast in DOWNCASTS:
            real, plan = measured(*shape, downcast), planned(*shape, downcast)
            worst = max(worst, abs(plan / real - 1))
            name = ", ".join(map(str, (*shape, downcast)))
            print(f"{name:34} {real:13.0f} {plan:12.0f} {plan / real:6.2f}", flush=True)
    if worst > args.tolerance:
        sys.exit(f"a plan is {worst:.0%} off")


if __name__ == "__main__":
    main()
