"""A whole model as one GGUF file for llama.cpp; written with the `gguf` package, the integers by ggml.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ..layer import LRQATLayer
from . import ggml
from .compressed_tensors import exact_scale
from .linears import model_tensors, quantized_linear


INSTALL = "writing GGUF needs the package `gguf`; run `pip install 'peft-lrqat[export]'`"
FILE = "model.gguf"
# model_type of transformers: the architecture's name in GGUF, and whether rotary embeddings pair neighbours there, so that rows of
# the query and key weights change places.
ARCHITECTURES = {
    "llama": ("llama", True),
    "qwen2": ("qwen2", False),
}
# How text is cut before the byte pairs are merged, by llama.cpp's names: the regular expression of the tokenizer's first step.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_SPLIT.replace("DIGITS", "{1,3}"): "llama-bpe", _SPLIT.replace("DIGITS", ""): "qwen2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens


def write(
    model: PeftModel,
    adapter_name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    done: Callable[[int], Any],
) -> dict[str, Any]:
    """Writes ``directory/model.gguf``; what the card says of it. ValueError for a model or tokenizer it has no place for."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(INSTALL) from error
    base = model.get_base_model()
    config = base.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, but this model is a {config.model_type}; export it as "
            "'compressed-tensors' or 'dequantized', from which llama.cpp's own converter starts (it rounds the weights again)"
        )
    if tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer, too; give `tokenizer`")
    name, paired = ARCHITECTURES[config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(directory / FILE, name)
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer, config)
    plan, weights = [], 0
    for key, value in model_tensors(model, adapter_name):
        module = key if isinstance(value, LRQATLayer) else key.rpartition(".")[0]
        kind = "weight" if isinstance(value, LRQATLayer) else key.rpartition(".")[2]
        mapped = names.get_name(module)
        if mapped is None:
            raise ValueError(f"GGUF has no place for `{key}` of a {config.model_type}; export another format")
        heads = _heads(module, config) if paired else None
        if isinstance(value, LRQATLayer):
            grid = value.base_layer.format.grid
            block = ggml.block_type(grid, value.in_features)
            width = value.in_features // ggml.BLOCK_SIZES[block] * ggml.BLOCK_BYTES[block]
            shape, dtype = (value.out_features, width), np.dtype(np.uint8)
            weights += value.out_features * width
            raw = gguf.GGMLQuantizationType[block]
        else:
            block, shape = None, tuple(value.shape)
            raw = gguf.GGMLQuantizationType[_plain_type(value)]
            dtype = np.dtype(np.float32)
        item = 1 if block else 4 if raw.name == "F32" else 2
        writer.add_tensor_info(f"{mapped}.{kind}", shape, dtype, int(np.prod(shape)) * item, raw)
        plan.append((key, value, block, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for data in _data(plan, adapter_name, done):
            writer.write_tensor_data(data)
    finally:
        writer.close()
    return {"bytes of the quantised weights": weights, "bytes of the file": (directory / FILE).stat().st_size}


def _data(plan: list[tuple], adapter_name: str, done: Callable[[int], Any]) -> Iterator[np.ndarray]:
    """The tensors' bytes in the order of the plan, one at a time."""
    for name, value, block, heads in plan:
        if block is None:
            yield _plain(value if heads is None else _paired(value, heads))
            continue
        linear = quantized_linear(name, value, adapter_name)
        centered, scale = linear.centered, exact_scale(linear, torch.float16)
        if heads is not None:
            centered, scale = _paired(centered, heads), _paired(scale, heads)
        yield ggml.encode(block, centered, scale)
        done(1)


def _plain_type(tensor: Tensor) -> str:
    # llama.cpp adds and multiplies with vectors in float32 alone.
    return "F32" if tensor.ndim == 1 else {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")


def _plain(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    kind = _plain_type(tensor)
    if kind == "BF16":
        return tensor.view(torch.int16).numpy()
    return (tensor if kind == "F16" else tensor.float()).numpy()


def _heads(module: str, config: PretrainedConfig) -> int | None:
    """Heads of a query or key projection; None for any other module."""
    kind = module.rpartition(".")[2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(kind)


def _paired(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head, first half and second half in turn: (out, ...) -> (out, ...)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _add_config(writer: Any, config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"the model stretches its rotary embeddings (rope_type={rope['rope_type']!r}), which is not written to GGUF here; "
            "export another format"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"the model attends to windows of {config.sliding_window} tokens, which is not written to GGUF here; export another "
            "format, or set `config.sliding_window = None` where texts stay shorter"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(config.name_or_path or config.model_type).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {}
    if parts.get("model", {}).get("type") != "BPE" or parts["model"].get("byte_fallback"):
        raise ValueError(
            f"GGUF is written with byte-level BPE tokenizers, but this is a {type(tokenizer).__name__} of another kind; export "
            "another format"
        )
    added = {token["id"]: token for token in parts["added_tokens"]}
    by_id = {index: token for token, index in {**parts["model"]["vocab"]}.items()}
    tokens, kinds = [], []
    for index in range(config.vocab_size):
        if index in added:
            tokens.append(added[index]["content"])
            kinds.append(CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            tokens.append(by_id.get(index, f"[PAD{index}]"))
            kinds.append(NORMAL if index in by_id else UNUSED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(parts["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name for the way a tokenizer cuts text into words; ValueError for one it is not known for here."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (pattern := steps[0]["pattern"].get("Regex")) in SPLITS:
        return SPLITS[pattern]
    raise ValueError(
        f"this tokenizer cuts text in a way ({kinds}) that has no known name in llama.cpp; export another format"
    )
