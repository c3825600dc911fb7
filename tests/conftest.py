"""Tiny random models of the architectures that the plug-in is tried on, and what every test of it
starts from.
"""

import os


# Read when transformers and OpenMP are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_lrqat import LRQATConfig, LRQATLinear
from peft_lrqat.quant.factors.groups import quantize_midrise, quantize_rtn


torch.set_num_threads(1)

# Slow files of few tests come first, so that no process ends with one of them alone.
SLOW = (
    "test_triton_kernels",
    "test_notebooks",
    "test_accelerate",
    "test_push",
    "test_owners",
    "test_deepspeed",
    "test_smollm2",
    "test_distributed",
)


def pytest_collection_modifyitems(items):
    def place(item):
        return SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW)

    items.sort(key=place)


SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
NO_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GATED, **NO_SPECIAL),
    "mistral": lambda: transformers.MistralConfig(**GATED, **NO_SPECIAL),
    "qwen2": lambda: transformers.Qwen2Config(**GATED, **NO_SPECIAL, tie_word_embeddings=True),
    "gemma": lambda: transformers.GemmaConfig(**GATED, **NO_SPECIAL, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_SPECIAL
    ),
    "opt": lambda: transformers.OPTConfig(
        **SIZES, ffn_dim=48, word_embed_proj_dim=32, **NO_SPECIAL
    ),
    "t5": lambda: transformers.T5Config(  # type: ignore[call-arg]  # a setting of all configs
        vocab_size=96,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    ),
    "classifier": lambda: transformers.LlamaConfig(  # type: ignore[call-arg]  # a setting of all configs
        **GATED, **NO_SPECIAL, num_labels=3
    ),
}
# Bits of the components of a packed pair of factors, a digit each.
FACTOR_BITS = ["", "1", "2", "4321", "3311"]
TASKS = {"t5": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
AUTO_MODELS = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}


def _task(architecture):
    return TASKS.get(architecture, "CAUSAL_LM")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """transformers may want a newer PEFT than there is; its own way to load adapters then fails."""
    try:
        return (yield)
    except (ValueError, AssertionError) as error:  # the latter where a test waits for the former
        if "The version of PEFT you are using is not compatible" in str(error):
            pytest.skip(f"transformers {transformers.__version__} wants a newer PEFT")
        raise


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=list(CONFIGS))
def architecture(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="session")
def make_base():
    """``make_base(architecture, dtype, seed)``: the same random weights at every call, biases
    included; in eval mode.
    """
    made = {}

    def make(architecture="llama", dtype=torch.float32, seed=0):
        if (architecture, dtype, seed) not in made:
            torch.manual_seed(seed)
            config = CONFIGS[architecture]()
            model = AUTO_MODELS[_task(architecture)].from_config(config, dtype=dtype)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
            made[architecture, dtype, seed] = model.eval()
        return copy.deepcopy(made[architecture, dtype, seed])

    return make


@pytest.fixture(scope="session")
def make_config():
    """``make_config(architecture, **fields)``: rank 4 on every linear layer but the output layer;
    the quick range.
    """

    def make(architecture="llama", **fields):
        defaults = {"target_modules": "all-linear", "r": 4, "range_estimator": "minmax"}
        return LRQATConfig(**{"task_type": _task(architecture), **defaults, **fields})

    return make


@pytest.fixture(scope="session")
def make_peft(make_base, make_config):
    """``make_peft(architecture, dtype, seed, **fields)``: a tiny model with a fresh adapter, in
    eval mode.
    """

    def make(architecture="llama", dtype=torch.float32, seed=0, **fields):
        return get_peft_model(
            make_base(architecture, dtype, seed), make_config(architecture, **fields)
        ).eval()

    return make


@pytest.fixture(scope="session")
def batch_for():
    """``batch_for(architecture)``: inputs with labels, two rows of twelve tokens."""

    def make(architecture="llama"):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 96, (2, 12), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if _task(architecture) == "SEQ_CLS":
            return {**batch, "labels": torch.tensor([0, 2])}
        return {
            **batch,
            "labels": ids.flip(1) if _task(architecture) == "SEQ_2_SEQ_LM" else ids.clone(),
        }

    return make


@pytest.fixture(scope="session")
def lrqat_layers():
    """``lrqat_layers(model)``: its LR-QAT layers by name."""

    def find(model):
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LRQATLinear)
        }

    return find


@pytest.fixture(scope="session")
def logits_of(batch_for):
    """``logits_of(model, architecture)``: its logits for ``batch_for(architecture)``, without
    gradients.
    """

    def run(model, architecture="llama"):
        with torch.no_grad():
            return model(**batch_for(architecture)).logits

    return run


@pytest.fixture(scope="session")
def disturb():
    """``disturb(model, adapter)``: moves factors and scales as training would, far enough to change
    integers.
    """

    def move(model, adapter="default", seed=3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f".lrqat_B.{adapter}" in name:
                    parameter += (
                        torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 2
                    )
                elif f".lrqat_scale.{adapter}" in name:
                    factor = 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
                    parameter *= factor.to(parameter.dtype)
        return model

    return move


@pytest.fixture(params=FACTOR_BITS, ids=lambda bits: bits or "none")
def bits(request):
    return request.param


@pytest.fixture(scope="session")
def make_components():
    """``make_components(bits, rows, columns, ...)``: pairs of codes of random vectors, one pair per
    digit.
    """

    def quantize(length, digit, group_size, scale_dtype, zero_points):
        function = quantize_rtn if zero_points and digit > 1 else quantize_midrise
        x = torch.randn(1, length) * 0.3
        return function(x, torch.tensor([digit]), group_size=group_size, scale_dtype=scale_dtype)

    def make(bits, rows, columns, group_size=7, scale_dtype=torch.bfloat16, zero_points=False):
        return [
            tuple(
                quantize(n, int(digit), group_size, scale_dtype, zero_points)
                for n in (rows, columns)
            )
            for digit in bits
        ]

    return make
