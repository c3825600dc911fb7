"""Memory and time of loading: 16-bit weights that are wrapped, and low-bit bases.

    python benchmarks/loading.py                    # 1.1 billion parameters: about 5 minutes

A Llama of random bfloat16 weights in several files is made in a temporary directory, which takes
3 GB of disk and is deleted at the end. Each variant runs in a process of its own:

    wrap      the 16-bit model is loaded, then `get_peft_model` makes its weights low-bit
    made      `from_pretrained` with a `LowBitConfig`: low-bit while loading
    prepare   `prepare_low_bit` writes the artefact, a tensor at a time
    stored    `from_pretrained` of that artefact, integers verified

Peak: growth of the resident set from before loading to its largest, all weights once read; mapped
pages of files count.
Bound: packed weights, what stays 16-bit, the largest tensor, and 10 per cent. The time of
`stored` is compared with safetensors' own load of the same files, both with the files in memory.
Planned: by `lrqat plan`, which counts an adapter, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from process import MB, forget_peak, in_own_process, peak_bytes, resident
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import LowBitConfig, LRQATConfig, prepare_low_bit
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.formats.shards import ShardWriter
from peft_lrqat.trainer.plan import make_plan


SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
LAYERS = 22  # which make 1.1 billion parameters
SHARD_BYTES = 500 * MB
HEADER_BYTES = 1 << 16


def make_checkpoint(folder: Path, layers: int) -> int:
    """A sharded Llama of random weights, written a tensor at a time; how many parameters it has."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.manual_seed(0)
    # One pool for all tensors: what the values are matters little, and making them takes long.
    largest = max(tensor.numel() for tensor in model.state_dict().values())
    pool = torch.randn(largest, dtype=torch.bfloat16).mul_(0.02)
    with ShardWriter(folder, SHARD_BYTES, HEADER_BYTES) as writer:
        for name, tensor in model.state_dict().items():
            writer.write(name, pool[: tensor.numel()].view(tensor.shape))
    return sum(tensor.numel() for tensor in model.state_dict().values())


def adapter(args: argparse.Namespace) -> LRQATConfig:
    fields = {"bits": args.bits, "group_size": args.group_size, "downcast": "int"}
    return LRQATConfig(
        r=args.r, target_modules="all-linear", range_estimator=args.range_estimator, **fields
    )


def load_wrapped(args: argparse.Namespace) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(args.folder / "plain")
    for parameter in model.parameters():
        # Out of the mapped files, whose pages would count until the last weight in them is gone.
        parameter.data = parameter.data.clone()
    forget_peak()
    return get_peft_model(model, adapter(args))


def settings(args: argparse.Namespace) -> LowBitConfig:
    return LowBitConfig(
        bits=args.bits, group_size=args.group_size, range_estimator=args.range_estimator
    )


def load_made(args: argparse.Namespace) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        args.folder / "plain", quantization_config=settings(args)
    )


def prepare(args: argparse.Namespace) -> None:
    target = args.folder / "base"
    shutil.rmtree(target, ignore_errors=True)
    prepare_low_bit(
        args.folder / "plain",
        target,
        settings(args),
        max_shard_bytes=SHARD_BYTES,
        progress=False,
    )


def load_stored(args: argparse.Namespace) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(args.folder / "base")


VARIANTS = {"prepare": prepare, "stored": load_stored, "made": load_made, "wrap": load_wrapped}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    made: list[Any] = []

    def run() -> None:
        start = time.perf_counter()
        made.append(VARIANTS[name](args))
        found["seconds"] = time.perf_counter() - start
        for tensor in made[0].state_dict().values() if made[0] is not None else ():
            touch(tensor)

    before = resident()
    found["peak"] = peak_bytes(run) - before
    if name == "stored":
        found |= sizes(made[0]) | {"read": read_seconds(args.folder / "base")}
    return found


def touch(tensor: torch.Tensor) -> None:
    """Reads a value of every page: a mapped file is in memory only where it was read."""
    tensor.detach().flatten().view(torch.uint8)[:: 1 << 10].max()


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the low-bit layers, of all else, and of the largest tensor in the 16-bit model."""
    layers = [m for m in model.modules() if isinstance(m, DowncastLinear)]
    packed = {id(p): p.nbytes for layer in layers for p in (layer.phi, layer.scale0)}
    rest = {id(p): p.nbytes for p in model.parameters() if id(p) not in packed}
    largest = max(
        [*rest.values(), *(2 * layer.in_features * layer.out_features for layer in layers)]
    )
    return {"packed": sum(packed.values()), "rest": sum(rest.values()), "largest": largest}


def read_seconds(folder: Path) -> float:
    """Seconds of safetensors' own load of all files, every page touched."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for file in sorted(folder.glob("*.safetensors")):
            for tensor in load_file(file).values():
                tensor.clone()
        best = min(best, time.perf_counter() - start)
    return best


def report(args: argparse.Namespace, count: int, figures: dict[str, dict[str, Any]]) -> None:
    stored = figures["stored"]
    bound = 1.1 * (stored["packed"] + stored["rest"] + stored["largest"])
    print(f"{count / 1e9:.2f} billion parameters, {args.bits} bits, group size {args.group_size}")
    print(
        f"packed {stored['packed'] / MB:.0f} MB, rest {stored['rest'] / MB:.0f} MB, largest tensor "
        f"{stored['largest'] / MB:.0f} MB: bound {bound / MB:.0f} MB"
    )
    plan = make_plan(str(args.folder / "plain"), adapter(args), tokens=1)
    planned = {"wrap": plan.loading_plain, "stored": plan.loading_base}
    for name, found in figures.items():
        inside = "" if name == "wrap" else ", within" if found["peak"] <= bound else ", ABOVE"
        told = f", planned {planned[name] / MB:.0f} MB" if name in planned else ""
        print(f"{name:8} peak {found['peak'] / MB:5.0f} MB{inside}{told}; {found['seconds']:.1f} s")
    size = sum(file.stat().st_size for file in (args.folder / "base").glob("*.safetensors")) / 1e9
    print(
        f"stored: {stored['seconds'] / size:.2f} s per GB; safetensors alone "
        f"{stored['read'] / size:.2f} s per GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--r", type=int, default=1, help="rank of the adapter in `wrap`")
    parser.add_argument("--range_estimator", default="minmax")
    parser.add_argument(
        "--variants", type=lambda text: text.split(","), default=list(VARIANTS), help="a,b"
    )
    parser.add_argument("--folder", type=Path, help="keep the files there")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    if args.child:
        print(json.dumps(measure(args.child, args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        args.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(args.folder).free
        if free < 4 * 10**9 * args.layers / LAYERS:
            sys.exit(f"the files take 4 GB, but {args.folder} has {free / 1e9:.1f} GB left")
        plain = args.folder / "plain"
        plain.mkdir(exist_ok=True)
        count = make_checkpoint(plain, args.layers)
        words = [*sys.argv[1:], "--folder", str(args.folder)]
        figures = {}
        for name in args.variants:
            figures[name] = in_own_process(
                __file__, *words, "--child", name, for_memory=name != "stored"
            )
            print(f"{name:8} peak {figures[name]['peak'] / MB:5.0f} MB", flush=True)
        report(args, count, figures)


if __name__ == "__main__":
    main()
