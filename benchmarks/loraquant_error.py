"""Error against true bits: the published LoRAQuant procedure and the residual-aware one, on factors
with geometric spectra.

    python benchmarks/loraquant_error.py           # about a minute on one core
    python benchmarks/loraquant_error.py --model 7b   # only the time of a whole adapter: of a 7B
    Llama, or of smollm2

Relative error ``||BA - Q(B)Q(A)||_F / ||BA||_F`` over all layers; bits of codes, scales and zero
points per parameter of B and A. Singular vectors are random; the k-th singular value is decay^k. No
file is written, so no header is counted.
"""

import argparse
import time

import torch

from peft_lrqat.loraquant import LoRAQuantConfig
from peft_lrqat.loraquant.quantize import nominal_bits, quantize_factors


def adapter(
    layers: int, m: int, n: int, r: int, decay: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    root = decay ** (torch.arange(r) / 2)
    factors = {}
    for layer in range(layers):
        u, v = (torch.linalg.qr(torch.randn(size, r, generator=generator)).Q for size in (m, n))
        factors[f"layer {layer}"] = u * root, (v * root).T.contiguous()
    return factors


# Outputs and inputs of the linear layers of one block, and how many blocks there are.
MODELS = {
    "7b": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32),
    "smollm2": ([(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)], 30),
}


def whole_adapter(model: str, r: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """An adapter for every linear layer of a model, with a spectrum of 0.8^k."""
    block, count = MODELS[model]
    factors = {}
    for index, (m, n) in enumerate(block):
        ((B, A),) = adapter(1, m, n, r, 0.8).values()
        # Blocks differ by the signs of their rows, which costs nothing to make.
        for number in range(count):
            generator = torch.Generator().manual_seed(1000 * index + number)
            factors[f"{number}.{index}"] = (
                B * torch.randint(0, 2, (m, 1), generator=generator).mul(2).sub(1),
                A,
            )
    return factors


def measured(factors, config) -> tuple[float, float, float, float]:
    start = time.perf_counter()
    found = quantize_factors(factors, config, dict.fromkeys(factors, 1.0), progress=False)
    seconds = time.perf_counter() - start
    error, norm, bits = (
        sum(getattr(q, name) for q in found.values())
        for name in ("squared_error", "squared_norm", "stored_bits")
    )
    parameters = sum(B.numel() + A.numel() for B, A in factors.values())
    return (error / norm) ** 0.5, bits / parameters, nominal_bits(factors, found), seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512, help="rows and columns of a layer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--model", choices=sorted(MODELS))
    args = parser.parse_args()
    if args.model:
        factors = whole_adapter(args.model, args.rank)
        print(
            f"{args.model}, rank {args.rank}, {len(factors)} modules, {torch.get_num_threads()} "
            "threads"
        )
        for method in ("paper", "residual"):
            error, true, _, seconds = measured(
                factors, LoRAQuantConfig(method=method, bits_high=2, ratio=0.9)
            )
            print(f"{method}: {seconds:.0f} s, error {error:.3f} at {true:.3f} bits")
        raise SystemExit
    print(
        f"{'decay':>5} {'variant':>8} {'method':>9} {'error':>7} {'bits':>6} {'nominal':>8} "
        f"{'seconds':>8}"
    )
    for decay, bits, ratio in [(0.6, 2, 0.8), (0.8, 2, 0.9), (0.8, 3, 0.8), (0.9, 2, 0.9)]:
        factors = adapter(args.layers, args.size, args.size, args.rank, decay)
        for method in ("paper", "residual"):
            config = LoRAQuantConfig(method=method, bits_high=bits, ratio=ratio)
            error, true, nominal, seconds = measured(factors, config)
            print(
                f"{decay:5} {f'{bits}@{ratio}':>8} {method:>9} {error:7.3f} {true:6.3f} "
                f"{nominal:8.3f} {seconds:8.1f}"
            )
