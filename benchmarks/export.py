"""What an export of SmolLM2-135M takes: bytes on disk against the formula, seconds, and memory.

    python benchmarks/export.py                     4 bits, groups of 32, about 3 minutes
    python benchmarks/export.py --bits 3 --group_size -1

Every format runs in its own process. The memory is the peak of the resident set (Linux, VmHWM reset
before the export) less what was resident before, the loaded model included. "formula" is what the
quantised weights must take by the definition of the format, "weights" what the export says they
took. The adapter is untrained: neither figure depends on the values of the integers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peft import get_peft_model

from peft_lrqat import LRQATConfig
from peft_lrqat.demo.smollm2 import load_smollm2
from peft_lrqat.export import export_model
from peft_lrqat.export.linears import lrqat_layers
from peft_lrqat.formats import ggml
from peft_lrqat.formats.table import FORMATS
from peft_lrqat.quant.packing import packed_bytes


MB = 1 << 20


def formula(format: str, bits: int, layers: list) -> int:
    """Bytes of the quantised weights of symmetric bfloat16 layers."""
    total = 0
    for layer in layers:
        rows, columns, grid = layer.out_features, layer.in_features, layer.base_layer.format.grid
        groups = grid.num_groups(columns)
        block = ggml.block_type(grid, columns)
        total += {
            "compressed-tensors": lambda r, c, g, _: 4 * r * -(-c * bits // 32) + 2 * r * g + 16,
            "gguf": lambda r, c, _, b: r * ggml.row_bytes(b, c),
            "gptq": lambda r, c, g, _: r * c * bits // 8 + 2 * r * g + g * r * bits // 8 + 4 * c,
            "packed": lambda r, c, g, _: r * packed_bytes(c, bits) + 2 * r * g,
            "dequantized": lambda r, c, *_: 2 * r * c,
        }[format](rows, columns, groups, block)
    return total


def resident(field: str) -> int:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def measure(format: str, bits: int, group_size: int) -> dict:
    model, tokenizer = load_smollm2()
    fields = {"target_modules": "all-linear", "range_estimator": "minmax"}
    config = LRQATConfig(task_type="CAUSAL_LM", bits=bits, group_size=group_size, **fields)
    model = get_peft_model(model, config).eval()
    with tempfile.TemporaryDirectory() as folder:
        # The first export also imports, and what it frees must not be there for the second.
        export_model(
            model, Path(folder, "first"), format=format, tokenizer=tokenizer, progress=False
        )
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        path = export_model(
            model, Path(folder, "second"), format=format, tokenizer=tokenizer, progress=False
        )
        seconds = time.perf_counter() - start
        layers = list(lrqat_layers(model).values())
        card = (path / "README.md").read_text()
        (weights,) = (
            line for line in card.splitlines() if "bytes of the quantised weights" in line
        )
        return {
            "format": format,
            "formula": formula(format, bits, layers),
            "weights": int(weights.split("|")[2].replace(",", "")),
            "directory": sum(file.stat().st_size for file in path.iterdir()),
            "seconds": seconds,
            "above": resident("VmHWM") - before,
            "largest": max(layer.out_features * layer.in_features for layer in layers),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group_size", type=int, default=32)
    parser.add_argument("--format", choices=FORMATS, help="this one alone, printed as JSON")
    args = parser.parse_args()
    if args.format:
        print("RESULT" + json.dumps(measure(args.format, args.bits, args.group_size)))
        return
    print(
        "| format | formula, MB | weights, MB | directory, MB | s | peak above the model, MB |\n"
        "|---|---|---|---|---|---|"
    )
    for format in FORMATS:
        command = [
            sys.executable,
            __file__,
            "--bits",
            str(args.bits),
            "--group_size",
            str(args.group_size),
        ]
        done = subprocess.run(
            [*command, "--format", format], capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if not lines:
            print(f"| {format} | {done.stderr.strip().splitlines()[-1]} | | | | |")
            continue
        found = json.loads(lines[0].removeprefix("RESULT"))
        sizes = " | ".join(
            f"{found[name] / MB:.2f}" for name in ("formula", "weights", "directory")
        )
        print(
            f"| {format} | {sizes} | {found['seconds']:.1f} | {found['above'] / MB:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
