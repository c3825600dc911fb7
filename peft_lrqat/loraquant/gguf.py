"""LoRA adapters, packed or not, as GGUF files, which llama.cpp adds to a running model.

    blk.0.attn_q.weight.lora_a   (r, in)     A
    blk.0.attn_q.weight.lora_b   (out, r)    B, its rows in the order of the weight's

llama.cpp adds ``alpha / r * B A``, with the r of each pair and one ``adapter.lora.alpha``. Nothing
is rounded: factors are float16 where that is exact, else float32. The A of a packed adapter goes
into blocks of 32 integers, Q4_0 or Q8_0, where its groups are multiples of them.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.utils import PeftType
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..formats import ggml
from ..formats.gguf import ARCHITECTURES, INSTALL, heads_of, paired_rows, tensor_names
from ..quant.factors.groups import spread
from ..shared.names import PREFIX
from ..shared.staging import check_target, whole_directory
from ..shared.words import some
from .config import LoRAQuantConfig
from .convert import as_lora, check_lora, split_lora
from .files import from_files


FILE = "adapter.gguf"
FROZEN = ".base_layer.weight"


def adapter_to_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Writes a LoRA or LORAQUANT adapter to ``target/adapter.gguf``, for llama.cpp's ``--lora``.

    Args:
        source: a directory, or a repository of the Hub.
        target: a directory that does not exist, or is empty.
        base: the base model, whose config says how rows are ordered; by default the one that the
            adapter names.
        subfolder: the place of the adapter in the directory or repository.

    Returns:
        The path of the file.

    Raises:
        ValueError: llama.cpp cannot add this adapter; the message says what is in the way.
    """
    check_target(target)
    config, state = from_files(
        str(source),
        partial(_check_written, place=str(source)),
        revision=revision,
        subfolder=subfolder,
        token=token,
    )
    steps: dict[str, Tensor] = {}
    if isinstance(config, LoRAQuantConfig):
        lora, tensors = as_lora(config, state, torch.float32, str(source))
        steps = _steps(config, state)
    else:
        lora, tensors = check_lora(config, str(source)), state
    factors, embeddings, rest = split_lora(tensors)
    # PEFT saves the frozen weight of an output layer along.
    rest = {name: tensor for name, tensor in rest.items() if not name.endswith(FROZEN)}
    if lora.use_dora:
        raise ValueError("llama.cpp has no DoRA, but `use_dora` is True; merge this adapter")
    if embeddings or rest:
        raise ValueError(
            "llama.cpp adds factors to linear layers only, but the adapter also has "
            f"{some([*embeddings, *rest])}; merge it"
        )
    place = base or lora.base_model_name_or_path
    if place is None:
        raise ValueError("the adapter names no base model; give `base`")
    try:
        base_config = AutoConfig.from_pretrained(place, token=token)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of the base model {place} cannot be read ({error}); give `base` (--model)"
        ) from error
    _check_shapes(factors, base_config, str(place))
    _write(Path(target), factors, lora, base_config, steps)
    return Path(target, FILE)


