"""Saved LoRA adapters to packed ones and back: `quantize_adapter` and `dequantize_adapter`."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import LoRAQuantConfig
from .layer import _check_magnitude
from .packed import check_packed, expand
from .quantize import QuantizedFactors, nominal_bits, quantize_factors


PREFIX = "base_model.model."
# Names of B and A in LoRA's files, of linear layers and of embeddings.
PAIRS = (("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A"))
MAGNITUDE, MAGNITUDE_STORED = "lora_magnitude_vector", "loraquant_magnitude"
LARGEST = 1e4  # entry of a factor; float16, in which scales may be kept, ends at 65504
# What LoRA trained in other ways leaves behind in its config, and what has no part in inference.
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
# These initialisations take something out of the base weights, which the saved factors are to be added to.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def quantize_adapter(
    source: str | os.PathLike[str] | PeftModel,
    target: str | os.PathLike[str],
    config: LoRAQuantConfig | None = None,
    *,
    adapter_name: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    progress: bool = True,
) -> LoRAQuantConfig:
    """Writes the LoRA adapter ``source`` as a packed LORAQUANT adapter into the directory ``target``; returns its config.

    ``target`` appears when everything in it is written; one that exists is refused. ``config.report`` of the result holds the
    relative error ``||BA - Q(B)Q(A)||_F / ||BA||_F`` in total and by module, and the bits per parameter of the original factors.

    Args:
        source: a directory, a repository of the Hub, or a model that holds the adapter ``adapter_name``.
        config: the recipe; left out, ``LoRAQuantConfig()``.
        progress: whether a bar on stderr shows how far it is.
    """
    _check_target(target)
    recipe = LoRAQuantConfig() if config is None else config
    if recipe.component_bits:
        raise ValueError("`config` is that of an adapter that is quantised already; give a fresh LoRAQuantConfig")
    if isinstance(source, PeftModel):
        lora, state = _from_model(source, adapter_name)
    else:
        lora, state = _from_files(str(source), "LORA", revision, token)
        check_lora(lora, str(source))
    factors, embeddings, rest = _split(state)
    made = _taken_over(lora, recipe)
    _check_factors(factors, made)
    _check_rest(rest, factors, made)
    found = quantize_factors(factors, made, {name: made.scaling_of(name) for name in factors}, progress=progress)
    made.component_bits = {name: quantized.format.bits for name, quantized in found.items()}
    made.shapes = {name: [len(B), A.shape[1]] for name, (B, A) in factors.items()}
    made.embeddings, made.zero_points = embeddings, made.method == "paper"
    tensors = {
        f"{PREFIX}{name}.loraquant_{kind}": tensor
        for name, quantized in found.items()
        for kind, tensor in quantized.tensors.items()
    }
    with _whole_directory(target) as directory:
        _save({**tensors, **rest}, directory)
        size = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
        size -= sum(tensor.numel() * tensor.element_size() for tensor in rest.values())
        made.report = _report(factors, found, size)
        made.save_pretrained(str(directory))
    return made


def dequantize_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    revision: str | None = None,
    token: str | bool | None = None,
) -> LoraConfig:
    """Writes a LORAQUANT adapter as a standard LoRA adapter in ``dtype``, for servers and converters that know no other.

    Ranks are those of the adapter that was quantised; components that are not stored are zero.
    """
    _check_target(target)
    config, state = _from_files(str(source), "LORAQUANT", revision, token)
    stored, rest = _stored(state)
    if stored.keys() != config.component_bits.keys():
        raise ValueError(
            f"the file in {source} has other modules than its {CONFIG_NAME}: "
            f"{_some(stored.keys() ^ config.component_bits.keys())}"
        )
    tensors: dict[str, Tensor] = {}
    for module, packed in stored.items():
        try:
            tensors |= {f"{PREFIX}{module}.{name}": t for name, t in _as_lora(module, packed, config, dtype).items()}
        except ValueError as error:
            raise ValueError(f"`{module}` in {source}: {error}") from None
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    fields = {name: value for name, value in config.to_dict().items() if name in known and name != "peft_type"}
    lora = LoraConfig(**fields)
    with _whole_directory(target) as directory:
        _save({**tensors, **rest}, directory)
        lora.save_pretrained(str(directory))
    return lora


def _check_target(target: str | os.PathLike[str]) -> None:
    if Path(target).exists():
        raise FileExistsError(
            f"{target} exists, and nothing is written over it; give another directory, or delete it first"
        )


@contextmanager
def _whole_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory beside ``target`` that gets its name when everything is on the disk, and vanishes after an exception."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    directory.mkdir()
    try:
        yield directory
        for path in directory.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _check_target(target)
        directory.rename(target)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _save(tensors: Mapping[str, Tensor], directory: Path) -> None:
    try:
        save_file(dict(tensors), directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:  # of a full disk, say
        raise OSError(f"{SAFETENSORS_WEIGHTS_NAME} could not be written ({error}); nothing of it is left") from error


def _from_model(model: PeftModel, adapter_name: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"the model has no adapter `{adapter_name}`, but {sorted(model.peft_config)}; give `adapter_name`"
        )
    config = model.peft_config[adapter_name]
    check_lora(config, "the model")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # Copies: tied weights share their memory, which safetensors refuses, and training goes on in them.
    return config, {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _from_files(
    source: str, expected: str, revision: str | None, token: str | bool | None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of a saved adapter of the type ``expected``, from a directory or the Hub. Never a pickle."""
    config_path = _locate(source, CONFIG_NAME, revision, token)
    if config_path is None:
        raise ValueError(f"{source} has no {CONFIG_NAME}; give a directory or repository that holds a saved adapter")
    try:
        written = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{CONFIG_NAME} in {source} cannot be read ({error})") from error
    if not isinstance(written, dict):
        raise ValueError(f"{CONFIG_NAME} in {source} must hold an object of JSON, but holds a {type(written).__name__}")
    _check_type(written.get("peft_type"), expected, source)
    if expected == PeftType.LORA:
        _check_initialisation(written.get("init_lora_weights"))
    try:
        config = PeftConfig.from_pretrained(str(config_path.parent))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{CONFIG_NAME} in {source} describes no adapter ({error})") from error
    path = _locate(source, SAFETENSORS_WEIGHTS_NAME, revision, token)
    if path is None:
        raise ValueError(
            f"{source} has no {SAFETENSORS_WEIGHTS_NAME}; weights in other formats can run code when they are read. Load the "
            "adapter with PEFT and save it with `save_pretrained`"
        )
    try:
        return config, load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} in {source} is not whole ({error})") from error


