"""Many adapters on one base model: memory, loading, switching and generation, packed against
standard LoRA.

    python benchmarks/serving.py                       # SmolLM2-135M, 1, 16 and 128 adapters: about
    10 minutes on one core python benchmarks/serving.py --adapters 512 --kinds packed    # standard
    adapters would take hours to load

Standard adapters are LoRA of rank 16 on all linear layers, kept in bfloat16; packed ones are the
same at ``--average_bits`` bits of storage. Factors are random: neither memory nor time depends on
their values.

Memory: each count in a process of its own, growth of the resident set (VmRSS) from the base model
alone to all adapters loaded and each run once, per adapter. Switch: ``set_adapter``. Generation:
both models in one process, requests in turn, medians.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat.demo.smollm2 import load_smollm2
from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter


WEIGHTS = "adapter_model.safetensors"
MB = 1e6


def resident() -> float:
    """The resident set of this process, MB."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / MB


def prepare(output: Path, average_bits: float) -> None:
    """The base model, a LoRA adapter with random factors, and the same packed."""
    if not (output / "base").exists():
        load_smollm2()[0].save_pretrained(output / "base")
    if not (output / "lora").exists():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.bfloat16)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False
        )
        get_peft_model(base, config).save_pretrained(str(output / "lora"))
        state = {
            name: tensor.bfloat16() for name, tensor in load_file(output / "lora" / WEIGHTS).items()
        }
        save_file(state, output / "lora" / WEIGHTS, metadata={"format": "pt"})
    if not (output / "packed").exists():
        start = time.perf_counter()
        quantize_adapter(
            output / "lora",
            output / "packed",
            LoRAQuantConfig(average_bits=average_bits),
            progress=False,
        )
        print(f"packed in {time.perf_counter() - start:.1f} s")


def load(
    output: Path, kind: str, count: int, cache_limit: int | None = None
) -> tuple[PeftModel, list[float]]:
    """The base model with ``count`` adapters, and the seconds that each took to load."""
    base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.bfloat16)
    seconds, model = [], None
    for index in range(count):
        start = time.perf_counter()
        options = {"autocast_adapter_dtype": False}  # LoRA stays in bfloat16
        if model is None:
            model = PeftModel.from_pretrained(base, str(output / kind), adapter_name="0", **options)
        else:
            model.load_adapter(str(output / kind), adapter_name=str(index), **options)
        seconds.append(time.perf_counter() - start)
    if kind == "packed" and cache_limit is not None:
        model.base_model.set_cache_limit(cache_limit)
    return model.eval(), seconds


@torch.no_grad()
def memory(output: Path, kind: str, count: int) -> dict[str, float]:
    """In a fresh process: memory and loading."""
    ids = torch.arange(1, 9)[None]
    base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.bfloat16)
    base(ids)
    before = resident()
    del base
    model, seconds = load(output, kind, count, cache_limit=0)
    switches = []
    for index in range(count):
        start = time.perf_counter()
        model.set_adapter(str(index))
        switches.append(time.perf_counter() - start)
        if index in (0, count - 1):
            model(ids)
    return {
        "kind": kind,
        "adapters": count,
        "megabytes": resident() - before,
        "megabytes_each": (resident() - before) / count,
        "load_seconds": statistics.median(seconds),
        "last_load_seconds": seconds[-1],
        "switch_ms": 1e3 * statistics.median(switches),
    }


@torch.no_grad()
def request(model: PeftModel, adapter: int, tokens: int, prompt: torch.Tensor) -> float:
    """Seconds from the switch to the last token of a greedy answer."""
    start = time.perf_counter()
    model.set_adapter(str(adapter))
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - start


@torch.no_grad()
def mixed(model: PeftModel, count: int, prompt: torch.Tensor) -> float:
    """Seconds of a forward pass over one row for each of ``count`` adapters."""
    ids = prompt.repeat(count, 1)
    start = time.perf_counter()
    model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=[str(i) for i in range(count)],
    )
    return time.perf_counter() - start


def generation(output: Path, rounds: int) -> None:
    """Times of requests, each a median over ``rounds`` in turn with all others."""
    count = 8
    prompt = torch.arange(100, 132)[None]
    models = {"LoRA": load(output, "lora", count)[0]}
    for name, limit in (("packed, expanded factors kept", 2**28), ("packed, nothing kept", 0)):
        models[name] = load(output, "packed", count, limit)[0]
    cases = {
        "the same adapter, 32 tokens": lambda m, i: request(m, 0, 32, prompt),
        "another adapter each time, 32 tokens": lambda m, i: request(m, i % count, 32, prompt),
        "another adapter each time, 1 token": lambda m, i: request(m, i % count, 1, prompt),
        f"one batch of {count} adapters": lambda m, i: mixed(m, count, prompt),
    }
    print(
        f"\n{'seconds of a request; ratio to LoRA':40}" + "".join(f"{name:>34}" for name in models)
    )
    for title, case in cases.items():
        times = {name: [] for name in models}
        for index in range(rounds + 1):
            for name, model in models.items():
                if name == "packed, expanded factors kept" and "another" in title:
                    # As for an adapter that has not run for long: its expanded factors have made
                    # room.
                    model.base_model.set_cache_limit(2**28)
                times[name].append(case(model, index))
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        cells = "".join(
            f"{value:22.3f} ({value / medians['LoRA']:5.2f} x) " for value in medians.values()
        )
        print(f"{title:40}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, nargs="*", default=[1, 16, 128])
    parser.add_argument(
        "--kinds", nargs="*", choices=["lora", "packed"], default=["lora", "packed"]
    )
    parser.add_argument("--average_bits", type=float, default=1.65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="serving-benchmark")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if args.child:
        print(json.dumps(memory(output, args.child[0], int(args.child[1]))))
        return
    prepare(output, args.average_bits)
    sizes = {kind: (output / kind / WEIGHTS).stat().st_size / MB for kind in ("lora", "packed")}
    print(
        f"files: LoRA in bfloat16 {sizes['lora']:.2f} MB, packed {sizes['packed']:.2f} MB, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        f"{'':8}{'adapters':>9}{'MB in all':>11}{'MB each':>9}{'load, s':>9}"
        f"{'last load, s':>13}{'switch, ms':>11}"
    )
    for count in args.adapters:
        for kind in args.kinds:
            command = [
                sys.executable,
                __file__,
                "--output",
                str(output),
                "--child",
                kind,
                str(count),
            ]
            row = json.loads(
                subprocess.run(
                    command, check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            print(
                f"{kind:8}{count:9}{row['megabytes']:11.0f}{row['megabytes_each']:9.2f}{row['load_seconds']:9.2f}"
                f"{row['last_load_seconds']:13.2f}{row['switch_ms']:11.1f}",
                flush=True,
            )
    if args.rounds:
        generation(output, args.rounds)


if __name__ == "__main__":
    main()
