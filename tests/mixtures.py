"""Tiny mixtures of experts, as transformers builds the architectures that people use."""

import torch
import transformers


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 1,
}
CHOSEN = {"num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 4}),
    # Transposed, interleaved, with biases and clipping.
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 8, "max_position_embeddings": 4096}),
    # With a shared expert beside the others, and attention of its own kind.
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "num_key_value_heads": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def make_mixture(name, dtype=torch.float32, **fields):
    """A random model of an architecture, the same every time."""
    family, own = MIXTURES[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **CHOSEN, **own, **fields})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], shape or (2, 12), generator=generator)


def experts_of(model):
    """The modules of experts."""
    return [m for n, m in model.named_modules() if n.endswith(".experts")]


@torch.no_grad()
def logits_of(model, ids=None):
    return model(tokens() if ids is None else ids).logits
