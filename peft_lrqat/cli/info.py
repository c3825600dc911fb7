"""`lrqat info`: what an adapter, a model or a file is, without loading a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat.base.config import LowBitConfig
from peft_lrqat.export.linears import lrqat_layers
from peft_lrqat.formats.linear import Target
from peft_lrqat.formats.runtimes import RUNTIMES
from peft_lrqat.formats.table import bytes_by_format
from peft_lrqat.loraquant import LoRAQuantConfig
from peft_lrqat.lrqat.config import LRQATConfig
from peft_lrqat.quant import inspect_rows, quantized_weight
from peft_lrqat.quant.grid import Grid
from peft_lrqat.shared.staging import directory_bytes
from peft_lrqat.trainer.opening import (
    find_config,
    gguf_file,
    is_adapter,
    quant_method,
    read_gguf,
)
from peft_lrqat.trainer.pipeline import find_file, load_adapter
from peft_lrqat.trainer.plan import skeleton

from .options import JsonOptions, ModelOptions
from .parser import Parser, print_columns


LAYER = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lrqat_(?P<part>A|B|scale)(?:\.weight)?"
)
ROWS_AT_A_TIME = 4096
Facts = dict[str, Any]


@dataclass(kw_only=True)
class InfoArguments(ModelOptions, JsonOptions):
    """How much is told."""

    layers: bool = field(
        default=False,
        metadata={
            "help": "load the base, and tell for each layer of an LR-QAT adapter which share of "
            "the integers training changed, and how far its weights moved"
        },
    )


def run_info(argv: Sequence[str]) -> int:
    """`lrqat info`."""
    parser = Parser(
        "info",
        "PATH [options]",
        [InfoArguments],
        "Tells what an adapter, a packed adapter, a low-bit base, an export or a GGUF file is:\n"
        "its settings, base and training, its size, and which runtimes take it at which size.",
        "  lrqat info my-3bit\n  lrqat info my-3bit --layers --json",
    )
    parser.add_argument("path", metavar="PATH", help="a directory, a file or a name on the Hub")
    args, place = parser.parse(argv)
    with parser.user_errors():
        found = describe(place.path)
        if args.layers:
            found["layers"] = _layers(place.path, args)
    if args.json:
        print(json.dumps({"path": place.path, **found}))
        return 0
    _print(found)
    return 0


def describe(place: str) -> Facts:
    """What is known of a directory, a GGUF file or a repository, from its small files and headers.

    Raises:
        ValueError: nothing there is a model or an adapter.
    """
    if is_adapter(place):
        config = PeftConfig.from_pretrained(place)
        found = _adapter(place, config)
        if isinstance(config, LRQATConfig):
            return found | _lrqat(place, config)
        if isinstance(config, LoRAQuantConfig):
            return found | _loraquant(config)
        return found
    if (file := gguf_file(place)) is not None:
        return _gguf(file)
    return _model(place)


def _adapter(place: str, config: PeftConfig) -> Facts:
    base = config.base_model_name_or_path
    at_hand = base is not None and find_file(base, "config.json") is not None
    found: Facts = {
        "type": f"{getattr(config.peft_type, 'value', config.peft_type)} adapter",
        "base": base,
        "base at hand": at_hand,
        "task": config.task_type,
        "rank": getattr(config, "r", None),
        "bytes": _bytes(place),
    }
    if version := getattr(config, "library_version", None):
        found["made by"] = f"peft-lrqat {version}"
    return found


def _lrqat(place: str, config: LRQATConfig) -> Facts:
    found: Facts = _settings(config)
    for name in ("activation_bits", "kv_cache_bits", "embedding_bits", "trainable_token_indices"):
        if getattr(config, name) is not None:
            found[name.replace("_", " ")] = getattr(config, name)
    found["factors"] = "float32" if config.packed_factors is None else "packed"
    if config.training_record:
        found["training"] = config.training_record
    targets = list(_targets_of_adapter(place, config))
    deployed = _deployed(targets, config.activation_grid, config.kv_cache_grid)
    if deployed and config.task_type not in (None, TaskType.CAUSAL_LM):
        reason = f"GGUF holds models that predict the next token, not {config.task_type}"
        deployed["bytes of these by format"]["gguf"] = reason
        deployed["runtimes"]["llama.cpp"] = reason
    return found | deployed


def _loraquant(config: LoRAQuantConfig) -> Facts:
    names = ("method", "bits_high", "ratio", "average_bits", "group_size", "scale_dtype")
    settings = {name: getattr(config, name) for name in names}
    report = {k: v for k, v in config.report.items() if not isinstance(v, dict | list)}
    return {"settings": settings, "report": report}


def _gguf(file: Path) -> Facts:
    reader = read_gguf(file)
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    architecture = reader.get_field("general.architecture")
    size = file.stat().st_size
    return {
        "type": "GGUF file",
        "architecture": None if architecture is None else architecture.contents(),
        "tensors by type": dict(kinds.most_common()),
        "bits per weight, of all": round(8 * size / weights, 3),
        "bytes": size,
        "runtimes": {"llama.cpp": "loads GGUF", "transformers": "loads GGUF, as plain weights"},
    }


def _model(place: str) -> Facts:
    config = find_config(place)
    found: Facts = {
        "type": "model",
        "architecture": ", ".join(config.architectures or [config.model_type]),
        "bytes": _bytes(place),
    }
    method = quant_method(config)
    if method is None:
        return found
    if method != LowBitConfig.quant_method:
        takers = [name for name, runtime in RUNTIMES.items() if runtime.format.name == method]
        found["type"] = f"{method} model"
        if takers:
            found["runtimes"] = dict.fromkeys(takers, f"loads {method}")
        return found
    entry: Any = config.quantization_config
    low_bit = LowBitConfig.from_dict(entry) if isinstance(entry, dict) else entry
    targets = [
        Target(
            name=name,
            grid=weight.format.grid,
            scale_dtype=weight.scale_dtype,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            is_conv1d=weight.transposed,
            experts=weight.experts,
            is_embedding=weight.embedding,
            dtype=getattr(torch, weight.base_dtype),
        )
        for name, weight in low_bit.stored_weights().items()
    ]
    found["type"] = "low-bit base"
    found["made from"] = low_bit.made_from
    return found | _settings(low_bit) | _deployed(targets, None, None)


def _settings(config: Any) -> Facts:
    names = ("bits", "group_size", "scale_dtype", "downcast", "range_estimator")
    settings = {"grid": config.weight_grid("").kind} | {n: getattr(config, n) for n in names}
    if config.k_quant:
        settings["k_quant"] = True
    patterns = {n: getattr(config, n) for n in ("bits_pattern", "group_size_pattern")}
    return {"settings": settings | {n: dict(v) for n, v in patterns.items() if v}}


def _targets_of_adapter(place: str, config: LRQATConfig) -> Iterable[Target]:
    """The layers of an adapter, from the header of its file; none where its factors are packed."""
    file = find_file(place, SAFETENSORS_WEIGHTS_NAME)
    if file is None:
        raise ValueError(f"{place} has no {SAFETENSORS_WEIGHTS_NAME}; the adapter is not whole")
    shapes: dict[str, dict[str, list[int]]] = {}
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (not a dict)
            if found := LAYER.fullmatch(key):
                parts = shapes.setdefault(found["module"], {})
                parts[found["part"]] = stored.get_slice(key).get_shape()
    modules = _modules_of_base(config)
    for name, parts in shapes.items():
        if parts.keys() == {"A", "B", "scale"}:
            module = modules.get(name)
            yield Target(
                name=name,
                grid=config.weight_grid(name),
                scale_dtype=config.scale_dtype,
                out_features=parts["scale"][0],
                in_features=parts["A"][-1],
                is_conv1d=isinstance(module, Conv1D),
                is_embedding=isinstance(module, nn.Embedding),
                experts=parts["B"][0] if len(parts["B"]) == 3 else 0,
                dtype=getattr(torch, config.base_dtype_of(name) or "bfloat16"),
            )


def _modules_of_base(config: LRQATConfig) -> dict[str, nn.Module]:
    """The modules of a base that predicts the next token, without weights; none if not at hand."""
    base = config.base_model_name_or_path
    of_this_kind = config.task_type in (None, TaskType.CAUSAL_LM)
    if not of_this_kind or base is None or find_file(base, "config.json") is None:
        return {}
    try:
        return dict(skeleton(base).named_modules())
    except ValueError:  # its code is its own, or it is no such model
        return {}


def _deployed(targets: Sequence[Target], activations: Grid | None, kv_cache: Grid | None) -> Facts:
    """Sizes of the quantised layers by format, and which runtimes take them."""
    if not targets:
        return {}
    runtimes: dict[str, str] = {}
    for name, runtime in RUNTIMES.items():
        reasons = [runtime.why_not_target(target) for target in targets]
        reasons += [runtime.why_not_activations(targets[0].grid, activations, kv_cache)]
        schemes = {t.name: t.grid for t in targets}
        reason = _first([*reasons, runtime.why_not_fused(schemes)])
        runtimes[name] = f"as {runtime.format.name}" if reason is None else reason
    return {
        "quantised layers": len(targets),
        "quantised weights": sum(target.num_weights for target in targets),
        "bytes of these in 16 bits": 2 * sum(target.num_weights for target in targets),
        "bytes of these as trained": sum(target.trained_bytes for target in targets),
        "bytes of these by format": bytes_by_format(targets, activations, kv_cache),
        "runtimes": runtimes,
    }


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


@torch.no_grad()
def _layers(place: str, args: InfoArguments) -> dict[str, dict[str, float]]:
    """By layer: the share of integers that training changed, and how far the weights moved."""
    if not is_adapter(place) or not isinstance(PeftConfig.from_pretrained(place), LRQATConfig):
        raise ValueError("--layers tells what training changed, so PATH must be an LR-QAT adapter")
    model: PeftModel = load_adapter(place, args.model, args.dtype)
    found = {}
    for name, layer in lrqat_layers(model).items():
        changed, moved, size = 0, 0.0, 0.0
        first = layer.base_layer.frozen("scale0")
        parts = list(layer.low_rank_weights("default"))
        for weight, scale in zip(parts, first.chunk(len(parts)), strict=True):
            start = replace(weight, gamma=0.0, scale=scale)
            rows: Tensor = torch.arange(weight.shape[0], device=weight.phi.device)
            changed += sum(
                int((inspect_rows(weight, part)[0] != inspect_rows(start, part)[0]).sum())
                for part in rows.split(ROWS_AT_A_TIME)
            )
            now, before = quantized_weight(weight).float(), quantized_weight(start).float()
            moved += float((now - before).square().sum())
            size += float(before.square().sum())
        found[name] = {
            "changed_integers": changed / (layer.out_features * layer.in_features),
            "relative_change": (moved / max(size, 1e-60)) ** 0.5,
        }
    return found


def _bytes(place: str) -> int | None:
    """Of a directory; None for a repository that is not here."""
    return directory_bytes(place) if Path(place).is_dir() else None


def _print(found: Mapping[str, Any], indent: str = "") -> None:
    layers = found.get("layers")
    shown = {k: v for k, v in found.items() if k != "layers" and v not in (None, {}, [])}
    width = max(len(str(name)) for name in shown)
    for name, value in shown.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
            continue
        print(f"{indent}{name!s:{width}}  {_plain(value)}")
    if layers:
        print_columns(
            ("layer", "integers changed", "weights moved"),
            [
                (name, f"{row['changed_integers']:.2%}", f"{row['relative_change']:.2%}")
                for name, row in layers.items()
            ],
        )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