def _check_shapes(
    factors: dict[str, tuple[Tensor, Tensor]], config: PretrainedConfig, base: str
) -> None:
    """ValueError if the base model has no such layers; by their heads, rows are ordered."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    for name, (B, A) in factors.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or tuple(weight.shape) != (len(B), A.shape[1]):
            there = "no such layer" if weight is None else f"one of {tuple(weight.shape)}"
            raise ValueError(
                f"`{name}` of the adapter is {(len(B), A.shape[1])}, but {base} has {there}; give "
                "the model that the adapter was trained on as `base` (--model)"
            )


def _check_written(written: dict[str, Any], place: str) -> None:
    if written.get("peft_type") == PeftType.LRQAT:
        raise ValueError(
            f"the adapter in {place} is of type LRQAT, whose factors act inside the rounding; "
            "export the model itself: `lrqat export --format gguf`"
        )


def _write(
    target: Path,
    factors: dict[str, tuple[Tensor, Tensor]],
    lora: LoraConfig,
    config: PretrainedConfig,
    steps: dict[str, Tensor],
) -> None:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(INSTALL) from error
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, but the base model is a "
            f"{config.model_type}"
        )
    name, paired = ARCHITECTURES[config.model_type]
    names = tensor_names(config)
    alphas = _alphas(factors, lora)
    alpha = next(iter(alphas.values()))
    with whole_directory(target) as directory:
        writer = gguf.GGUFWriter(directory / FILE, name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for module, (B, A) in factors.items():
            mapped = names.get_name(module)
            if mapped is None:
                raise ValueError(
                    f"GGUF has no place for `{module}` of a {config.model_type}; merge the adapter"
                )
            heads = heads_of(module, config) if paired else None
            rows = B.float() * (alphas[module] / alpha)
            place = f"{mapped}.weight.lora_"
            kind, data = _in_blocks(A.float(), steps.get(module))
            raw = None if kind is None else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{place}a", data, raw_dtype=raw)
            rows = rows if heads is None else paired_rows(rows, heads)
            writer.add_tensor(f"{place}b", _in_floats(rows))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _steps(config: LoRAQuantConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By module, what the entries of A are whole multiples of, (r, n) float32; 0 in empty rows."""
    found = {}
    for module, (rows, columns) in config.shapes.items():
        format = config.packed_format(module, rows, columns)
        scales = state[f"{PREFIX}{module}.loraquant_scales"].float()
        step = torch.zeros(config.rank_of(module), columns)
        for block in format.blocks:
            if block.side == 1:
                # Without a zero point, codes lie halfway between two multiples of a scale.
                unit = scales[block.scales].view(block.count, -1)
                unit = unit / 2 if block.zero_points is None else unit
                step[block.components] = spread(unit, format.group_size, columns)
        found[module] = step
    return found


def _in_blocks(A: Tensor, step: Tensor | None) -> tuple[str | None, np.ndarray]:
    """The smallest blocks that hold A (r, n) exactly, and their bytes; None: floats."""
    size = ggml.TYPES["Q4_0"].size
    if step is None or A.shape[1] % size:
        return None, _in_floats(A)
    scale = step.unflatten(1, (-1, size))
    codes = (A / torch.where(step > 0, step, 1)).round()
    exact = torch.equal(codes * step, A) and torch.equal(scale.half().float(), scale)
    if not exact or (scale != scale[..., :1]).any():
        return None, _in_floats(A)
    largest = float(codes.abs().max())
    fitting = [name for name, most in (("Q4_0", 7), ("Q8_0", 127)) if largest <= most]
    if not fitting:
        return None, _in_floats(A)
    blocks = ggml.Blocks(
        codes=codes.to(torch.int16).unflatten(1, (-1, size)),
        scale=scale[..., :1].half().contiguous(),
        small=torch.ones(1, dtype=torch.uint8),
        minimum=None,
        minimum_scale=None,
    )
    parts = ggml.TYPES[fitting[0]].encode(blocks)
    return fitting[0], torch.cat(parts, dim=-1).flatten(1).numpy()


def _in_floats(factor: Tensor) -> np.ndarray:
    half = factor.half()
    return (half if torch.equal(half.float(), factor) else factor).contiguous().numpy()


def _alphas(factors: dict[str, tuple[Tensor, Tensor]], lora: LoraConfig) -> dict[str, float]:
    """By module, what divided by the stored rank is the factor of the product."""
    fields = ("r", "lora_alpha", "use_rslora")
    settings = LoRAQuantConfig(
        **{name: getattr(lora, name) for name in fields},
        rank_pattern=lora.rank_pattern or {},
        alpha_pattern=lora.alpha_pattern or {},
    )
    return {name: settings.scaling_of(name) * len(A) for name, (_, A) in factors.items()}
