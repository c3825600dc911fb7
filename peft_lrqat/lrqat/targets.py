"""Which layers of a model an LR-QAT adapter quantises, and why a layer cannot be one of them.

Everything is looked at, and refused if need be, before the first layer is replaced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..activations.attention import check_attention
from ..base.downcast import DowncastLinear, range_name
from ..base.experts import ExpertWeights, expert_weights, fused_elsewhere
from ..quant.grid import DTYPE_NAMES
from ..quant.storage import WeightFormat
from .config import LRQATConfig
from .layer import LRQATLayer, LRQATLinear


logger = logging.get_logger(__name__)
# Here, PEFT trains `HEADS` in full, but leaves them out of "all-linear" for SEQ_CLS only.
TASKS_WITH_HEADS = (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an adapter will do to a model."""

    targets: tuple[str, ...]  # names, in the model's order
    base_dtype: str | None  # that most frozen weights are made from; None without targets
    base_dtype_pattern: Mapping[str, str]  # the targets made from another dtype, by name
    weights: int  # that are yet to be quantised


def plan(
    model: nn.Module,
    config: LRQATConfig,
    is_target: Callable[[str], bool],
    embeddings: tuple[str, ...] = (),
    experts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Plan:
    """Looks at all targets of ``model``, which stays as it is.

    ``is_target`` says of a module's name whether ``config`` means it; ``embeddings`` are those of
    ``embedding_bits``, which `low_bit` looks at; ``experts`` are the weights of experts that
    `find_experts` found. Raises TypeError for a layer
    of another kind, and ValueError for one that cannot be quantised as ``config`` asks.
    """
    targets = find_targets(model, lambda name: name not in embeddings and is_target(name))
    targets |= experts
    tied = _tied_weights(model, targets)
    for name, module in targets.items():
        check_target(name, module, config)
        if name in tied:
            raise ValueError(
                f"the weight of `{name}` is tied to another module's, which would be left behind; "
                "leave it out of `target_modules`, or untie it (`tie_word_embeddings=False`)"
            )
    if config.kv_cache_bits is not None:
        check_attention(model, [model.get_submodule(name.rpartition(".")[0]) for name in targets])
    trained = [name for name in embeddings if is_target(name)]
    _check_patterns(config, [*targets, *embeddings])
    _warn_of_untouched_experts(model, targets)
    _warn_of_different_targets(model, [*targets, *trained])
    most, others = config.base_dtype, dict(config.base_dtype_pattern)
    if targets and config.base_dtype_is_open:
        ends = {name: model.get_submodule(name) for name in embeddings}
        dtypes = {
            name: DTYPE_NAMES[_base_dtype(module)] for name, module in {**targets, **ends}.items()
        }
        ((most, _),) = Counter(dtypes.values()).most_common(1)
        others = {name: dtype for name, dtype in dtypes.items() if dtype != most}
    return Plan(
        targets=(*targets, *trained),
        base_dtype=most,
        base_dtype_pattern=others,
        weights=sum(
            cast(Tensor, module.weight).numel()
            for module in targets.values()
            if not isinstance(module, LRQATLinear | DowncastLinear)
        ),
    )


def find_targets(model: nn.Module, is_target: Callable[[str], bool]) -> dict[str, nn.Module]:
    """The modules that ``is_target`` names, except those inside a tuner's layer that it names."""
    named = {name: module for name, module in model.named_modules() if name and is_target(name)}
    return {
        name: module
        for name, module in named.items()
        if not any(parent in named for parent in _tuner_parents(name, model))
    }


def in_features(module: nn.Module) -> int:
    """The width of a target."""
    return cast(int, module.nx if isinstance(module, Conv1D) else module.in_features)


def check_target(name: str, module: nn.Module, config: LRQATConfig) -> None:
    """Raises TypeError for a layer of another kind, ValueError for a weight that cannot be used."""
    if isinstance(module, LRQATLinear):
        _check_same_recipe(name, module, config)
        return
    if isinstance(module, DowncastLinear):  # `take_grids` has compared it with the config
        if _is_offloaded(module):
            raise ValueError(
                f"the integers of `{name}` are offloaded, to CPU or disk, and adapters need them "
                "where they are computed with; load the base without offloading, or spread it over "
                "more devices"
            )
        return
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    reason = _why_not(module)
    if reason is not None:
        raise TypeError(f"`{name}` is a {kind}; {reason}")
    weight: Any = module.values if isinstance(module, ExpertWeights) else module.weight
    plain = isinstance(module, ExpertWeights) or type(weight) is nn.Parameter
    if not plain or weight.dtype not in DTYPE_NAMES:
        raise TypeError(
            f"`{name}` ({kind}) has a weight of {type(weight).__name__}, {weight.dtype}; LR-QAT "
            "starts from float32, bfloat16 or float16 weights. Load the base model unquantised"
        )
    if weight.device.type == "meta" or _is_offloaded(module):
        raise ValueError(
            f"the weight of `{name}` is not in memory (meta device, or offloaded to CPU or disk): "
            "its integers cannot be made. Load the base model onto one device, without offloading"
        )
    config.weight_format(name, in_features(module))
    if weight.numel() == 0:
        raise ValueError(
            f"the weight of `{name}` is empty, of shape {tuple(weight.shape)}; leave it out of "
            "`target_modules`"
        )
    if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise ValueError(
            f"the weight of `{name}` has NaN or infinite entries; repair the base model first"
        )


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the weight when the module is called, and takes it away again."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))


OUT = "leave the module out of `target_modules`"


def _why_not(module: nn.Module) -> str | None:
    """Why LR-QAT cannot stand for a module, and what to do; None if it can."""
    if isinstance(module, BaseTunerLayer):
        return f"it carries an adapter already. Load the base model without it, or {OUT}"
    if isinstance(module, ExpertWeights):
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return f"nn.MultiheadAttention reads its weight without calling the layer; {OUT}"
    if not isinstance(module, nn.Linear | Conv1D):
        return (
            "LR-QAT works on torch.nn.Linear and transformers' Conv1D, neither quantised nor "
            f"adapted. If it is a quantised layer, load the base model unquantised; else {OUT}"
        )
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return None
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPE_NAMES:
        return f"its weight is quantised already. Load the base model unquantised, or {OUT}"
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if own - {"weight", "bias"} or any(module.children()):
        return f"it computes with more than a weight and a bias ({sorted(own)}); {OUT}"
    if not weight.is_meta and weight.numel() and not _computes_the_product(module):
        return f"its `forward` does not compute `x @ weight.T + bias`; {OUT}"
    return None


@torch.no_grad()
def _computes_the_product(module: nn.Linear | Conv1D) -> bool:
    """Whether a subclass's own ``forward`` gives what its parent's gives, on a few inputs."""
    parent: Any = Conv1D if isinstance(module, Conv1D) else nn.Linear
    generator = torch.Generator().manual_seed(0)
    for shape, size in (((3,), 1.0), ((2, 3), 30.0)):
        x = torch.randn(*shape, in_features(module), generator=generator, dtype=torch.float32)
        x = (size * x).to(module.weight)
        wanted = parent.forward(module, x)
        try:
            found = cast(Any, type(module)).forward(module, x)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return False  # it takes other inputs
        if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
            return False
        error = (found.double() - wanted.double()).norm()
        if not error <= 4 * torch.finfo(wanted.dtype).eps * wanted.double().norm():
            return False
    return True


def _check_same_recipe(name: str, layer: LRQATLinear, config: LRQATConfig) -> None:
    """Raises ValueError if an adapter asks for another frozen weight than the one that is there."""
    base = layer.base_layer
    first_range = range_name(config.range_estimator, config.range_p)
    wanted: list[Any] = [config.weight_format(name, layer.in_features), first_range]
    present: list[Any] = [base.format, base.range]
    if config.verify_base and not config.base_dtype_is_open:
        wanted.append(config.base_dtype_of(name))
        present.append(DTYPE_NAMES[base.base_dtype])
    if wanted != present:
        raise ValueError(
            f"`{name}` already holds a weight in {_in_words(*present)}, which its adapters share, "
            f"but this adapter asks for {_in_words(*wanted)}; use the same settings, or load "
            "another copy of the base model for it"
        )


def _in_words(format: WeightFormat, first_range: str, base_dtype: str | None = None) -> str:
    grid = format.grid
    source = "" if base_dtype is None else f", from {base_dtype}"
    return (
        f"bits={grid.bits}, group_size={grid.group_size}, {grid.kind}, "
        f"{'k_quant, ' if grid.k_quant else ''}downcast={format.downcast}, "
        f"scale_dtype={format.scale_dtype}, first range {first_range}{source}"
    )


def _base_dtype(module: nn.Module) -> torch.dtype:
    if isinstance(module, LRQATLayer):
        return module.base_layer.base_dtype
    if isinstance(module, DowncastLinear):
        return module.base_dtype
    return cast(Tensor, module.weight).dtype


def _check_patterns(config: LRQATConfig, targets: Collection[str]) -> None:
    """Raises ValueError for a key of a pattern that fits no target.

    Such a slip would silently train at other bits.
    """
    for field in ("bits_pattern", "group_size_pattern"):
        for key in getattr(config, field):
            if targets and not any(_fits(key, name) for name in targets):
                raise ValueError(
                    f"`{field}` has {key!r}, but no target module has this name; a target is "
                    f"called `{min(targets)}`, for example"
                )


def _fits(key: str, name: str) -> bool:
    """Whether PEFT's ``get_pattern_key`` finds ``name`` by ``key``."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _tuner_parents(name: str, model: nn.Module) -> list[str]:
    """The names of the ancestors that are layers of a tuner."""
    parents = [name[:i] for i, character in enumerate(name) if character == "."]
    return [parent for parent in parents if isinstance(model.get_submodule(parent), BaseTunerLayer)]


def _tied_weights(model: nn.Module, targets: Mapping[str, nn.Module]) -> set[str]:
    """The targets whose weight other modules use, too, such as a head tied to the embedding."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    weights = {
        name: weight
        for name, module in targets.items()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter)
    }
    own = Counter(map(id, weights.values()))
    return {name for name, weight in weights.items() if uses[id(weight)] > own[id(weight)]}


def _warn_of_untouched_experts(model: nn.Module, targets: Collection[str]) -> None:
    plain = {
        name: weights.values.numel()
        for name, weights in expert_weights(model).items()
        if isinstance(weights, ExpertWeights) and name not in targets
    }
    elsewhere = {name: model.get_parameter(name).numel() for name in fused_elsewhere(model)}
    left = plain | elsewhere
    if left:
        way = (
            "to quantise them, too, use `target_parameters='all-experts'`"
            if plain
            else "LR-QAT does not know how this model computes with them"
        )
        logger.warning(
            f"{len(left)} expert weights stay as they are, for example `{min(left)}`, "
            f"{sum(left.values()):,} parameters together: {way}"
        )


def _warn_of_different_targets(model: nn.Module, targets: Iterable[str]) -> None:
    present = {name for name, module in model.named_modules() if isinstance(module, LRQATLayer)}
    if present and present != set(targets):
        different = sorted(present ^ set(targets))
        logger.warning(
            f"the adapters on this model have different targets ({len(different)} layers differ, "
            f"for example `{different[0]}`): where an adapter has no factors, it runs the stored "
            "low-bit weight instead of the original one. For the results that it gives alone, "
            "load it on a base model of its own"
        )