def _locate(source: str, name: str, revision: str | None, token: str | bool | None) -> Path | None:
    """The file ``name`` of a directory, or of a repository once it is downloaded; None where there is none."""
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise ValueError(f"{source} is no directory, and no repository that can be reached ({error})") from error


def _check_type(found: object, expected: str, source: str) -> None:
    if found != expected:
        raise ValueError(
            f"the adapter in {source} is of type {getattr(found, 'value', found)}, but must be {expected}"
            + ("; only LoRA and DoRA adapters can be quantised" if expected == PeftType.LORA else "")
        )


def _check_initialisation(initialisation: object) -> None:
    if isinstance(initialisation, str) and initialisation.startswith(CHANGED_BASES):
        raise ValueError(
            f"`init_lora_weights={initialisation!r}` takes the first factors out of the base weights, which then are not the base "
            "model's; convert the adapter first (PEFT: `path_initial_model_for_weight_conversion`)"
        )


def check_lora(config: PeftConfig, place: str) -> None:
    """ValueError for anything but a LoRA adapter whose products alone say what it does; ``place`` is where it comes from."""
    _check_type(config.peft_type, "LORA", place)
    _check_initialisation(config.init_lora_weights)
    supported = {field.name for field in dataclasses.fields(LoRAQuantConfig)} | WITHOUT_EFFECT
    for field in dataclasses.fields(LoraConfig):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in supported and value != default:
            raise ValueError(
                f"the adapter uses `{field.name}` ({value!r}), which LORAQUANT cannot store; train it without"
            )


def _taken_over(lora: LoraConfig, recipe: LoRAQuantConfig) -> LoRAQuantConfig:
    """``recipe`` with what ``lora`` says of the adapter; the two share nothing that can change."""
    own = {"peft_type", "inference_mode", "peft_version"}
    shared = {field.name for field in dataclasses.fields(LoRAQuantConfig) if hasattr(lora, field.name)} - own
    values = {name: copy.deepcopy(getattr(lora, name)) for name in shared}
    for name in ("rank_pattern", "alpha_pattern"):
        values[name] = values[name] or {}  # PEFT allows None
    return dataclasses.replace(recipe, **values)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str], dict[str, Tensor]]:
    """B (m, r) and A (r, n) by module; which modules are embeddings; and what is stored as it is."""
    rest, factors, embeddings = dict(state), {}, []
    for kind, names in enumerate(PAIRS):
        modules = {key.removesuffix(f".{name}") for name in names for key in state if key.endswith(f".{name}")}
        for module in sorted(modules):
            found = [rest.pop(f"{module}.{name}", None) for name in names]
            if any(tensor is None for tensor in found):
                raise ValueError(
                    f"`{module}` has only one of {names[0]} and {names[1]}; the adapter's file is not whole"
                )
            name = module.removeprefix(PREFIX)
            factors[name] = tuple(found)
            if kind:
                embeddings.append(name)
    for key in [key for key in rest if MAGNITUDE in key]:
        module = key[: key.index(f".{MAGNITUDE}")]
        rest[f"{module}.{MAGNITUDE_STORED}"] = rest.pop(key)
    return factors, embeddings, rest


