"""Exports in the runtimes they are for: the likeliest next tokens there, beside ours.

    python benchmarks/runtimes.py

SmolLM2-135M is rounded in each setting (by GPTQ below 4 bits), exported, and loaded by programs
that know nothing of this package: vLLM for CPUs (in an environment of its own, made in
--environment: some minutes, 3.4 GB), llama.cpp and transformers. Each gets the same prompt. The
table says whether its likeliest token is ours, and how far the log-probabilities of its five
likeliest are from ours, at most. A mixture of experts of random weights is among them; vLLM runs it
on a CPU with AMX, or on one of AMD's with the kernels that are put into a second environment.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from vllm_environment import vllm_python, zen_python

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
    experts = {**w4, "target_parameters": "all-experts"}
    mixture = {"Qwen3-MoE, W4 g32": {**experts, **g32}}
    packed = {"W4 per channel": w4, "W2 per channel": {"bits": 2}, "W8 per channel": {"bits": 8}}
    return [
        Row(runtime=runtime, weights=weights, format=format, fields=fields)
        for runtime, format, settings in (
            ("vllm", "compressed-tensors", vllm),
            ("vllm", "compressed-tensors", mixture),
            ("llama.cpp", "gguf", llama_cpp),
            ("transformers", "compressed-tensors", plain),
            ("transformers", "gemma", packed),
        )
        for weights, fields in settings.items()
    ]


def has_experts(row: Row) -> bool:
    return "target_parameters" in row.fields


def mixture(vocabulary: int) -> Any:
    """A mixture of experts with random weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # a setting of all configs
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=vocabulary,
        initializer_range=0.1,  # so that tokens differ in how likely they are
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def round_model(row: Row, base: Path, tokenizer: Any) -> Any:
    """The model of a row in its setting: by GPTQ below 4 bits, where rounding would ruin it."""
    if has_experts(row):
        fields = {"target_modules": "all-linear", "exclude_modules": ["gate"], **row.fields}
        config = LRQATConfig(task_type="CAUSAL_LM", **fields)
        return get_peft_model(mixture(len(tokenizer)), config)
    # llama.cpp computes in float32.
    dtype = torch.float32 if row.runtime == "llama.cpp" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if row.fields["bits"] >= 4:
        config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", **row.fields)
        return get_peft_model(model, config)
    blocks = make_blocks(load_topics("train"), tokenizer, block_size=512).select(range(32))
    start = CalibratedStart(method="gptq", dataset=blocks, progress=False)
    return calibrate_low_bit(model, LowBitConfig(**row.fields), start)


def measure(row: Row, base: Path, work: Path, python: Callable[[Row], Path]) -> dict[str, Any]:
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
        [str(python(row)), str(script), str(export), json.dumps(ids)],
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


def table_lines(results: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    lines = [
        "| runtime | weights | format | likeliest token | furthest log-probability of five |",
        "|---|---|---|---|---|",
    ]
    for found in results:
        told = "refused: no kernel for it | |"
        if "refused" not in found:
            first = "the same" if found["same_first"] else "another"
            told = f"{first} | {found['furthest']:.3f} |"
        elif not found["refused"].startswith("Failed to find a kernel"):
            told = f"refused: {found['refused'][:90]} | |"
        cells = " | ".join(found[name] for name in ("runtime", "weights", "format"))
        lines.append(f"| {cells} | {told}")
    return lines


def key(found: dict[str, Any]) -> tuple[str, str, str]:
    return found["runtime"], found["weights"], found["format"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", default="vllm-environment")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "runtimes"))
    parser.add_argument("--runtimes", nargs="+", default=["vllm", "llama.cpp", "transformers"])
    parser.add_argument("--weights", default="", help="only the rows that have this in their name")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results/runtimes.json"))
    args = parser.parse_args()
    work = Path(args.work).absolute()
    base = work / "base"
    if not (base / "config.json").exists():
        for part in load_smollm2(torch.bfloat16):
            part.save_pretrained(base)

    def python(row: Row) -> Path:
        if row.runtime != "vllm":
            return Path(sys.executable)
        of_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        make = zen_python if has_experts(row) and of_amd else vllm_python
        return make(Path(args.environment)).absolute()

    file = Path(args.results)
    known = {key(found): found for found in json.loads(file.read_text())} if file.exists() else {}
    results = []
    for row in rows():
        name = (row.runtime, row.weights, row.format)
        if row.runtime in args.runtimes and args.weights in row.weights:
            known[name] = measure(row, base, work, python)
            print(json.dumps(known[name]), flush=True)
        if name in known:
            results.append(known[name])
    file.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(table_lines(results)))


if __name__ == "__main__":
    main()
