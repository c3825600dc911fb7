"""A whole model as one GGUF file for llama.cpp: written with the `gguf` package, integers by ggml.py, words by vocabulary.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..lrqat.layer import LRQATLayer
from . import ggml, vocabulary
from .compressed_tensors import exact_scale
from .linears import model_tensors, quantized_linear


INSTALL = "writing GGUF needs the package `gguf`; run `pip install 'peft-lrqat[export]'`"
FILE = "model.gguf"
# model_type of transformers: the architecture's name in GGUF, and whether rotary embeddings pair neighbours there, so that rows of
# the query and key weights change places.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}


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
    vocabulary.add(writer, tokenizer, config.vocab_size)
    plan, weights = [], 0
    tensors = model_tensors(model, adapter_name)
    if _stretches(config):
        tensors = chain([("rope_freqs.weight", _stretch(config))], tensors)
    for key, value in tensors:
        module = key if isinstance(value, LRQATLayer) else key.rpartition(".")[0]
        kind = "weight" if isinstance(value, LRQATLayer) else key.rpartition(".")[2]
        mapped = names.get_name(module)
        if mapped is None:
            raise ValueError(
                f"GGUF has no place for `{key}` of a {config.model_type}; export another format"
            )
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
    return {
        "bytes of the quantised weights": weights,
        "bytes of the file": (directory / FILE).stat().st_size,
    }


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
    return (
        "F32"
        if tensor.ndim == 1
        else {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")
    )


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


def config_for_transformers(config: PretrainedConfig) -> PretrainedConfig:
    """What transformers is to build for the file: it reads Mistral, which without windows is a Llama, as that alone."""
    if config.model_type != "mistral":
        return config
    fields = config.to_dict()
    known = LlamaConfig().to_dict().keys() - {"model_type"}
    return LlamaConfig(**{name: value for name, value in fields.items() if name in known})


def _stretches(config: PretrainedConfig) -> bool:
    """Whether rotary embeddings are stretched as Llama 3.1's, frequency by frequency, which llama.cpp does for Llamas."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") == "llama3" and ARCHITECTURES[config.model_type][0] == "llama"


def _stretch(config: PretrainedConfig) -> Tensor:
    """What llama.cpp divides each rotary frequency by, (head_dim / 2,)."""
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(stretched), 2).float() / (2 * len(stretched))
    return config.rope_parameters["rope_theta"] ** -exponents / stretched


def _add_config(writer: Any, config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" and not _stretches(config):
        raise ValueError(
            f"the model stretches its rotary embeddings (rope_type={kind!r}), which is not written to GGUF here for a "
            f"{config.model_type}; export another format"
        )
    # A window as long as the longest text is none.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"the model attends to windows of {config.sliding_window} tokens, which is not written to GGUF here; export another "
            "format, or set `config.sliding_window = None` where texts stay shorter"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # transformers takes a file whose whole name is "mistral" for another architecture.
    writer.add_name(f"{Path(config.name_or_path or 'model').name} LR-QAT")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)