def _check_factors(factors: dict[str, tuple[Tensor, Tensor]], config: LoRAQuantConfig) -> None:
    if not factors:
        raise ValueError("the adapter has no pair of lora_A and lora_B: there is nothing to quantise")
    for name, (B, A) in factors.items():
        rank = config.rank_of(name)
        if B.ndim > 2 or A.ndim > 2:
            raise ValueError(
                f"`{name}` is a convolution, with factors of shapes {tuple(B.shape)} and {tuple(A.shape)}; LORAQUANT works on "
                "linear layers and embeddings. Train the adapter without it"
            )
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or len(A) != rank or not B.numel() or not A.numel():
            raise ValueError(
                f"the factors of `{name}` have shapes {tuple(B.shape)} and {tuple(A.shape)}, which make no product of rank {rank}; "
                f"the weights and {CONFIG_NAME} do not belong together"
            )
        for side, tensor in (("lora_B", B), ("lora_A", A)):
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(f"`{side}` of `{name}` has NaN or infinite entries; nothing was written")
            largest = float(tensor.abs().max())
            if largest > LARGEST:
                raise ValueError(
                    f"`{side}` of `{name}` has an entry of {largest:.3g}, which no scale of {config.scale_dtype} "
                    "may reach; the adapter is damaged, or its training diverged"
                )


def _check_rest(rest: dict[str, Tensor], factors: dict[str, tuple[Tensor, Tensor]], config: LoRAQuantConfig) -> None:
    """ValueError unless what is stored as it is, is known and whole."""
    for key, tensor in rest.items():
        if ".lora_" in key:
            raise ValueError(f"the adapter has `{key}`, which LORAQUANT does not know and cannot store")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"`{key}` has NaN or infinite entries; nothing was written")
    magnitudes = {key: tensor for key, tensor in rest.items() if key.endswith(f".{MAGNITUDE_STORED}")}
    wanted = {f"{PREFIX}{name}.{MAGNITUDE_STORED}": len(B) for name, (B, _) in factors.items() if config.use_dora}
    if wanted.keys() != magnitudes.keys():
        raise ValueError(
            f"with `use_dora={config.use_dora}` the adapter must have {len(wanted)} magnitudes, but has {len(magnitudes)} (not in "
            f"both: {_some(wanted.keys() ^ magnitudes.keys())}); the weights and {CONFIG_NAME} do not belong together"
        )
    for key, tensor in magnitudes.items():
        if tensor.shape != (wanted[key],):
            raise ValueError(f"`{key}` must have shape ({wanted[key]},), but has {tuple(tensor.shape)}")


def _stored(state: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The packed tensors by module and kind, and what is stored as it is."""
    stored: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in state.items():
        module, _, kind = key.removeprefix(PREFIX).rpartition(".loraquant_")
        if module:
            stored.setdefault(module, {})[kind] = tensor
        else:
            rest[key] = tensor
    return stored, rest


def _as_lora(module: str, packed: dict[str, Tensor], config: LoRAQuantConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one module by LoRA's names; ValueError where what is packed is not what ``config`` describes."""
    if module not in config.shapes:
        raise ValueError(f"{CONFIG_NAME} has no `shapes` of it; quantise the LoRA adapter again")
    rows, columns = config.shapes[module]
    found = {}
    if config.use_dora:
        found[MAGNITUDE] = packed.pop("magnitude", None)
        _check_magnitude(found[MAGNITUDE], rows)
    format = config.packed_format(module, rows, columns)
    check_packed(format, packed)
    B, A = expand(format, packed, torch.float32)
    missing = config.rank_of(module) - B.shape[1]
    B, A = torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))
    for name, tensor in zip(PAIRS[module in config.embeddings], (B, A), strict=True):
        found[name] = tensor.to(dtype).contiguous()
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{name} has entries of up to {float(tensor.abs().max()):.3g}, too large for {dtype}")
    return found


def _report(
    factors: dict[str, tuple[Tensor, Tensor]], found: dict[str, QuantizedFactors], stored_bytes: int
) -> dict[str, Any]:
    parameters = sum(B.numel() + A.numel() for B, A in factors.values())
    error, norm = (sum(getattr(q, name) for q in found.values()) for name in ("squared_error", "squared_norm"))
    return {
        "relative_error": round((error / norm) ** 0.5, 6) if norm else 0.0,
        "bits_per_parameter": round(8 * stored_bytes / parameters, 4),
        "nominal_bits_per_parameter": round(nominal_bits(factors, found), 4),
        "bytes": stored_bytes,
        "bytes_before": sum(t.numel() * t.element_size() for pair in factors.values() for t in pair),
        "relative_error_of_modules": {
            name: round((q.squared_error / q.squared_norm) ** 0.5, 4) if q.squared_norm else 0.0
            for name, q in found.items()
        },
    }


def _some(names: Any, count: int = 3) -> str:
    names = sorted(names)
    return ", ".join(f"`{name}`" for name in names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
