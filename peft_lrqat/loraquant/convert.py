"""Converts saved adapters to packed ones and back: `quantize_adapter` and `dequantize_adapter`.

LoRA adapters are converted here, LR-QAT adapters in lrqat.py.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, PeftType
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..lrqat.config import LRQATConfig
from ..quant.factors.storage import check_packed, expand
from ..shared.names import PREFIX
from ..shared.staging import check_target
from ..shared.words import some
from .config import LoRAQuantConfig
from .files import from_files, from_model, write_adapter, write_packed
from .layer import check_magnitude
from .lrqat import dequantize_lrqat, quantize_lrqat
from .quantize import check_factors, quantize_factors, report, stored_zero_points


# Names of B and A in LoRA's files: for linear layers and for embeddings.
PAIRS = (("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A"))
MAGNITUDE, MAGNITUDE_STORED = "lora_magnitude_vector", "loraquant_magnitude"
# Fields that other ways to train LoRA leave in its config, and fields that inference does not use.
WITHOUT_EFFECT = {
    "corda_config",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "velora_config",
}
# These initialisations change the base weights, to which the saved factors must be added.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def quantize_adapter(
    source: str | os.PathLike[str] | PeftModel,
    target: str | os.PathLike[str],
    config: LoRAQuantConfig | None = None,
    *,
    adapter_name: str = "default",
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> LoRAQuantConfig | LRQATConfig:
    """Writes the adapter ``source`` with packed factors to ``target``; returns the new config.

    A LoRA adapter becomes one of type LORAQUANT. Its ``config.report`` holds the relative error
    ``||BA - Q(B)Q(A)||_F / ||BA||_F``, in total and for each module, and the bits per parameter of
    the original factors. An LR-QAT adapter keeps its type, and the report is in
    ``config.packed_factors``; see `lrqat.quantize_lrqat`.

    ``target`` must not exist; it appears only when everything in it is written.

    Args:
        source: a directory, a repository of the Hub, or a model with the adapter ``adapter_name``.
        config: the recipe; the default is ``LoRAQuantConfig()``.
        subfolder: the place of the adapter in the directory or repository.
        progress: whether to show a progress bar on stderr.
    """
    check_target(target)
    if not isinstance(source, str | os.PathLike | PeftModel):
        raise TypeError(
            "`source` must be a directory, a repository of the Hub or a PeftModel, but is a "
            f"{type(source).__name__}; save its adapter with `save_pretrained` and give that "
            "directory"
        )
    if not isinstance(config, LoRAQuantConfig | None):
        raise TypeError(f"`config` must be a LoRAQuantConfig, but is a {type(config).__name__}")
    recipe = LoRAQuantConfig() if config is None else config
    if recipe.component_bits:
        raise ValueError(
            "`config` belongs to an adapter that is quantised already; give a fresh LoRAQuantConfig"
        )
    if isinstance(source, PeftModel):
        adapter, state = from_model(source, adapter_name)
        place = "the model"
    else:
        check = partial(_check_written, place=str(source))
        adapter, state = from_files(
            str(source), check, revision=revision, subfolder=subfolder, token=token
        )
        place = str(source)
    if isinstance(adapter, LRQATConfig):
        layers = (source, adapter_name) if isinstance(source, PeftModel) else None
        return quantize_lrqat(adapter, state, target, recipe, layers, progress=progress)
    lora = check_lora(adapter, place)
    factors, embeddings, rest = split_lora(state)
    made = _taken_over(lora, recipe)
    check_factors(factors, made.rank_of, made.scale_dtype)
    _check_rest(rest, factors, made)
    found = quantize_factors(
        factors, made, {name: made.scaling_of(name) for name in factors}, progress=progress
    )
    made.component_bits = {name: quantized.format.bits for name, quantized in found.items()}
    made.shapes = {name: [len(B), A.shape[1]] for name, (B, A) in factors.items()}
    made.embeddings, made.zero_points = embeddings, stored_zero_points(found)

    def finished(stored_bytes: int) -> LoRAQuantConfig:
        """Fills in the report, once the size of the file is known."""
        made.report = report(factors, found, stored_bytes)
        return made

    return write_packed(
        target, {name: quantized.tensors for name, quantized in found.items()}, rest, finished
    )


def dequantize_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> LoraConfig | LRQATConfig:
    """Writes an adapter with packed factors as a standard one; returns its config.

    This is for servers and converters that only know standard adapters. A LORAQUANT adapter becomes
    LoRA in ``dtype`` (default: float16). Ranks are those of the adapter that was quantised;
    components that are not stored are zero. An LR-QAT adapter gets plain factors in float32, the
    only dtype that keeps its integers.
    """
    check_target(target)
    check = partial(_check_packed_type, place=str(source))
    config, state = from_files(
        str(source), check, revision=revision, subfolder=subfolder, token=token
    )
    if isinstance(config, LRQATConfig):
        if dtype not in (None, torch.float32):
            raise ValueError(
                "`dtype` must be float32 for an LR-QAT adapter, or its integers change, but is "
                f"{dtype}; leave it out"
            )
        return dequantize_lrqat(config, state, target, str(source))
    assert isinstance(config, LoRAQuantConfig)  # `_check_packed_type` refuses all others
    dtype = torch.float16 if dtype is None else dtype
    lora, tensors = as_lora(config, state, dtype, str(source))
    write_adapter(target, tensors, lora)
    return lora


def as_lora(
    config: LoRAQuantConfig, state: dict[str, Tensor], dtype: torch.dtype, source: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA adapter that a LORAQUANT one stands for: its config, and all tensors by name.

    Raises ValueError, which names ``source``, if ``state`` is not what ``config`` describes.
    """
    stored, rest = _stored(state)
    if stored.keys() != config.component_bits.keys():
        raise ValueError(
            f"the weights in {source} and its {CONFIG_NAME} must have the same modules, but differ "
            f"in {some(stored.keys() ^ config.component_bits.keys())}"
        )
    tensors: dict[str, Tensor] = {}
    for module, packed in stored.items():
        try:
            tensors |= {
                f"{PREFIX}{module}.{name}": t
                for name, t in _as_lora(module, packed, config, dtype).items()
            }
        except ValueError as error:
            raise ValueError(f"`{module}` in {source}: {error}") from None
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name in known and name != "peft_type"
    }
    for name in config.patterns:
        fields[name] = _as_read(getattr(config, name), config.component_bits)
    return LoraConfig(**fields), {**tensors, **rest}


