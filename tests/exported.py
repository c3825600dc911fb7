"""A trained-looking LR-QAT model on the demo's base, small enough to export many times."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat import LRQATConfig
from peft_lrqat.demo import model_path


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="session")
def make_model():
    """``make_model(dtype, **fields)``, in eval mode.

    Its integers differ from round-to-nearest, and its scales have moved.
    """

    def make(dtype=torch.bfloat16, trained=True, **fields):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
        defaults = {
            "target_modules": "all-linear",
            "range_estimator": "minmax",
            "r": 4,
            "init_weights": not trained,
        }
        model = get_peft_model(
            base, LRQATConfig(task_type="CAUSAL_LM", **{**defaults, **fields})
        ).eval()
        if trained:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lrqat_scale" in name:
                        parameter *= 1 + 0.2 * torch.rand_like(parameter)
        return model

    return make


# In a process of its own: an assertion in C++ ends the interpreter.
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, task, what = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
if len(sys.argv) > 4:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[4], 1.0)]
server = xllamacpp.Server(params)
def tokenize(text):
    data = json.dumps({"content": text, "add_special": True}).encode()
    address, headers = server.listening_address + "/tokenize", {"Content-Type": "application/json"}
    request = urllib.request.Request(address, data, headers)
    return json.load(urllib.request.urlopen(request))["tokens"]
options = {"n_predict": 4, "temperature": 0.0, "n_probs": 5, "cache_prompt": False}
if task == "complete":
    print("RESULT", json.dumps(server.handle_completions({"prompt": what, **options})))
else:
    print("RESULT", json.dumps([tokenize(text) for text in what]))
"""


def llama_cpp(path, task, what, *adapters):
    command = [sys.executable, "-c", LLAMA_CPP, str(path), task, json.dumps(what)]
    command += map(str, adapters)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.fixture(scope="session")
def run_llama_cpp():
    """``run_llama_cpp(path, ids)``: what it writes after them.

    For each token, its id and the log-probabilities of the likeliest.
    """

    def run(path, prompt):
        content = llama_cpp(path, "complete", prompt)["choices"][0]["logprobs"]["content"]
        return [
            (step["id"], {top["id"]: top["logprob"] for top in step["top_logprobs"]})
            for step in content
        ]

    return run


@pytest.fixture(scope="session")
def llama_cpp_tokens():
    """``llama_cpp_tokens(path, texts)``: the ids of each text."""
    return lambda path, texts: llama_cpp(path, "tokenize", texts)
