"""A whole model as one GGUF file for llama.cpp, written with the `gguf` package.

ggml.py makes the blocks of integers, vocabulary.py the tokenizer's words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..quant.grid import Grid
from . import chats, ggml, vocabulary
from .base import DeployedModel, Format, Loaded, Outline, from_pretrained, write_config
from .linear import QuantizedLinear, Target


INSTALL = "writing GGUF needs the package `gguf`; run `pip install 'peft-lrqat[export]'`"
FILE = "model.gguf"
# model_type of transformers: the architecture's name in GGUF, and whether rotary embeddings pair
# neighbours there, so that rows of the query and key weights change places.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "qwen3_moe": ("qwen3moe", False),
}
MODEL_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


class Gguf(Format):
    """One file for llama.cpp, with config and tokenizer beside it for transformers."""

    name = "gguf"
    asymmetric_bits = (2, 3, 4, 5, 6, 7)
    group_multiple = 32
    scale_dtypes = ("bfloat16", "float16")
    takes_container_bits = False
    holds_embeddings = True
    experts = "whole"
    balanced_bits = (2, 3, 4, 5, 6, 7)
    library_name = "gguf"
    tags = ("gguf",)
    snippet = f"""# llama.cpp: llama-cli -m {FILE}; or, with plain weights in memory:
from transformers import AutoConfig, {{auto_class}}

path = "this repository or folder"
config = AutoConfig.from_pretrained(path)
model = {{auto_class}}.from_pretrained(path, gguf_file="{FILE}", config=config)"""

    def multiple_for(self, grid: Grid) -> int:
        return 16 if grid.k_quant else self.group_multiple

    def why_not_inputs(self, grid: Grid, activations: Grid, name: str) -> str | None:
        return (
            f"{name} cannot carry `activation_bits`={activations.bits}: llama.cpp rounds"
            " activations its own way, to 8 bits in blocks of 32"
        )

    def check(self, model: Outline) -> None:
        config = model.config
        if config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"GGUF is written for {', '.join(ARCHITECTURES)}, but this model is a"
                f" {config.model_type}; export it as 'compressed-tensors' or 'dequantized', from"
                " which llama.cpp's own converter starts (it rounds the weights again)"
            )
        _check_config(config)

    def config_for(self, config: PretrainedConfig) -> PretrainedConfig:
        """transformers reads Mistral from GGUF as a Llama, which it is without windows."""
        if config.model_type != "mistral":
            return config
        fields = config.to_dict()
        known = LlamaConfig().to_dict().keys() - {"model_type"}
        return LlamaConfig(**{name: value for name, value in fields.items() if name in known})

    def write(
        self,
        model: DeployedModel,
        directory: Path,
        *,
        max_shard_size: int,
        done: Callable[[int], object],
    ) -> dict[str, int]:
        """One file, whatever ``max_shard_size`` is."""
        try:
            import gguf
        except ImportError as error:
            raise ImportError(INSTALL) from error
        config, tokenizer = model.config, model.tokenizer
        if tokenizer is None:
            raise ValueError("a GGUF file also holds the tokenizer; give `tokenizer`")
        name, paired = ARCHITECTURES[config.model_type]
        names = tensor_names(config)
        writer = gguf.GGUFWriter(directory / FILE, name)
        _add_config(writer, config)
        vocabulary.add(writer, tokenizer, config.vocab_size)
        plan: list[_Entry] = []
        weights = 0
        tensors = model.tensors()
        if _stretches(config):
            tensors = chain([("rope_freqs.weight", _stretch(config))], tensors)
        for key, value in tensors:
            for part in _parts(key, value):
                mapped = names.get_name(part.module)
                if mapped is None:
                    raise ValueError(
                        f"GGUF has no place for `{key}` of a {config.model_type}; export another"
                        " format"
                    )
                entry = _Entry(part, heads_of(part.module, config) if paired else None)
                raw = gguf.GGMLQuantizationType[entry.type]
                writer.add_tensor_info(
                    f"{mapped}.{part.kind}", entry.shape, entry.numpy_dtype, entry.num_bytes, raw
                )
                weights += entry.num_bytes if entry.is_target else 0
                plan.append(entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for entry in plan:
                writer.write_tensor_data(entry.data(model.quantize))
                done(int(entry.is_target))
        finally:
            writer.close()
        # For transformers: the file lacks the generation config and parts of the config.
        write_config(directory, self.config_for(config), None)
        size = (directory / FILE).stat().st_size
        return {"bytes of the quantised weights": weights, "bytes of the file": size}

    def stored_bytes(self, target: Target, activations: Grid | None = None) -> int:
        block = ggml.block_type(target.grid, target.in_features)
        return target.out_features * ggml.row_bytes(block, target.in_features)

    def load(self, path: Path, model_class: type[PreTrainedModel], dtype: torch.dtype) -> Loaded:
        return from_pretrained(
            path,
            AutoModelForCausalLM,
            dtype,
            "transformers (gguf)",
            gguf_file=FILE,
            config=AutoConfig.from_pretrained(path),
            # Plain weights, whether kernels for the blocks are installed or not.
            quantization_config=GgufConfig(dequantize=True),
        )

    def problems(self, path: Path) -> list[str]:
        """Chats and texts that the file's tokenizer would cut differently from the tokenizer's."""
        if not chats.is_saved_in(path):
            return []
        return chats.differences(path, FILE)


def tensor_names(config: PretrainedConfig) -> Any:
    """The map of the `gguf` package from the names of modules to those in a file."""
    import gguf

    name, _ = ARCHITECTURES[config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What becomes one tensor of the file: a whole tensor or target, or some rows of experts."""

    module: str
    kind: str
    value: Tensor | Target
    experts: int = 0  # whose rows follow one another; 0: it is no weight of experts
    half: int | None = None  # of the rows of each expert, the first or the second

    @property
    def rows(self) -> Tensor | None:
        """The rows of a target, (rows,); None: all of them."""
        if not isinstance(self.value, Target) or self.half is None:
            return None
        numbers = torch.arange(self.value.out_features).unflatten(0, (self.experts, 2, -1))
        return numbers[:, self.half].flatten()


