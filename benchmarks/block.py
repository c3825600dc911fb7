"""A 7B model end to end, from one real block of it: prepare, train, export.

    python benchmarks/block.py

A Llama with the shapes of the 7B model is made with one block and with two. Each stage runs in a
process of its own on both; the difference is what a block takes, and 32 of them with what is left
make the whole. Peaks are those of the resident set (Linux) above the imports. Weights are random.
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
from process import MB, in_own_process, peak_bytes, resident
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_lrqat import LowBitConfig, LRQATConfig, prepare_low_bit
from peft_lrqat.export import export_model


BLOCKS = 32
GB = 1e9


def make_model(folder: Path, blocks: int, args: argparse.Namespace) -> None:
    """A random checkpoint."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=blocks,
        num_attention_heads=args.hidden // 128,
        vocab_size=32_000,
        use_cache=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    torch.set_default_dtype(torch.float32)


def prepare(folder: Path, args: argparse.Namespace) -> None:
    shutil.rmtree(folder / "base", ignore_errors=True)
    config = LowBitConfig(bits=4, group_size=128, downcast="int", range_estimator=args.ranges)
    prepare_low_bit(str(folder / "plain"), folder / "base", config, progress=False)


def _adapted(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def train(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Two steps; the second is measured."""
    model = _adapted(folder).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 32_000, (1, args.tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    begin = time.perf_counter()
    peak = peak_bytes(step)
    return {"seconds": time.perf_counter() - begin, "peak": peak}


def export(folder: Path, args: argparse.Namespace) -> None:
    shutil.rmtree(folder / "export", ignore_errors=True)
    export_model(_adapted(folder), folder / "export", format="compressed-tensors", progress=False)


STAGES: dict[str, Any] = {"prepare": prepare, "train": train, "export": export}


def measure(stage: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak bytes of one stage, in this process."""
    start = resident()
    if stage == "train":
        found = train(folder, args)
        return {**found, "peak": found["peak"] - start}
    begin = time.perf_counter()
    peak = peak_bytes(lambda: STAGES[stage](folder, args))
    return {"seconds": time.perf_counter() - begin, "peak": peak - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=11_008, help="of the MLP")
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--ranges", default="lp", help="`range_estimator` of the base")
    parser.add_argument("--stage", choices=STAGES, help="only this one, and print JSON")
    parser.add_argument("--folder", help="with --stage")
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(measure(args.stage, Path(args.folder), args)))
        return
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in STAGES}
    with tempfile.TemporaryDirectory() as place:
        for blocks in (1, 2):
            folder = Path(place) / str(blocks)
            make_model(folder, blocks, args)
            for stage in STAGES:
                given = ["--stage", stage, "--folder", str(folder)]
                found[stage][blocks] = in_own_process(__file__, *sys.argv[1:], *given)
                print(stage, blocks, found[stage][blocks], file=sys.stderr, flush=True)
    print(f"| | seconds a block | MB a block | {BLOCKS} blocks and the rest |\n|---|---|---|---|")
    for stage, by_blocks in found.items():
        one, two = by_blocks[1], by_blocks[2]
        block = {kind: two[kind] - one[kind] for kind in one}
        whole = {kind: one[kind] + (BLOCKS - 1) * block[kind] for kind in one}
        print(
            f"| {stage} | {block['seconds']:.1f} | {block['peak'] / MB:,.0f} | "
            f"{whole['seconds']:,.0f} s, {whole['peak'] / GB:.1f} GB |"
        )


if __name__ == "__main__":
    main()
