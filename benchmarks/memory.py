"""Memory of LR-QAT: bytes of the target weights, and the peak of a training step.

    python benchmarks/memory.py
    python benchmarks/memory.py --hidden 512 --layers 4

The bytes are compared with the formula, and the peak with other ways to train. By default the model
is a Llama of 264 M decoder weights in bf16 with 1 x 256 tokens, which takes about 5 minutes. Every
variant runs in its own process. Weights are random: memory does not depend on their values. On
Linux the peak is that of the process's resident set (VmHWM, reset before the step); on CUDA that of
torch's allocator.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from process import MB, in_own_process, peak_bytes, resident
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from variants import VARIANTS, FullQAT

from peft_lrqat import target_weight_bytes
from peft_lrqat.quant import Grid
from peft_lrqat.quant.packing import packed_bytes


REFERENCE = "LoRA"
MEASURED = (
    REFERENCE,
    "full QAT (LSQ)",
    "LR-QAT, naive autograd",
    "LR-QAT, checkpointed",
    "LR-QAT, bf16",
    "LR-QAT, fixed8",
    "LR-QAT, int",
)


def random_llama(hidden: int, layers: int) -> LlamaForCausalLM:
    """In bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=4096,
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def measure(variant: str, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the target weights and of the step's peak, in this process."""
    device = torch.device(args.device)
    model = random_llama(args.hidden, args.layers).to(device)
    targets = [
        m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not n.endswith("lm_head")
    ]
    shapes = [tuple(m.weight.shape) for m in targets]
    before = sum(m.weight.numel() * m.weight.element_size() for m in targets)
    del targets
    model = VARIANTS[variant](model, Grid(bits=args.bits)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 4096, (1, args.tokens), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # optimizer state, workspaces
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_bytes(step)
    kept = [
        m for n, m in model.named_modules() if isinstance(m, FullQAT) or n.endswith("base_layer")
    ]
    held = target_weight_bytes(model) or sum(
        m.weight.numel() * m.weight.element_size() for m in kept
    )
    formula = 0
    for out, in_ in shapes:
        stored = {"bf16": 2 * in_, "int": packed_bytes(in_, args.bits)}
        per_row = stored.get(variant.split()[-1], in_) if "LR-QAT" in variant else 2 * in_
        formula += out * (per_row + (4 if "LR-QAT" in variant else 0))  # one float32 scale a row
    return {
        "before": before,
        "held": held,
        "formula": formula,
        "peak": peak,
        "start": args.start_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", choices=MEASURED, help="only this one, and print JSON")
    args = parser.parse_args()
    args.start_bytes = 0 if args.device != "cpu" else resident()
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    rows = {
        variant: in_own_process(__file__, *sys.argv[1:], "--variant", variant)
        for variant in MEASURED
    }
    reference = rows[REFERENCE]
    print(
        f"{reference['before'] / MB:.0f} MB of bf16 target weights, {args.bits} bits, "
        f"1 x {args.tokens} tokens, {args.device}"
    )
    print(
        f"{'':32} {'target weights, MB':>20} {'formula':>9} "
        f"{'peak of a step, MB':>20} {'of LoRA':>8}"
    )
    failed = False
    for variant, row in rows.items():
        peak = row["peak"] - row["start"]
        share = peak / (reference["peak"] - reference["start"])
        print(
            f"{variant:32} {row['held'] / MB:20.1f} {row['formula'] / MB:9.1f} "
            f"{peak / MB:20.0f} {share:8.2f}"
        )
        failed |= variant.startswith("LR-QAT") and row["held"] != row["formula"]
        failed |= variant in ("LR-QAT, fixed8", "LR-QAT, int") and share >= 1
    if failed:
        sys.exit("the bytes held differ from the formula, or a peak is not below LoRA's")


if __name__ == "__main__":
    main()
