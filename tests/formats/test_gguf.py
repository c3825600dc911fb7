"""GGUF files in their runtimes: transformers to the last bit, llama.cpp to its own arithmetic."""

from importlib.util import find_spec

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import LRQATConfig
from peft_lrqat.export import export_model, verify_export
from peft_lrqat.formats.gguf import paired_rows


pytest.importorskip("gguf")

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="needs the xllamacpp wheel"
)


@needs_llama_cpp
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
def test_llama_cpp_says_what_the_model_says(
    fields, blocks, make_model, tokenizer, run_llama_cpp, tmp_path
):
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


# Different numbers of query and key heads, biases, norms of heads, fused projections, stretched
# rotary embeddings.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES = {
    "Llama": {},
    "Llama-biases": {"attention_bias": True, "mlp_bias": True},
    "Llama-3": {"rope_parameters": LLAMA3},
    "Mistral": {},
    "Phi3": {"pad_token_id": 0},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


@pytest.fixture(scope="module")
def make_small():
    """``make_small(name, **fields)``: a random model of two layers in float32.

    Its biases and norms differ from 0 and 1.
    """

    def make(name, grid=(("bits", 4), ("group_size", 32)), **fields):
        torch.manual_seed(0)
        defaults = {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": None,
            "max_position_embeddings": 128,
        }
        kind = getattr(transformers, f"{name.partition('-')[0]}Config")
        base = AutoModelForCausalLM.from_config(
            kind(**{**defaults, **ARCHITECTURES[name], **fields}), dtype=torch.float32
        )
        for parameter in base.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.3)
        fields = {"target_modules": "all-linear", "init_weights": False, **dict(grid)}
        return get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", **fields)).eval()

    return make


def assert_llama_cpp_agrees(run_llama_cpp, model, path, within):
    prompt = list(range(5, 400, 5))
    _, top = run_llama_cpp(path, prompt)[0]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert max(abs(float(logprobs[index]) - value) for index, value in top.items()) < within


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_architectures(name, tied, make_small, tokenizer, run_llama_cpp, tmp_path):
    model = make_small(name, tie_word_embeddings=tied)
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    found = verify_export(model, tmp_path / "out", format="gguf")
    assert found.exact
    assert found.logits_difference == 0
    if find_spec("xllamacpp") is not None:
        # Rounded activations move these logits by less than a thousandth; the wrong rows, rotation
        # or bias by much more.
        assert_llama_cpp_agrees(run_llama_cpp, model, tmp_path / "out" / "model.gguf", within=0.005)


@pytest.mark.parametrize(
    ("names", "grid", "blocks"),
    [
        ("all-experts", {"bits": 4, "group_size": 32}, {"Q4_0"}),
        ("all-experts", {"bits": 2, "symmetric": False}, {"Q2_K"}),
        (["experts.down_proj"], {"bits": 8, "group_size": 64}, {"Q8_0"}),
    ],
)
def test_experts(names, grid, blocks, make_small, tokenizer, run_llama_cpp, tmp_path):
    wide = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 256}
    model = make_small("Qwen3Moe", {**grid, "target_parameters": names}, **wide)
    file = tmp_path / "out" / "model.gguf"
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    assert blocks_of(file) == blocks
    found = verify_export(model, tmp_path / "out", format="gguf")
    assert found.exact
    assert found.logits_difference < 1e-4
    if find_spec("xllamacpp") is not None:
        assert_llama_cpp_agrees(run_llama_cpp, model, file, within=0.03)


@pytest.mark.parametrize(
    "fields", [{"norm_topk_prob": False}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}]
)
def test_mixtures_that_llama_cpp_computes_differently(fields, make_small, tokenizer, tmp_path):
    model = make_small("Qwen3Moe", **{"norm_topk_prob": True, **fields})
    with pytest.raises(ValueError, match=f"qwen3_moe with {next(iter(fields))}="):
        export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_transformers_loads_the_file_alone(name, make_small, tokenizer, tmp_path):
    model = make_small(name)
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("grid", "blocks"),
    [
        ({"bits": 2}, "TQ2_0"),
        ({"bits": 2, "symmetric": False}, "Q2_K"),
        ({"bits": 2, "balanced": True, "group_size": 256}, "Q2_K"),
        ({"bits": 3}, "Q3_K"),
        ({"bits": 4, "symmetric": False, "group_size": 256}, "Q4_K"),
        ({"bits": 4, "balanced": True}, "Q4_K"),
        ({"bits": 5, "symmetric": False}, "Q5_K"),
        ({"bits": 6}, "Q6_K"),
        ({"bits": 2, "symmetric": False, "k_quant": True}, "Q2_K"),
        ({"bits": 3, "k_quant": True}, "Q3_K"),
        ({"bits": 4, "symmetric": False, "k_quant": True}, "Q4_K"),
        ({"bits": 5, "symmetric": False, "k_quant": True}, "Q5_K"),
        ({"bits": 6, "k_quant": True}, "Q6_K"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_blocks_of_256_weights(grid, blocks, make_small, tokenizer, run_llama_cpp, tmp_path):
    model = make_small("Llama", grid, hidden_size=256, intermediate_size=512, head_dim=64)
    file = tmp_path / "out" / "model.gguf"
    export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    assert blocks_of(file) == {blocks}
    found = verify_export(model, tmp_path / "out", format="gguf")
    assert found.exact
    assert found.logits_difference == 0
    if find_spec("xllamacpp") is not None:
        assert_llama_cpp_agrees(run_llama_cpp, model, file, within=0.03)


def test_a_model_that_gguf_is_not_written_for(make_peft, make_model, tokenizer, tmp_path):
    model = make_peft("gemma", torch.bfloat16, bits=4, target_modules=["q_proj"])
    with pytest.raises(
        ValueError,
        match=r"GGUF is written for llama, mistral, .*, qwen3_moe, but this model is a gemma",
    ):
        export_model(model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False)
    with pytest.raises(ValueError, match="a GGUF file also holds the tokenizer; give `tokenizer`"):
        export_model(make_model(bits=4), tmp_path / "out", format="gguf", progress=False)
    for field, value, message in (
        (
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e4},
            "stretches its rotary embeddings",
        ),
        ("sliding_window", 8, "attends to windows of 8 tokens"),
    ):
        model = make_model(bits=4)
        setattr(model.get_base_model().config, field, value)
        with pytest.raises(ValueError, match=message):
            export_model(
                model, tmp_path / "out", format="gguf", tokenizer=tokenizer, progress=False
            )
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_head_are_paired():
    rows = torch.arange(16).view(16, 1)
    assert paired_rows(rows, 2).flatten().tolist() == [
        0,
        4,
        1,
        5,
        2,
        6,
        3,
        7,
        8,
        12,
        9,
        13,
        10,
        14,
        11,
        15,
    ]
