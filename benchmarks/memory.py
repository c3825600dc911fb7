"""Memory of LR-QAT: bytes of the target weights against the formula, and the peak of a training step against other ways.

    python benchmarks/memory.py                     a Llama of 264 M decoder weights, bf16, 1 x 256 tokens, about 5 minutes
    python benchmarks/memory.py --hidden 512 --layers 4

Every variant runs in a process of its own. Weights are random: memory does not depend on their values. On Linux the peak is
that of the process's resident set (VmHWM, reset before the step); on CUDA that of torch's allocator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lrqat import LRQATConfig, LRQATLinear, target_weight_bytes
from peft_lrqat.quant.packing import packed_bytes


MB = 1 << 20
RANK = 32


class NaiveLRQAT(nn.Module):
    """The formula left to autograd, on the same int8 phi: what a direct reading of the paper costs."""

    def __init__(self, layer: LRQATLinear, checkpointed: bool) -> None:
        super().__init__()
        self.layer, self.checkpointed = layer, checkpointed

    def weight(self, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        base, grid = self.layer.base_layer, self.layer.base_layer.format.grid
        z = base.format.decode(base.phi) + self.layer.scaling["default"] * (B @ A)
        codes = (z + (z.round() - z).detach()).clamp(grid.qmin, grid.qmax)
        return (scale * codes).to(base.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factors = [getattr(self.layer, name)["default"] for name in self.layer.adapter_layer_names]

        def linear(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight(*factors))

        return checkpoint(linear, x, *factors, use_reentrant=False) if self.checkpointed else linear(x, *factors)


class FullQAT(nn.Module):
    """The weight itself is trained through a learned step (LSQ), per channel."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_()
        self.qmin, self.qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.scale = nn.Parameter(self.weight.detach().float().abs().amax(1, keepdim=True) / self.qmax)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (self.weight / self.scale).clamp(self.qmin, self.qmax)
        codes = z + (z.round() - z).detach()
        return nn.functional.linear(x, (codes * self.scale).to(x.dtype))


def replace_modules(model: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replaces every module of ``kind`` but the output head."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind) and not name.endswith("lm_head"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def lrqat(model: nn.Module, bits: int, downcast: str) -> nn.Module:
    config = LRQATConfig(r=RANK, target_modules="all-linear", bits=bits, downcast=downcast, range_estimator="minmax")
    return get_peft_model(model, config)


def lora(model: nn.Module, bits: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))


def naive(model: nn.Module, bits: int, checkpointed: bool) -> nn.Module:
    return replace_modules(lrqat(model, bits, "fixed8"), LRQATLinear, lambda m: NaiveLRQAT(m, checkpointed))


def full_qat(model: nn.Module, bits: int) -> nn.Module:
    return replace_modules(model.requires_grad_(False), nn.Linear, lambda m: FullQAT(m, bits))


VARIANTS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "LoRA, bf16 weights": lora,
    "full QAT (LSQ)": full_qat,
    "LR-QAT, naive autograd, fixed8": lambda m, b: naive(m, b, False),
    "LR-QAT, checkpointed, fixed8": lambda m, b: naive(m, b, True),
    "LR-QAT, bf16": lambda m, b: lrqat(m, b, "bf16"),
    "LR-QAT, fixed8": lambda m, b: lrqat(m, b, "fixed8"),
    "LR-QAT, int": lambda m, b: lrqat(m, b, "int"),
}


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(variant: str, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the target weights and of the step's peak, in this process."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 512),
        vocab_size=4096,
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).to(device)
    torch.set_default_dtype(torch.float32)
    targets = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")]
    shapes = [tuple(m.weight.shape) for m in targets]
    before = sum(m.weight.numel() * m.weight.element_size() for m in targets)
    del targets
    model = VARIANTS[variant](model, args.bits).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 4096, (1, args.tokens), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # optimizer state, workspaces
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        step()
        peak = status("VmHWM")
    kept = [m for n, m in model.named_modules() if isinstance(m, FullQAT) or n.endswith("base_layer")]
    held = target_weight_bytes(model) or sum(m.weight.numel() * m.weight.element_size() for m in kept)
    formula = 0
    for out, in_ in shapes:
        per_row = {"fixed8": in_, "int": packed_bytes(in_, args.bits)}.get(variant.split()[-1], 2 * in_)
        formula += out * (per_row + (4 if "LR-QAT" in variant else 0))  # one float32 scale a row
    return {"before": before, "held": held, "formula": formula, "peak": peak, "start": args.start_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", choices=VARIANTS, help="only this one, and print JSON")
    args = parser.parse_args()
    args.start_bytes = 0 if args.device != "cpu" else status("VmRSS")
    if args.variant:
        print(json.dumps(measure(args.variant, args)))
        return
    # glibc keeps freed blocks below its mmap threshold in the heap, which would count as ours.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[variant] = json.loads(output.splitlines()[-1])
    reference = rows["LoRA, bf16 weights"]
    print(
        f"{reference['before'] / MB:.0f} MB of bf16 target weights, {args.bits} bits, 1 x {args.tokens} tokens, {args.device}"
    )
    print(f"{'':32} {'target weights, MB':>20} {'formula':>9} {'peak of a step, MB':>20} {'of LoRA':>8}")
    failed = False
    for variant, row in rows.items():
        peak = row["peak"] - row["start"]
        share = peak / (reference["peak"] - reference["start"])
        print(f"{variant:32} {row['held'] / MB:20.1f} {row['formula'] / MB:9.1f} {peak / MB:20.0f} {share:8.2f}")
        failed |= variant.startswith("LR-QAT") and row["held"] != row["formula"]
        failed |= variant in ("LR-QAT, fixed8", "LR-QAT, int") and share >= 1
    if failed:
        sys.exit("the bytes held differ from the formula, or a peak is not below LoRA's")


if __name__ == "__main__":
    main()
