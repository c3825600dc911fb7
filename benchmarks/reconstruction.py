"""Time of block reconstruction, and the part of it that its matrix products alone take.

    python benchmarks/reconstruction.py                  # SmolLM2-135M's shapes, on one thread

Models of one and of two random blocks are calibrated; the difference is a block's. Products: those
of the linear layers, forward for both models' hidden states, and forward and backward in each step
of training, on tensors of the same shapes and dtype. All are seconds of processor time, so that
other work on the machine counts little; ``--blocks`` of them make the model.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import CalibratedStart, LowBitConfig, calibrate_low_bit
from peft_lrqat.calibration.reconstruct import Reconstruction


def processor_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def model_of(blocks: int, args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=blocks,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 192),
        vocab_size=1024,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def calibrate(blocks: int, args: argparse.Namespace) -> float:
    ids = torch.randint(0, 1024, (args.sequences, args.tokens)).tolist()
    start = CalibratedStart(
        method=Reconstruction(epochs=args.epochs),
        dataset=Dataset.from_dict({"input_ids": ids}),
        progress=False,
    )
    model = model_of(blocks, args)
    config = LowBitConfig(
        bits=args.bits, group_size=args.group_size, symmetric=args.bits > 2, downcast="fixed8"
    )
    return processor_seconds(lambda: calibrate_low_bit(model, config, start))


def products(args: argparse.Namespace) -> float:
    """Seconds of the products of one block's linear layers."""
    block = model_of(1, args).model.layers[0]
    weights = [m.weight.detach() for m in block.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(args.tokens, w.shape[1], dtype=torch.bfloat16) for w in weights]
    outputs = [torch.randn(args.tokens, w.shape[0], dtype=torch.bfloat16) for w in weights]

    def forward() -> list[Tensor]:
        return [x @ w.T for x, w in zip(inputs, weights, strict=True)]

    def backward() -> list[Tensor]:
        made = [y.T @ x for x, y in zip(inputs, outputs, strict=True)]
        # The inputs of the first three, q, k and v, need no gradient.
        return made + [y @ w for y, w in zip(outputs[3:], weights[3:], strict=True)]

    forward(), backward()
    repeats = 5
    once = processor_seconds(lambda: [forward() for _ in range(repeats)]) / repeats
    back = processor_seconds(lambda: [backward() for _ in range(repeats)]) / repeats
    return args.sequences * ((2 + args.epochs) * once + args.epochs * back)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--width", type=int, default=1536, help="of the MLP")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group_size", type=int, default=-1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    set_verbosity_error()
    bound = products(args)
    one, two = calibrate(1, args), calibrate(2, args)
    print(
        f"{args.sequences} x {args.tokens} tokens, {args.epochs} epochs, {args.bits} bits; seconds "
        f"of one thread\na block {two - one:.1f}, of these products {bound:.1f}\n"
        f"{args.blocks} blocks {args.blocks * (two - one):.0f}, of these products "
        f"{args.blocks * bound:.0f}"
    )


if __name__ == "__main__":
    main()
