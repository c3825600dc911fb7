"""LR-QAT on a GPU: right, counted, timed against LoRA and against the limit of the card.

    python benchmarks/gpu.py                    # everything, in less than 10 minutes
    python benchmarks/gpu.py --only layers      # checks, kernels, layers, capture, model,
    generation python benchmarks/gpu.py --count            # launches and waits as JSON; needs no
    GPU python benchmarks/gpu.py --limits           # bytes and products on paper; needs no GPU

Needs nothing but the packages that the plug-in itself needs, and no network; models have random
weights in the shape of real ones. Weights are bfloat16, grids have 4 bits, factors rank 32. Times
are medians of rounds of steps; a round is timed as a whole, so that a host that is too slow to keep
the device busy shows. All figures go to ``--output`` as JSON as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import limits
import torch
from torch import Tensor, nn


HERE = Path(__file__).resolve().parent
# Runs from a checkout, too.
sys.path.insert(0, str(HERE.parent))
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
TOKENS = [512, 2048, 8192]
REFERENCE = "LoRA, bf16 factors"
# (name of the variant, group size)
LAYERS = [
    (REFERENCE, -1),
    ("LoRA", -1),
    ("LR-QAT, fixed8", -1),
    ("LR-QAT, int", -1),
    ("LR-QAT, fixed8", 128),
    ("LR-QAT, int", 128),
    ("LR-QAT, checkpointed", -1),
    ("LR-QAT, naive autograd", -1),
    ("full QAT (LSQ)", -1),
]
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_BLOCKS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def milliseconds(step: Callable[[], Any], seconds: float = 0.1, rounds: int = 5) -> float:
    """Median of rounds that take about ``seconds`` together, by events on the device."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()

    def round_of(steps: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / steps

    steps = max(1, round(1e3 * seconds / rounds / round_of(2)))
    return statistics.median(round_of(steps) for _ in range(rounds))


def microseconds(launch: Callable[[], Any], number: int = 20) -> float:
    """Of one launch on the device alone: a graph of many of them is replayed."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(number):
            launch()
    return 1e3 * milliseconds(graph.replay, seconds=0.03) / number


def peak_bytes(step: Callable[[], Any]) -> int:
    """What a step takes above what is there before it."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine() -> dict[str, Any]:
    """The card, the versions, and the two ceilings as measured."""
    import peft
    import transformers
    import triton

    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return {
        "card": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bandwidth": 2 * source.numel() / copy * 1e3,
        "matrix": 2 * 8192**3 / product * 1e3,
    }


def run_checks() -> bool:
    """The laws of tests/quant/kernels.py on this card; True if all hold."""
    root = HERE.parent
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    workers = ["-n", str(min(12, os.cpu_count() or 1))]
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--noconftest"]
    command += ["-o", "filterwarnings=ignore"]
    command += ["-p", "no:cacheprovider", *workers, str(root / "tests" / "quant" / "kernels.py")]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode == 0


def agreement(card: str) -> dict[str, Any]:
    """A whole layer on this card against the same layer on the CPU, and against itself."""
    from variants import RANK

    from peft_lrqat.quant import (
        Grid,
        LowRankWeight,
        WeightFormat,
        estimate_range,
        fake_quant_linear,
        quantized_codes,
    )

    torch.manual_seed(0)
    out, width = 4096, 4096
    found: dict[str, Any] = {}
    for downcast, group_size in (("fixed8", -1), ("int", 128), ("bf16", -1)):
        grid = Grid(bits=4, group_size=group_size)
        fmt = WeightFormat(grid=grid, downcast=downcast, scale_dtype="bfloat16", in_features=width)
        plain = 0.02 * torch.randn(out, width)
        scale, _ = estimate_range(plain, grid, estimator="minmax", scale_dtype="bfloat16", p=2.0)
        tensors = {
            "phi": fmt.encode(plain / grid.expand(scale, width)),
            "A": torch.randn(RANK, width) / 8,
            "B": torch.randn(out, RANK) / 8,
            "scale": scale,
        }
        common = {"format": fmt, "zero_point": None, "gamma": 1.0, "dtype": torch.bfloat16}
        here = LowRankWeight(**{n: t.cuda() for n, t in tensors.items()}, **common)
        there = LowRankWeight(**tensors, **common)
        differ = (quantized_codes(here).cpu() != quantized_codes(there)).nonzero(as_tuple=True)
        row, column = differ
        z = fmt.decode(tensors["phi"]).double()[row, column]
        size = (tensors["B"].abs() @ tensors["A"].abs()).double()[row, column] + z.abs()
        z += (tensors["B"].double()[row] * tensors["A"].double().T[column]).sum(1)
        to_tie = (z - z.floor() - 0.5).abs()
        bound = 2 * (RANK + 4) * 2.0**-24 * size
        x = torch.randn(512, width, device="cuda", dtype=torch.bfloat16)
        again = [fake_quant_linear(x, here) for _ in range(2)]
        found[f"{downcast}, groups of {group_size}"] = {
            "integers that differ from the CPU's": len(row),
            "of": out * width,
            "all of them ties": bool((to_tie <= bound).all()),
            "twice the same": torch.equal(*again),
        }
    print(json.dumps(found, indent=1), flush=True)
    return found


def spread_factors(model: nn.Module) -> None:
    """B such that gamma * B @ A has a deviation of a quarter of a step, as after training."""
    from peft_lrqat import LRQATLayer

    for layer in model.modules():
        if isinstance(layer, LRQATLayer):
            deviation = 0.25 * (3 * layer.in_features / layer.r["default"]) ** 0.5
            nn.init.normal_(layer.lrqat_B["default"], std=deviation / layer.scaling["default"])


def make_layer(variant: str, group_size: int, out: int, width: int) -> nn.Module:
    from variants import VARIANTS

    from peft_lrqat.quant import Grid

    torch.manual_seed(0)
    linear = nn.Linear(width, out, bias=False, dtype=torch.bfloat16, device="cuda")
    nn.init.normal_(linear.weight, std=0.02)
    grid = Grid(bits=4, group_size=group_size)
    model = VARIANTS[variant](nn.Sequential(linear), grid).cuda().train()
    spread_factors(model)
    return model


def layer_step(model: nn.Module, tokens: int, out: int, width: int) -> Callable[[], None]:
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    grad_y = torch.randn(tokens, out, dtype=torch.bfloat16, device="cuda")

    def step() -> None:
        model(x).backward(grad_y)
        model.zero_grad()
        x.grad = None

    return step


def name_of(variant: str, group_size: int) -> str:
    return variant if group_size == -1 else f"{variant}, g{group_size}"


def time_kernels(found: dict[str, Any]) -> dict[str, Any]:
    """Each large kernel by itself against the bytes it moves."""
    from peft_lrqat import LRQATLayer
    from peft_lrqat.quant import low_rank, triton_ops

    rows: dict[str, Any] = {}
    out, width = 4096, 4096
    print(
        f"\nkernels, {out} x {width}\n{'':36} {'us':>8} {'by host':>8} {'GB/s':>8} "
        f"{'of the copy':>12}"
    )
    for variant, group_size in [
        (v, g) for v, g in LAYERS if v in ("LR-QAT, fixed8", "LR-QAT, int")
    ]:
        model = make_layer(variant, group_size, out, width)
        layer = next(m for m in model.modules() if isinstance(m, LRQATLayer))
        w = layer.low_rank_weight("default")
        x = torch.randn(2048, width, dtype=torch.bfloat16, device="cuda")
        grad_y = torch.randn(2048, out, dtype=torch.bfloat16, device="cuda")
        gradient = grad_y.T @ x
        count = torch.zeros(1, dtype=torch.int32, device="cuda")
        made = out * width * 2 + w.phi.numel()
        kernels = {
            "W_hat": (lambda w=w: low_rank.dense(w, w.dtype), made),
            "W_hat, counting": (lambda w=w, c=count: low_rank.dense(w, w.dtype, count=c), made),
            "W_hat and dZ": (
                lambda w=w, g=gradient: triton_ops.weight_gradient(
                    w.layer, g, 0, True, True, True, False
                ),
                made + out * width * 4,
            ),
        }
        if group_size == -1:
            y = torch.randn(2048, out, dtype=torch.bfloat16, device="cuda")
            kernels["sums for the scales"] = (
                lambda y=y, g=grad_y: triton_ops.scale_sums(g, y, None),
                2 * y.numel() * 2,
            )
        for name, (run, size) in kernels.items():
            time_, host = microseconds(run), 1e3 * milliseconds(run, seconds=0.03)
            label = f"{name_of(variant, group_size)}: {name}"
            rate = size / time_ * 1e6
            rows[label] = {"microseconds": time_, "launched one by one": host, "bytes": size}
            print(
                f"{label:36} {time_:8.1f} {host:8.1f} {rate / 1e9:8.0f} "
                f"{rate / found['bandwidth']:12.0%}",
                flush=True,
            )
    return rows


def time_layers(
    found: dict[str, Any], shapes: list[tuple[int, int]], tokens_of: list[int]
) -> dict[str, Any]:
    """Steps of single layers, and their peak of memory above the layer's own."""
    rows: dict[str, Any] = {}
    card = limits.Card(found["bandwidth"], found["matrix"], 67e12)
    for out, width in shapes:
        made = {(v, g): make_layer(v, g, out, width) for v, g in LAYERS}
        for tokens in tokens_of:
            print(
                f"\n{out} x {width}, {tokens} tokens\n"
                f"{'':30} {'ms':>8} {'of LoRA':>8} {'peak, MB':>9} {'on paper':>9}"
            )
            step = limits.Step(out, width, tokens)
            paper = {
                (REFERENCE, -1): step.lora(),
                ("LR-QAT, fixed8", -1): step.per_row(),
                ("LR-QAT, int", -1): step.per_row(0.5),
                ("LR-QAT, fixed8", 128): step.groups(),
                ("LR-QAT, int", 128): step.groups(0.5),
            }
            reference = None
            for key, model in made.items():
                run = layer_step(model, tokens, out, width)
                time_, peak = milliseconds(run), peak_bytes(run)
                reference = reference or time_
                least = limits.seconds(paper[key], card) * 1e3 if key in paper else None
                label = name_of(*key)
                rows[f"{out}x{width}, {tokens}, {label}"] = {
                    "milliseconds": time_,
                    "of LoRA": time_ / reference,
                    "peak": peak,
                    "paper": least,
                }
                print(
                    f"{label:30} {time_:8.3f} {time_ / reference:8.2f} {peak / 2**20:9.0f} "
                    + (f"{least:9.3f}" if least else f"{'-':>9}"),
                    flush=True,
                )
        del made
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def profile_layers() -> None:
    """Where the time of a step goes, kernel by kernel."""
    from torch.profiler import ProfilerActivity, profile

    for variant, group_size in ((REFERENCE, -1), ("LR-QAT, fixed8", -1), ("LR-QAT, fixed8", 128)):
        run = layer_step(make_layer(variant, group_size, 4096, 4096), 2048, 4096, 4096)
        for _ in range(3):
            run()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            for _ in range(10):
                run()
            torch.cuda.synchronize()
        events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
        events.sort(key=lambda e: -e.self_device_time_total)
        print(f"\n{name_of(variant, group_size)}: microseconds a step, kernel by kernel")
        for event in events[:18]:
            print(
                f"{event.self_device_time_total / 10:9.1f} {event.count / 10:5.1f} {event.key[:90]}"
            )
        print(f"{sum(e.self_device_time_total for e in events) / 10:9.1f} together", flush=True)


def capture() -> dict[str, Any]:
    """Whole steps as a CUDA graph and under torch.compile: the same gradients, and their time."""
    rows: dict[str, Any] = {}
    out = width = 4096
    tokens = 2048
    for variant, group_size in ((REFERENCE, -1), ("LR-QAT, fixed8", -1), ("LR-QAT, fixed8", 128)):
        model = make_layer(variant, group_size, out, width)
        x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        grad_y = torch.randn(tokens, out, dtype=torch.bfloat16, device="cuda")
        trained = [p for p in model.parameters() if p.requires_grad]

        def step(
            call: Callable[[Tensor], Tensor] = model,
            x: Tensor = x,
            trained: list[Tensor] = trained,
            grad_y: Tensor = grad_y,
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(call(x), [x, *trained], grad_y)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                eager = step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        row = {"eager, ms": milliseconds(step), "graph, ms": milliseconds(graph.replay)}
        row["graph, error"] = largest_error(captured, eager)
        try:
            compiled = torch.compile(model)
            row["compile, error"] = largest_error(step(compiled), eager)
            row["compile, ms"] = milliseconds(partial(step, compiled))
            overhead = torch.compile(model, mode="reduce-overhead")
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                gradients = [g.clone() for g in step(overhead)]
            row["reduce-overhead, error"] = largest_error(gradients, eager)
            row["reduce-overhead, ms"] = milliseconds(partial(step, overhead))
        except Exception as error:  # what the compiler of this machine cannot do is a result, too
            row["compile"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows[name_of(variant, group_size)] = row
        print(f"{name_of(variant, group_size)}: {json.dumps(row)}", flush=True)
        torch._dynamo.reset()
    return rows


def largest_error(found: Any, expected: Any) -> float:
    """Of each tensor, relative to its norm."""
    return max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(found, expected, strict=True)
    )


def make_model(settings: dict[str, Any], variant: str | None, group_size: int = -1) -> nn.Module:
    import transformers
    from variants import VARIANTS

    from peft_lrqat.quant import Grid

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**settings)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if variant is None:
        return model
    model = VARIANTS[variant](model, Grid(bits=4, group_size=group_size)).cuda().train()
    spread_factors(model)
    return model


def time_models() -> dict[str, Any]:
    """A training step with AdamW."""
    rows: dict[str, Any] = {}
    cases = {"SmolLM2-135M, 4 x 512 tokens": (SMOLLM2, 4, 512)}
    cases["4 blocks of a 7B Llama, 2048 tokens"] = (LLAMA_BLOCKS, 1, 2048)
    for case, (settings, sequences, length) in cases.items():
        print(f"\n{case}\n{'':30} {'ms':>8} {'of LoRA':>8} {'peak, MB':>9} {'all, MB':>9}")
        reference = None
        for variant, group_size in (
            (REFERENCE, -1),
            ("LoRA", -1),
            ("LR-QAT, fixed8", -1),
            ("LR-QAT, int", -1),
            ("LR-QAT, fixed8", 64),
            ("LR-QAT, checkpointed", -1),
            ("full QAT (LSQ)", -1),
        ):
            gc.collect()
            torch.cuda.empty_cache()
            start = torch.cuda.memory_allocated()
            model = make_model(settings, variant, group_size)
            ids = torch.randint(0, settings["vocab_size"], (sequences, length), device="cuda")
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)

            def step(
                model: nn.Module = model, optimizer: Any = optimizer, ids: Tensor = ids
            ) -> None:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            time_, peak = milliseconds(step, seconds=0.5), peak_bytes(step)
            whole = torch.cuda.max_memory_allocated() - start
            reference = reference or time_
            label = name_of(variant, group_size)
            rows[f"{case}, {label}"] = {
                "milliseconds": time_,
                "of LoRA": time_ / reference,
                "peak": peak,
                "all": whole,
            }
            print(
                f"{label:30} {time_:8.2f} {time_ / reference:8.2f} {peak / 2**20:9.0f} "
                f"{whole / 2**20:9.0f}",
                flush=True,
            )
            del model, optimizer, step
    return rows


