"""Exports in the runtimes they are for: the likeliest next tokens there, beside ours.

    python benchmarks/runtimes.py

SmolLM2-135M is rounded in each setting (by GPTQ below 4 bits), exported, and loaded by programs
that know nothing of this package: vLLM for CPUs (in an environment of its own, made in
--environment: some minutes, 3.4 GB), llama.cpp and transformers. Each gets the same prompt. The
table says whether its likeliest token is ours, and how far the log-probabilities of its five
likeliest are from ours, at most.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_environment import vllm_python

from peft_lrqat import (
    CalibratedStart,
    LowBitConfig,
    LRQATConfig,
    calibrate_low_bit,
    export_model,
    make_blocks,
)
from peft_lrqat.demo import load_topics
from peft_lrqat.demo.smollm2 import load_smollm2


PROMPT = "The history of the village begins with the arrival of"
# Each gets the directory and the ids, and prints the log-probabilities of five tokens by their ids.
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=128)
    options = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    (answer,) = model.generate({"prompt_token_ids": json.loads(sys.argv[2])}, options)
    found = answer.outputs[0].logprobs[0]
    print("RESULT", json.dumps({token: entry.logprob for token, entry in found.items()}))
"""
LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1] + "/model.gguf"
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
options = {"n_predict": 1, "temperature": 0.0, "n_probs": 5, "cache_prompt": False}
answer = xllamacpp.Server(params).handle_completions({"prompt": json.loads(sys.argv[2]), **options})
found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("RESULT", json.dumps({entry["id"]: entry["logprob"] for entry in found}))
"""
TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.tensor([json.loads(sys.argv[2])])).logits[0, -1].float()
top = logits.log_softmax(-1).topk(5)
print("RESULT", json.dumps(dict(zip(top.indices.tolist(), top.values.tolist()))))
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One export in one runtime."""

    runtime: str
    weights: str  # in words
    format: str
    fields: dict[str, Any] = field(default_factory=dict)


def rows() -> list[Row]:
    w4, g64, g32 = {"bits": 4}, {"group_size": 64}, {"group_size": 32}
    zeros = {"symmetric": False}
    vllm = {
        "W4 g64": {**w4, **g64},
        "W4 per channel": w4,
        "W4 asymmetric g64": {**w4, **g64, **zeros},
        "W4 g64, A8": {**w4, **g64, "activation_bits": 8},
        "W8 per channel": {"bits": 8},
        "W3 g64": {"bits": 3, **g64},
    }
    llama_cpp = {
        "W4 g32": {**w4, **g32},
        "W4 asymmetric g32": {**w4, **g32, **zeros},
        "W3 per channel": {"bits": 3},
        "W2 asymmetric g32": {"bits": 2, **g32, **zeros},
        "W8 per channel": {"bits": 8},
    }
    plain = {"W4 g64": {**w4, **g64}, "W3 per channel": {"bits": 3}}
    packed = {"W4 per channel": w4, "W2 per channel": {"bits": 2}, "W8 per channel": {"bits": 8}}
    return [
        Row(runtime=runtime, weights=weights, format=format, fields=fields)
        for runtime, format, settings in (
            ("vllm", "compressed-tensors", vllm),
            ("llama.cpp", "gguf", llama_cpp),
            ("transformers", "compressed-tensors", plain),
            ("transformers", "gemma", packed),
        )
        for weights, fields in settings.items()
    ]


def round_model(row: Row, base: Path, tokenizer: Any) -> Any:
    """SmolLM2 in a setting: by GPTQ below 4 bits, where rounding to nearest would ruin it."""
    # llama.cpp computes in float32.
    dtype = torch.float32 if row.runtime == "llama.cpp" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if row.fields["bits"] >= 4:
        config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", **row.fields)
        return get_peft_model(model, config)
    blocks = make_blocks(load_topics("train"), tokenizer, block_size=512).select(range(32))
    start = CalibratedStart(method="gptq", dataset=blocks, progress=False)
    return calibrate_low_bit(model, LowBitConfig(**row.fields), start)


def measure(row: Row, base: Path, work: Path, python: Callable[[str], Path]) -> dict[str, Any]:
    """Exports, and compares what the runtime says."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT).input_ids
    rounded = round_model(row, base, tokenizer).eval()
    export = work / "export"
    shutil.rmtree(export, ignore_errors=True)
    export_model(rounded, export, format=row.format, tokenizer=tokenizer, progress=False)
    with torch.no_grad():
        logits = rounded(input_ids=torch.tensor([ids])).logits[0, -1].float()
    mine = logits.log_softmax(-1)
    scripts = {"vllm": VLLM, "llama.cpp": LLAMA_CPP, "transformers": TRANSFORMERS}
    script = work / "runtime.py"
    script.write_text(scripts[row.runtime])
    given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python(row.runtime)), str(script), str(export), json.dumps(ids)],
        env=os.environ | given,
        capture_output=True,
        text=True,
        cwd=work,
    )
    found: dict[str, Any] = {
        "runtime": row.runtime,
        "weights": row.weights,
        "format": row.format,
        "fields": row.fields,
    }
    (work / "log").write_text(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        return {**found, "refused": why_refused(done)}
    theirs = {int(token): value for token, value in json.loads(lines[-1][6:]).items()}
    return {
        **found,
        "same_first": max(theirs, key=theirs.__getitem__) == int(mine.argmax()),
        "furthest": round(max(abs(float(mine[t]) - value) for t, value in theirs.items()), 4),
    }


def why_refused(done: subprocess.CompletedProcess[str]) -> str:
    """The first error that a process named; vLLM's kernels give their reasons in the next line."""
    lines = (done.stdout + done.stderr).splitlines()
    for number, line in enumerate(lines):
        if "Error: " in line:
            reason = line.partition("Error: ")[2].strip()
            next_lines = (
                part.partition("cannot implement due to: ") for part in lines[number + 1 :]
            )
            given = [part[2] for part in list(next_lines)[:4] if part[1]]
            return " ".join([reason, *given[-1:]])
    return f"ended with {done.returncode}"


def print_table(results: list[dict[str, Any]]) -> None:
    print("| runtime | weights | format | likeliest token | furthest log-probability of five |")
    print("|---|---|---|---|---|")
    for found in results:
        told = (
            f"refused: {found['refused'][:90]} |"
            if "refused" in found
            else f"{'the same' if found['same_first'] else 'another'} | {found['furthest']:.3f}"
        )
        cells = " | ".join(found[name] for name in ("runtime", "weights", "format"))
        print(f"| {cells} | {told} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", default="vllm-environment")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "runtimes"))
    parser.add_argument("--runtimes", nargs="+", default=["vllm", "llama.cpp", "transformers"])
    parser.add_argument("--results", default=str(Path(__file__).parent / "results/runtimes.json"))
    args = parser.parse_args()
    work = Path(args.work).absolute()
    base = work / "base"
    if not (base / "config.json").exists():
        for part in load_smollm2(torch.bfloat16):
            part.save_pretrained(base)

    def python(runtime: str) -> Path:
        if runtime == "vllm":
            return vllm_python(Path(args.environment)).absolute()
        return Path(sys.executable)

    results = []
    for row in rows():
        if row.runtime in args.runtimes:
            results.append(measure(row, base, work, python))
            print(json.dumps(results[-1]), flush=True)
    Path(args.results).write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)


if __name__ == "__main__":
    main()