def _as_read(pattern: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """A pattern that gives ``modules`` the same values once PEFT has sorted its keys."""
    if list(pattern) == sorted(pattern):
        return pattern
    keys = {module: get_pattern_key(list(pattern), module) for module in modules}
    return {f"^{re.escape(m)}": pattern[key] for m, key in keys.items() if key in pattern}


def _check_written(written: dict[str, Any], place: str) -> None:
    """Raises ValueError unless the file belongs to an adapter that can be quantised."""
    _check_type(written.get("peft_type"), place)
    if written["peft_type"] == PeftType.LORA:
        _check_initialisation(written.get("init_lora_weights"))


def _check_packed_type(written: dict[str, Any], place: str) -> None:
    """Raises ValueError unless the file belongs to an adapter with packed factors."""
    found = written.get("peft_type")
    if found != PeftType.LORAQUANT and not (
        found == PeftType.LRQAT and written.get("packed_factors")
    ):
        raise ValueError(
            f"the adapter in {place} is of type {found}, but must be LORAQUANT, or LRQAT with "
            "packed factors: there is nothing to dequantise"
        )


def _check_type(found: object, place: str) -> None:
    """Raises ValueError unless ``found`` is a type of adapter that can be quantised."""
    if found not in (PeftType.LORA, PeftType.LRQAT):
        raise ValueError(
            f"the adapter in {place} is of type {getattr(found, 'value', found)}, but must be LORA "
            "or LRQAT; only LoRA, DoRA and LR-QAT adapters can be quantised"
        )


def _check_initialisation(initialisation: object) -> None:
    """Raises ValueError for an initialisation that changes the base weights."""
    if isinstance(initialisation, str) and initialisation.startswith(CHANGED_BASES):
        raise ValueError(
            f"`init_lora_weights={initialisation!r}` takes the first factors out of the base "
            "weights, so the adapter does not fit the original base model; convert it first (PEFT: "
            "`path_initial_model_for_weight_conversion`)"
        )


def check_lora(config: PeftConfig, place: str) -> LoraConfig:
    """Returns ``config`` if it is a LoRA adapter that its factors describe completely.

    Raises ValueError for any other; ``place`` says where the adapter comes from.
    """
    if config.peft_type != PeftType.LORA or not isinstance(config, LoraConfig):
        _check_type(config.peft_type, place)
        raise ValueError(
            f"the adapter in {place} is of type LRQAT, but a LoRA adapter is needed here"
        )
    _check_initialisation(config.init_lora_weights)
    supported = {field.name for field in dataclasses.fields(LoRAQuantConfig)} | WITHOUT_EFFECT
    for field in dataclasses.fields(LoraConfig):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(config, field.name)
        if field.name not in supported and value != default:
            raise ValueError(
                f"the adapter uses `{field.name}` ({value!r}), which LORAQUANT cannot store; train "
                "it without"
            )
    return config


def _taken_over(lora: LoraConfig, recipe: LoRAQuantConfig) -> LoRAQuantConfig:
    """Returns ``recipe`` with the fields that it shares with ``lora``.

    The values are copies: a change of one config leaves the other alone.
    """
    own = {"peft_type", "inference_mode", "peft_version"}
    shared = {
        field.name for field in dataclasses.fields(LoRAQuantConfig) if hasattr(lora, field.name)
    } - own
    values = {name: copy.deepcopy(getattr(lora, name)) for name in shared}
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = values[name] or {}  # PEFT allows None
    return dataclasses.replace(recipe, **values)


def split_lora(
    state: dict[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str], dict[str, Tensor]]:
    """Splits the tensors of a LoRA adapter.

    Returns B (m, r) and A (r, n) by module; the names of modules that are embeddings; and all other
    tensors, which are stored unchanged. Raises ValueError for a module with only one of B and A.
    """
    rest = dict(state)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    embeddings: list[str] = []

    for kind, names in enumerate(PAIRS):
        modules = {
            key.removesuffix(f".{name}")
            for name in names
            for key in state
            if key.endswith(f".{name}")
        }
        for module in sorted(modules):
            B, A = (rest.pop(f"{module}.{name}", None) for name in names)
            if B is None or A is None:
                raise ValueError(
                    f"`{module}` has only one of {names[0]} and {names[1]}; the adapter's file is "
                    "not whole"
                )
            name = module.removeprefix(PREFIX)
            factors[name] = B, A
            if kind:
                embeddings.append(name)
    for key in [key for key in rest if MAGNITUDE in key]:
        module = key[: key.index(f".{MAGNITUDE}")]
        rest[f"{module}.{MAGNITUDE_STORED}"] = rest.pop(key)
    return factors, embeddings, rest


def _check_rest(
    rest: dict[str, Tensor], factors: dict[str, tuple[Tensor, Tensor]], config: LoRAQuantConfig
) -> None:
    """Raises ValueError unless the tensors that are stored unchanged are known and complete."""
    for key, tensor in rest.items():
        if ".lora_" in key:
            raise ValueError(
                f"the adapter has `{key}`, which LORAQUANT does not know and cannot store"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor.double()).all():
            raise ValueError(f"`{key}` has NaN or infinite entries; nothing was written")
    magnitudes = {
        key: tensor for key, tensor in rest.items() if key.endswith(f".{MAGNITUDE_STORED}")
    }
    wanted = {
        f"{PREFIX}{name}.{MAGNITUDE_STORED}": len(B)
        for name, (B, _) in factors.items()
        if config.use_dora
    }
    if wanted.keys() != magnitudes.keys():
        raise ValueError(
            f"with `use_dora={config.use_dora}` the adapter must have {len(wanted)} magnitudes, "
            f"but has {len(magnitudes)} (only in one of them: "
            f"{some(wanted.keys() ^ magnitudes.keys())}); the weights and {CONFIG_NAME} do not "
            "belong together"
        )
    for key, tensor in magnitudes.items():
        if tensor.shape != (wanted[key],):
            raise ValueError(
                f"`{key}` must have shape ({wanted[key]},), but has {tuple(tensor.shape)}"
            )


def _stored(state: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Returns the packed tensors by module and kind, and the tensors that are stored unchanged."""
    stored: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in state.items():
        module, _, kind = key.removeprefix(PREFIX).rpartition(".loraquant_")
        if module:
            stored.setdefault(module, {})[kind] = tensor
        else:
            rest[key] = tensor
    return stored, rest


def _as_lora(
    module: str, packed: dict[str, Tensor], config: LoRAQuantConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the tensors of one module by LoRA's names.

    Raises ValueError if the packed tensors are not what ``config`` describes.
    """
    if module not in config.shapes:
        raise ValueError(
            f"{CONFIG_NAME} has no `shapes` for this module; quantise the LoRA adapter again"
        )
    rows, columns = config.shapes[module]
    found = {}
    if config.use_dora:
        found[MAGNITUDE] = check_magnitude(packed.pop("magnitude", None), rows)
    format = config.packed_format(module, rows, columns)
    check_packed(format, packed)
    B, A = expand(format, packed, torch.float32)
    missing = config.rank_of(module) - B.shape[1]
    B, A = torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))
    for name, tensor in zip(PAIRS[module in config.embeddings], (B, A), strict=True):
        found[name] = tensor.to(dtype).contiguous()
        if not torch.isfinite(found[name]).all():
            raise ValueError(
                f"{name} has entries of up to {float(tensor.abs().max()):.3g}, too large for "
                f"{dtype}"
            )
    return found