def time_generation() -> dict[str, Any]:
    """Greedy tokens a second of one request."""
    rows: dict[str, Any] = {}
    for case, settings in (("SmolLM2-135M", SMOLLM2), ("4 blocks of a 7B Llama", LLAMA_BLOCKS)):
        print(f"\ngeneration, {case}\n{'':30} {'tokens/s':>9} {'of the plain one':>17}")
        plain = None
        for name in ("plain", "weights held", "no weights held", "merged"):
            gc.collect()
            torch.cuda.empty_cache()
            model = make_model(settings, None if name == "plain" else "LR-QAT, fixed8").eval()
            if name != "plain":
                model.base_model.set_cache_limit(0 if name == "no weights held" else 1 << 33)
            if name == "merged":
                model = model.merge_and_unload()
            ids = torch.arange(100, 116, device="cuda")[None]

            def generate(tokens: int, model: nn.Module = model, ids: Tensor = ids) -> float:
                torch.cuda.synchronize()
                start = time.perf_counter()
                model.generate(
                    input_ids=ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
                )
                torch.cuda.synchronize()
                return tokens / (time.perf_counter() - start)

            generate(8)
            rate = statistics.median(generate(48) for _ in range(3))
            plain = plain or rate
            rows[f"{case}, {name}"] = {"tokens a second": rate, "of plain": rate / plain}
            print(f"{name:30} {rate:9.1f} {rate / plain:17.2f}", flush=True)
            del model, generate
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="print launches and waits as JSON")
    parser.add_argument("--clipped", type=int, default=0, help="clipped weights, for --count")
    parser.add_argument("--limits", action="store_true", help="print the limits on paper")
    sections = [
        "checks",
        "agreement",
        "kernels",
        "layers",
        "profile",
        "capture",
        "model",
        "generation",
    ]
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument("--layers", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark.json"))
    args = parser.parse_args()
    if args.count:
        import launches

        print(json.dumps(launches.count(args.clipped)))
        return
    if args.limits:
        limits.main()
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use was found; --count and --limits need none")
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    found: dict[str, Any] = machine()
    print(json.dumps(found, indent=1), flush=True)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.layers]
    runs: dict[str, Callable[[], Any]] = {
        "checks": run_checks,
        "agreement": lambda: agreement(found["card"]),
        "kernels": lambda: time_kernels(found),
        "layers": lambda: time_layers(found, shapes, args.tokens),
        "profile": profile_layers,
        "capture": capture,
        "model": time_models,
        "generation": time_generation,
    }
    for name in args.only:
        start = time.perf_counter()
        found[name] = runs[name]()
        args.output.write_text(json.dumps(found, indent=1) + "\n")
        print(f"[{name}: {time.perf_counter() - start:.0f} seconds]", flush=True)
    if found.get("checks") is False:
        raise SystemExit("the kernels are not right on this card: see the failures above")


if __name__ == "__main__":
    main()
