"""Training the experts of a mixture: memory and time of a step, against PEFT's LoRA on them.

    python benchmarks/experts.py
    python benchmarks/experts.py --experts 128 --hidden 512

By default the model is an OLMoE of two blocks with 64 experts, 8 for each token (201 M weights of
experts in bf16), and the step has 1 x 256 tokens. Each way to train runs in its own process. Peaks
are those of the resident set (Linux), or of torch's allocator on CUDA, less what was there before
the model; times are the median of --steps. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from process import MB, in_own_process, peak_bytes, resident
from transformers import OlmoeConfig, OlmoeForCausalLM

from peft_lrqat import LRQATConfig


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SHARED: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "target_modules": [],
    "target_parameters": EXPERTS,
    "r": 8,
}
WAYS: dict[str, Any] = {
    "LoRA": LoraConfig(**SHARED),
    "LR-QAT, fixed8": LRQATConfig(**SHARED, bits=4, downcast="fixed8"),
    "LR-QAT, int": LRQATConfig(**SHARED, bits=4, downcast="int"),
    "LR-QAT, int, one A": LRQATConfig(**SHARED, bits=4, downcast="int", experts_share_a=True),
}


def trained(way: str, args: argparse.Namespace, hidden: int, experts: int) -> tuple[Any, Any]:
    """A model under training, and what a step does."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=hidden // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=experts,
        num_experts_per_tok=8,
        vocab_size=4096,
        eos_token_id=1,
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    model: Any = OlmoeForCausalLM(config).to(args.device)
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(model, WAYS[way]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 4096, (1, args.tokens), device=args.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return model, step


def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak of a step in bytes, its seconds, and the trained parameters, in this process."""
    # What the libraries load at their first step is none of the model's.
    trained(way, args, 64, 8)[1]()
    start = 0 if args.device != "cpu" else resident()
    model, step = trained(way, args, args.hidden, args.experts)
    step()  # optimizer state, workspaces
    times = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    if args.device == "cpu":
        peak = peak_bytes(step) - start
    else:
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    weights = args.layers * args.experts * 3 * args.hidden * (args.hidden // 2)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "weights": weights,
        "trained": parameters,
        "peak": peak,
        "seconds": statistics.median(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--way", choices=WAYS, help="only this one, and print JSON")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return
    rows = {way: in_own_process(__file__, *sys.argv[1:], "--way", way) for way in WAYS}
    first = rows["LoRA"]
    print(
        f"{first['weights'] / 1e6:.0f} M weights of experts, {2 * first['weights'] / MB:.0f} MB in "
        f"bf16; 1 x {args.tokens} tokens, {args.device}, {torch.get_num_threads()} threads\n"
    )
    print("| | trained, M | peak of a step, MB | seconds | of LoRA |\n|---|---|---|---|---|")
    for way, row in rows.items():
        share = row["seconds"] / first["seconds"]
        print(
            f"| {way} | {row['trained'] / 1e6:.1f} | {row['peak'] / MB:,.0f} | "
            f"{row['seconds']:.1f} | {share:.2f} |"
        )


if __name__ == "__main__":
    main()
