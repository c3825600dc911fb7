"""Packed adapters in vLLM for CPUs: disk, memory and the time to the first token.

    python benchmarks/vllm_adapters.py

An archive of --adapters packed adapters of SmolLM2-135M (copies of --distinct ones) is served by
vLLM's OpenAI server with the plug-in of this package. Requests name --requests of them, some of
them again when vLLM itself has let them go. What comes back for each distinct adapter is compared
with PEFT. The environment for vLLM is made in --environment, which takes some minutes and 3.4 GB;
the adapters have random factors, like trained ones in size.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_environment import vllm_python

from peft_lrqat import LoRAQuantConfig, quantize_adapter
from peft_lrqat.demo.smollm2 import load_smollm2
from peft_lrqat.shared.staging import directory_bytes


PROMPT = "The history of the village begins with"
RANK = 16


def save_base(folder: Path) -> None:
    if not (folder / "config.json").exists():
        for part in load_smollm2(torch.bfloat16):
            part.save_pretrained(folder)


def make_archive(base: Path, work: Path, args: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The archive, and its distinct adapters as LoRA."""
    shutil.rmtree(work / "archive", ignore_errors=True)
    plain, packed = [], []
    for number in range(args.distinct):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        torch.manual_seed(number)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear"
        )
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.004 * (number + 1))
        plain.append(work / "plain" / str(number))
        adapted.to(torch.float16).save_pretrained(plain[-1])
        packed.append(work / "packed" / str(number))
        shutil.rmtree(packed[-1], ignore_errors=True)
        recipe = LoRAQuantConfig(average_bits=args.bits)
        quantize_adapter(plain[-1], packed[-1], recipe, progress=False)
    for number in range(args.adapters):
        shutil.copytree(packed[number % args.distinct], work / "archive" / f"a{number}")
    shutil.copytree(packed[0], work / "archive" / "damaged")
    file = work / "archive" / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    for number in range(args.plain):
        shutil.copytree(plain[number % args.distinct], work / "archive" / f"p{number}")
    return work / "archive", packed


class Server:
    """vLLM's OpenAI server on loopback."""

    def __init__(self, base: Path, archive: Path, work: Path, args: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.unpacked = work / "unpacked"
        shutil.rmtree(self.unpacked, ignore_errors=True)
        given = {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PEFT_LRQAT_ADAPTERS": str(archive),
            "PEFT_LRQAT_UNPACKED": str(self.unpacked),
            "PEFT_LRQAT_UNPACKED_GB": str(args.unpacked_gb),
            "HF_HUB_OFFLINE": "1",
        }
        python = vllm_python(Path(args.environment)).absolute()
        options = [
            *("--model", base, "--host", "127.0.0.1", "--port", self.port, "--dtype", "bfloat16"),
            *("--enforce-eager", "--max-model-len", 512, "--enable-lora"),
            *("--max-lora-rank", RANK, "--max-loras", 2, "--max-cpu-loras", 4),
        ]
        self.log = open(work / "server.log", "w")  # noqa: SIM115 (as long as the server)
        self.process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", *map(str, options)],
            env=os.environ | given,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=work,
        )
        deadline = time.monotonic() + 600
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vLLM did not start; see {self.log.name}")
            time.sleep(1)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except OSError:
            return False

    def ask(self, model: str) -> tuple[float, Any]:
        """Seconds, and the log-probabilities of the likeliest first tokens, or the status."""
        question = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        data = json.dumps({**question, "logprobs": 5}).encode()
        address = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                found: Any = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
        except urllib.error.HTTPError as error:
            found = error.code
        return time.perf_counter() - begin, found

    def resident(self) -> int:
        """Bytes of the server's processes; memory that they share counts once (PSS)."""
        total = 0
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
        return total

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def peft_says(base: Path, packed: list[Path]) -> list[dict[str, float]]:
    """The log-probabilities of first tokens by PEFT: for each distinct adapter, and without."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = []
    for adapter in [*packed, None]:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
        found.append({tokenizer.decode(i): float(v) for i, v in enumerate(logprobs)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200, help="packed adapters asked for")
    parser.add_argument("--plain", type=int, default=50, help="LoRA in float16, for comparison")
    parser.add_argument("--bits", type=float, default=1.5)
    parser.add_argument("--unpacked_gb", type=float, default=0.5)
    parser.add_argument("--environment", default="vllm-environment")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "vllm-adapters"))
    parser.add_argument(
        "--results", default=str(Path(__file__).parent / "results" / "vllm_adapters.json")
    )
    args = parser.parse_args()
    work = Path(args.work).absolute()
    base = work / "base"
    save_base(base)
    archive, packed = make_archive(base, work, args)
    wanted = peft_says(base, packed)
    server = Server(base, archive, work, args)
    try:
        found = measure(server, archive, wanted, args)
    finally:
        server.stop()
    Path(args.results).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def distance(expected: dict[str, float], top: dict[str, float]) -> float:
    """Of the likeliest first tokens, the furthest."""
    return max(abs(expected[token] - value) for token, value in top.items())


def measure(
    server: Server, archive: Path, wanted: list[dict[str, float]], args: argparse.Namespace
) -> dict[str, Any]:
    _, plain = server.ask(str(archive.parent / "base"))
    largest = 0
    before = server.resident()
    times: dict[str, list[float]] = {"cold": [], "again": [], "warm": [], "LoRA, cold": []}
    furthest = 0.0
    *wanted, of_base = wanted
    for number in range(args.requests):
        seconds, top = server.ask(f"a{number}")
        times["cold"].append(seconds)
        expected = wanted[number % args.distinct]
        furthest = max(furthest, distance(expected, top))
        times["warm"].append(server.ask(f"a{number}")[0])
        largest = max(largest, directory_bytes(server.unpacked))
    for number in range(args.plain):
        times["LoRA, cold"].append(server.ask(f"p{number}")[0])
    # vLLM has let these go; most of them are still unpacked.
    for number in range(args.requests - args.plain, args.requests):
        times["again"].append(server.ask(f"a{number}")[0])
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(server.ask, [f"a{number}" for number in range(8)])
        together = [
            distance(wanted[number % args.distinct], top) for number, (_, top) in enumerate(answers)
        ]
    after = server.resident()
    refused = {name: server.ask(name)[1] for name in ("missing", "damaged", "../base")}
    files = [
        archive / f"a{number}" / "adapter_model.safetensors" for number in range(args.adapters)
    ]
    return {
        "adapters": args.adapters,
        "bits": args.bits,
        "bytes of an adapter": round(statistics.mean(f.stat().st_size for f in files)),
        "bytes as LoRA in float16": (archive / "p0" / files[0].name).stat().st_size,
        "bytes of the archive": sum(f.stat().st_size for f in files),
        "largest bytes unpacked": largest,
        "bound of bytes unpacked": round(args.unpacked_gb * 2**30),
        "resident before": before,
        "resident after": after,
        "seconds to the first token": {
            name: {
                "median": round(statistics.median(values), 3),
                "largest": round(max(values), 3),
            }
            for name, values in times.items()
        },
        "asked for": args.requests,
        "furthest log-probability from PEFT": round(furthest, 4),
        "the same of the base model alone": round(distance(of_base, plain), 4),
        "of eight adapters asked for at once": round(max(together), 4),
        "answers to wrong names": refused,
    }


if __name__ == "__main__":
    main()
