"""Perplexity of a GGUF file in llama.cpp itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from .metrics import check_spans, spans_of, summary


SCRIPT = Path(__file__).with_name("llama_cpp_process.py")


def require_llama_cpp() -> None:
    """ImportError, with the way out, where llama.cpp cannot be run."""
    if find_spec("xllamacpp") is None:
        raise ImportError("--llama_cpp needs the package xllamacpp; run `pip install xllamacpp`")


def evaluate_in_llama_cpp(
    file: Path,
    input_ids: Tensor,
    *,
    window: int,
    stride: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The same as `evaluate_perplexity`, of a GGUF file that llama.cpp runs (package `xllamacpp`).

    llama.cpp works one token after another here, as in generation, and rounds the inputs of its
    layers to 8 bits, so that the figures differ a little from those of the same weights in
    transformers.

    Raises:
        ImportError: xllamacpp is not installed.
        ValueError: llama.cpp cannot run the file; the message ends with what it wrote.
    """
    require_llama_cpp()
    check_spans(input_ids, window=window, stride=stride)
    spans = list(spans_of(len(input_ids), window, stride))
    tokens = input_ids.tolist()
    sums, counts = [], []
    bar = tqdm(total=len(spans), desc="llama.cpp", unit="window", leave=False, disable=not progress)
    with bar, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, str(SCRIPT), str(file), str(window)]
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": said,
        }
        with subprocess.Popen(command, text=True, **pipes) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                for start, end, first in spans:
                    row = {"ids": tokens[start:end], "first": first - start}
                    answer = _ask(process, json.dumps(row))
                    if not answer:
                        process.wait()
                        said.seek(0)
                        raise ValueError(f"llama.cpp cannot run {file}: {said.read()[-500:]}")
                    nats = np.array(json.loads(answer))
                    sums.append(nats.sum())
                    counts.append(len(nats))
                    bar.update()
            finally:
                process.kill()
    return summary(np.array(sums), np.array(counts))


def _ask(process: Any, line: str) -> str:
    """The answer to a line; empty if the process has ended."""
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()