def _parts(key: str, value: Tensor | Target) -> list[_Part]:
    """llama.cpp has the two halves of `gate_up_proj` of experts as two tensors."""
    owner, _, kind = key.rpartition(".")
    experts = value.experts if isinstance(value, Target) else 0
    if isinstance(value, Tensor) and value.dim() == 3 and owner.endswith(".experts"):
        experts = len(value)
    if not experts:
        is_target = isinstance(value, Target)
        module, kind = (key, "weight") if is_target else (owner, kind)
        return [_Part(module=module, kind=kind, value=value)]
    shared: dict[str, Any] = {"kind": "weight", "value": value, "experts": experts}
    if kind != "gate_up_proj":
        return [_Part(module=key, **shared)]
    names = ("gate_proj", "up_proj")
    return [_Part(module=f"{owner}.{n}", half=half, **shared) for half, n in enumerate(names)]


class _Entry:
    """One tensor of the file: what its header says, and its bytes when their turn comes.

    ``heads``: of a query or key weight whose rows change places; None for all others.
    """

    def __init__(self, part: _Part, heads: int | None) -> None:
        self.part, self.heads = part, heads
        value = part.value
        self.is_target = isinstance(value, Target)
        if isinstance(value, Target):
            self.type = ggml.block_type(value.grid, value.in_features)
            rows = value.out_features if part.half is None else value.out_features // 2
            experts = (part.experts, rows // part.experts) if part.experts else (rows,)
            self.shape: tuple[int, ...] = (*experts, ggml.row_bytes(self.type, value.in_features))
            self.numpy_dtype: np.dtype[Any] = np.dtype(np.uint8)
            item = 1
        else:
            self.type = _plain_type(value)
            self.shape = tuple(self._half_of(value).shape)
            self.numpy_dtype = np.dtype(np.float32)
            item = 4 if self.type == "F32" else 2
        self.num_bytes = int(np.prod(self.shape)) * item

    def _half_of(self, fused: Tensor) -> Tensor:
        return fused if self.part.half is None else fused.chunk(2, dim=1)[self.part.half]

    def data(self, quantize: Callable[[Target], QuantizedLinear]) -> np.ndarray:
        value, rows = self.part.value, self.part.rows
        if not isinstance(value, Target):
            return _plain(self._rows(self._half_of(value)))
        linear = quantize(value)
        linear = linear if rows is None else linear.rows(self.part.module, rows)
        return ggml.encode(self.type, linear, self._rows).reshape(self.shape)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.heads is None else paired_rows(tensor, self.heads)


def _plain_type(tensor: Tensor) -> str:
    # llama.cpp adds and multiplies vectors in float32 only.
    if tensor.ndim == 1:
        return "F32"
    return {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")


def _plain(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    kind = _plain_type(tensor)
    if kind == "BF16":
        return tensor.view(torch.int16).numpy()
    return (tensor if kind == "F16" else tensor.float()).numpy()


def heads_of(module: str, config: PretrainedConfig) -> int | None:
    """Heads of a query or key projection; None for any other module."""
    kind = module.rpartition(".")[2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(kind)


def paired_rows(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head, first half and second half in turn: (out, ...) -> (out, ...)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _stretches(config: PretrainedConfig) -> bool:
    """Whether rotary embeddings are stretched as Llama 3.1's, which llama.cpp does for Llamas."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") == "llama3" and ARCHITECTURES[config.model_type][0] == "llama"


def _stretch(config: PretrainedConfig) -> Tensor:
    """What llama.cpp divides each rotary frequency by, (head_dim / 2,)."""
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(stretched), 2).float() / (2 * len(stretched))
    return config.rope_parameters["rope_theta"] ** -exponents / stretched


def _check_config(config: PretrainedConfig) -> None:
    """ValueError for a model that llama.cpp would compute differently."""
    name = next(iter(config.architectures or ()), None)
    wanted = MODEL_CLASSES[config.model_type]
    if name != wanted:
        raise ValueError(
            f"GGUF holds a {wanted} with its token head, but this model is a {name}; export"
            " another format"
        )
    if config.model_type == "qwen3_moe":
        _check_experts(config)
    if config.hidden_act != "silu":
        raise ValueError(
            f"llama.cpp computes a {config.model_type} with SiLU, which GGUF cannot change, but"
            f" `hidden_act` is {config.hidden_act!r}; export another format"
        )
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "default" and not _stretches(config):
        raise ValueError(
            f"the model stretches its rotary embeddings (rope_type={kind!r}), which is not written"
            f" to GGUF here for a {config.model_type}; export another format"
        )
    # A window as long as the longest text changes nothing.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    if window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"the model attends to windows of {config.sliding_window} tokens, which is not written"
            " to GGUF here; export another format, or set `config.sliding_window = None` where"
            " texts stay shorter"
        )


def _check_experts(config: PretrainedConfig) -> None:
    """ValueError for a mixture that llama.cpp would compute differently."""
    needed = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    for name, wanted in needed.items():
        if (found := getattr(config, name, wanted)) != wanted:
            raise ValueError(
                f"llama.cpp computes a {config.model_type} with {name}={wanted!r}, which GGUF"
                f" cannot change, but it is {found!r}; export another format"
            )


def _add_config(writer: Any, config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
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
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
