"""The small random models that stand in for those PEFT's tests would fetch from the hub; one folder
each.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers


SIZE = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **SIZE,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ENCODER = {**SIZE, "intermediate_size": 64, "max_position_embeddings": 128}
T5 = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {"vocab_size": 100, "d_model": 32, "max_position_embeddings": 128} | {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))
}

# Folder: (class, config, its settings). PEFT's tests skip a "gpt2" for types without Conv1D, hence
# the name of that folder.
MODELS: dict[str, tuple[str, str, dict[str, int | str]]] = {
    "tiny-opt": ("OPTForCausalLM", "OPTConfig", {**SIZE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "tiny-conv1d": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "tiny-llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "tiny-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "tiny-mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 4}),
    "tiny-gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**DECODER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "tiny-t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "tiny-bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "tiny-bert": ("BertModel", "BertConfig", ENCODER),
    "tiny-deberta-v2": ("DebertaV2Model", "DebertaV2Config", ENCODER),
    "tiny-bert-classifier": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "tiny-llama-classifier": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**DECODER, "pad_token_id": 0},
    ),
}


def make_models(folder: Path) -> None:
    """Writes every model into ``folder``, with the same weights every time."""
    for name, (model_class, config_class, settings) in MODELS.items():
        config = getattr(transformers, config_class)(**settings)
        # With the usual 0.02 the outputs of so small a model hardly depend on its linear layers.
        config.initializer_range = 0.2
        torch.manual_seed(0)
        getattr(transformers, model_class)(config).save_pretrained(folder / name)
