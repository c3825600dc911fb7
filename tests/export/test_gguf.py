"""GGUF files in the runtimes they are for: transformers' reader to the last bit, llama.cpp to its own arithmetic."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from peft_lrqat import LRQATConfig
from peft_lrqat.export import export_model, verify_export
from peft_lrqat.export.gguf import SPLITS, _paired, _split_name


pytest.importorskip("gguf")

# In a process of its own: an assertion in C++ ends the interpreter.
LLAMA_CPP = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, prompt = sys.argv[1], json.loads(sys.argv[2])
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
options = {"n_predict": 4, "temperature": 0.0, "n_probs": 5, "cache_prompt": False}
print("RESULT", json.dumps(server.handle_completions({"prompt": prompt, **options})))
"""


def run_llama_cpp(path, prompt):
    """What llama.cpp writes after the token ids ``prompt``: per token, its id and the log-probabilities of the likeliest."""
    command = [sys.executable, "-c", LLAMA_CPP, str(path), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    content = json.loads(line.removeprefix("RESULT"))["choices"][0]["logprobs"]["content"]
    return [(step["id"], {top["id"]: top["logprob"] for top in step["top_logprobs"]}) for step in content]


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the xllamacpp wheel")
@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({"bits": 4, "group_size": 32}, "Q4_0"),
        ({"bits": 3}, "Q4_0"),
        ({"bits": 4, "symmetric": False, "group_size": 32}, "Q5_0"),
        ({"bits": 8}, "Q8_0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_llama_cpp_says_what_the_model_says(fields, blocks, make_model, tokenizer, tmp_path):
    model = make_model(trained=False, **fields)  # whose likeliest token is clear
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    assert blocks_of(tmp_path / "out" / "model.gguf") == {blocks}
    prompt = tokenizer("The following operators are ")["input_ids"]
    for token, top in run_llama_cpp(tmp_path / "out" / "model.gguf", prompt):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
        # llama.cpp rounds activations to 8 bits, and keys and values to float16.
        assert max(abs(float(logprobs[index]) - value) for index, value in top.items()) < 0.35
        prompt.append(token)


def blocks_of(path):
    import gguf

    reader = gguf.GGUFReader(path)
    plain = {"F32", "F16", "BF16"}
    return {tensor.tensor_type.name for tensor in reader.tensors} - plain


def test_the_tokenizer_in_the_file_cuts_text_alike(make_model, tokenizer, tmp_path):
    export_model(make_model(bits=4), tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    back = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in ("The for statement is used", "x = {1: 'a'}\n    return x\n", "Ünïcode, 日本"):
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (back.bos_token_id, back.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures(name, tied, tokenizer, tmp_path):
    """Different numbers of query and key heads, biases, norms of heads, a head of its own."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=None,
        use_sliding_window=False,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in base.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    fields = {"target_modules": "all-linear", "bits": 4, "group_size": 32, "init_weights": False}
    model = get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", **fields)).eval()
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    found = verify_export(model, tmp_path / "out", format="gguf")
    assert found.exact
    assert found.logits_difference < 1e-5
    if find_spec("xllamacpp") is not None:
        prompt = [5, 9, 200, 77]
        _, top = run_llama_cpp(tmp_path / "out" / "model.gguf", prompt)[0]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert max(abs(float(logprobs[index]) - value) for index, value in top.items()) < 0.1


def test_a_model_that_gguf_is_not_written_for(make_peft, make_model, tokenizer, tmp_path):
    model = make_peft("gemma", torch.bfloat16, bits=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="GGUF is written for llama, qwen2, but this model is a gemma"):
        export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    with pytest.raises(ValueError, match="a GGUF file holds the tokenizer, too; give `tokenizer`"):
        export_model(make_model(bits=4), tmp_path / "out", format="gguf", progress=False)
    word_level = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    other = PreTrainedTokenizerFast(tokenizer_object=word_level)
    with pytest.raises(ValueError, match="GGUF is written with byte-level BPE tokenizers"):
        export_model(make_model(bits=4), tmp_path / "out", format="gguf", tokenizer=other, progress=False)
    for field, value, message in (
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "stretches its rotary embeddings"),
        ("sliding_window", 8, "attends to windows of 8 tokens"),
    ):
        model = make_model(bits=4)
        setattr(model.get_base_model().config, field, value)
        with pytest.raises(ValueError, match=message):
            export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_ways_to_cut_text_by_llama_cpps_names():
    byte_level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert _split_name(byte_level) == "gpt-2"
    assert _split_name({"type": "Sequence", "pretokenizers": [digits, byte_level]}) == "smollm"
    for pattern, name in SPLITS.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}}
        assert _split_name({"type": "Sequence", "pretokenizers": [split, byte_level]}) == name
    assert set(SPLITS.values()) == {"llama-bpe", "qwen2"}
    for other in (None, {"type": "Whitespace"}, {"type": "Split", "pattern": {"Regex": "x"}}):
        with pytest.raises(ValueError, match="has no known name in"):
            _split_name(other)
    assert pre_tokenizers.ByteLevel().use_regex


def test_rows_of_a_head_are_paired():
    rows = torch.arange(16).view(16, 1)
    assert _paired(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
