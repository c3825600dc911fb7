"""Low-bit keys and values in attention, through transformers' attention interface.

A model with ``kv_cache_bits`` calls the attention function that it called before, but rounds keys
and values first: after the rotary embedding, with one range for each token and head. The cache
keeps what the model computed. A token is therefore rounded to the same values whether it comes
from the cache or not.

Each attention layer holds a `KeyValueGrids`, which says the grid of the adapter that runs.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..quant import Grid, fake_quantize_tokens
from .hooks import say_what_is_not_saved


# transformers' attention implementations that can be wrapped. Flash attention looks its kernels up
# by the name of the implementation, and flex attention compiles its own masks: neither works under
# another name.
WRAPPED = {name: f"lrqat_{name}" for name in ("eager", "sdpa")}
GRIDS = "key_value_grids"  # where an attention layer holds them


class Projection(Protocol):
    """A layer of an attention module that knows which adapter it runs."""

    merged_adapters: list[str]

    def adapter_that_runs(self) -> str | None:
        """The adapter's name; None if only the frozen weight runs."""
        ...


@dataclass(frozen=True)
class KeyValueGrids:
    """The grids of one attention layer's keys and values, by adapter."""

    by_adapter: Mapping[str, Grid] = field(default_factory=dict)
    projections: tuple[Projection, ...] = ()
    merged: Grid | None = None  # the grid of the adapter that became plain weights

    def running(self) -> Grid | None:
        """The grid of the adapter that runs; None if keys and values stay as they are."""
        for projection in self.projections:
            adapter_name = projection.adapter_that_runs()
            if adapter_name is not None and adapter_name in self.by_adapter:
                return self.by_adapter[adapter_name]
        return self.merged

    def with_adapter(self, name: str, grid: Grid, projection: Projection) -> KeyValueGrids:
        """These grids, and that of another adapter, which ``projection`` has."""
        known = any(other is projection for other in self.projections)
        projections = self.projections if known else (*self.projections, projection)
        return replace(self, by_adapter={**self.by_adapter, name: grid}, projections=projections)

    def without_adapter(self, name: str) -> KeyValueGrids:
        """These grids without that of one adapter."""
        return replace(
            self, by_adapter={n: grid for n, grid in self.by_adapter.items() if n != name}
        )

    def as_merged(self) -> KeyValueGrids:
        """The grid of the adapter that was merged, now that its layers are plain ones."""
        merged = [name for layer in self.projections for name in layer.merged_adapters]
        found = [self.by_adapter[name] for name in merged if name in self.by_adapter]
        return KeyValueGrids(merged=found[0] if found else None)


def kv_cache_grid(attention: nn.Module) -> Grid | None:
    """The grid of an attention layer's keys and values; None if they stay as they are."""
    grids = _grids_of(attention)
    return None if grids is None else grids.running()


def add_adapter(
    model: nn.Module, adapter_name: str, grid: Grid | None, targets: Iterable[str]
) -> None:
    """Tells the attention layers around ``targets`` which grid an adapter asks for; None: none.

    ``targets`` are names of layers that have the adapter.
    """
    delete_adapter(model, adapter_name)
    if grid is None:
        return
    for name in targets:
        attention = model.get_submodule(name.rpartition(".")[0])
        if _rounds(attention):
            grids = _grids_of(attention) or KeyValueGrids()
            projection = cast(Projection, model.get_submodule(name))
            vars(attention)[GRIDS] = grids.with_adapter(adapter_name, grid, projection)
    route(model)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forgets an adapter; with the last grid, attention is called as it was before."""
    found = _all_grids(model)
    if not found:
        return
    left = {module: grids.without_adapter(adapter_name) for module, grids in found.items()}
    for module, grids in left.items():
        vars(module)[GRIDS] = grids
        if not any(other.by_adapter or other.merged for other in left.values()):
            del vars(module)[GRIDS]
    route(model)


def merge(model: nn.Module) -> None:
    """Keeps the grids of the adapter that was merged, once its layers are plain ones."""
    for module, grids in _all_grids(model).items():
        vars(module)[GRIDS] = grids.as_merged()
        if grids.as_merged().merged is not None:
            say_what_is_not_saved()


def route(model: nn.Module) -> None:
    """Lets every attention layer ask for its grid first, if any has one; else as it was before."""
    if not isinstance(model, PreTrainedModel):
        return
    hooks = model._forward_pre_hooks
    known = [number for number, hook in hooks.items() if hook is _route_again]
    if _all_grids(model):
        _set_names(model, WRAPPED)
        if not known:
            model.register_forward_pre_hook(_route_again)
    else:
        _set_names(model, {wrapped: name for name, wrapped in WRAPPED.items()})
        for number in known:
            del hooks[number]


def _route_again(model: nn.Module, args: Any) -> None:
    """A forward pre-hook: keys and values stay rounded after `set_attn_implementation`."""
    if torch.compiler.is_compiling():
        return
    unwrapped = _names(cast(PreTrainedModel, model).config) - set(WRAPPED.values())
    if not unwrapped:
        return
    if other := unwrapped - WRAPPED.keys():
        raise ValueError(
            f"the attention implementation is now {min(other)!r}, which would not round keys and "
            f"values as `kv_cache_bits` asks; set one of {', '.join(map(repr, WRAPPED))}"
        )
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            _check_way_of_its_own(part)
    route(model)


class Rounded(Tensor):
    """Keys or values that lie on ``grid`` already. What is computed from them is a plain tensor."""

    grid: Grid
    # PyTorch's own way to say so; its stubs know only methods here.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def rounded(x: Tensor, grid: Grid) -> Rounded:
    """``x``, which lies on ``grid``, under a type that says so."""
    marked = x.as_subclass(Rounded)
    marked.grid = grid
    return marked


def check_attention(model: nn.Module, parents: list[nn.Module]) -> None:
    """Raises ValueError if keys and values cannot be rounded; ``parents`` hold the targets."""
    where = "`kv_cache_bits` is set, but"
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise ValueError(
            f"{where} {type(model).__name__} does not call attention through transformers' "
            "attention interface, where keys and values are rounded; leave `kv_cache_bits` out"
        )
    for part in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
        _check_way_of_its_own(part)
        name = part.config._attn_implementation
        if name not in (*WRAPPED, *WRAPPED.values()):
            raise ValueError(
                f"{where} the attention implementation is {name!r}, and only "
                f"{', '.join(map(repr, WRAPPED))} can be wrapped; load the model with "
                "attn_implementation='sdpa'"
            )
    if not any(map(_rounds, parents)):
        raise ValueError(
            f"{where} no target module lies in an attention layer that keeps a cache; the keys "
            "and values of the layers with target modules are rounded. Add the attention's "
            "projections to `target_modules`, or leave `kv_cache_bits` out"
        )


def _check_way_of_its_own(part: PreTrainedModel) -> None:
    """ValueError if a model does something else under the name that its attention has now."""
    name = part.config._attn_implementation
    if name in WRAPPED and _asks_for(name, part):
        other = next(n for n in WRAPPED if n != name)
        raise ValueError(
            f"`kv_cache_bits` is set, but {type(part).__name__} does something of its own if the "
            f"attention implementation is {name!r}, and would not under another name; load the "
            f"model with attn_implementation={other!r}"
        )


def _set_names(model: PreTrainedModel, names: Mapping[str, str]) -> None:
    wanted = _wrapped_names(model.config, names)
    if wanted != _wrapped_names(model.config, {}):
        model.set_attn_implementation(wanted)


def _grids_of(module: nn.Module) -> KeyValueGrids | None:
    return vars(module).get(GRIDS)


def _all_grids(model: nn.Module) -> dict[nn.Module, KeyValueGrids]:
    return {m: grids for m in model.modules() if (grids := _grids_of(m)) is not None}


def _rounds(module: nn.Module) -> bool:
    """Whether a module is attention that keeps a cache; an encoder's does not."""
    # Encoder-decoder models and BERT have `is_decoder`, and other decoders at most `is_causal`.
    caches = getattr(module, "is_decoder", getattr(module, "is_causal", True))
    return "Attention" in type(module).__name__ and bool(caches)


def _asks_for(name: str, part: PreTrainedModel) -> bool:
    """Whether the model's source compares the implementation with ``name``."""
    try:
        source = inspect.getsource(sys.modules[type(part).__module__])
    except (OSError, TypeError):
        return False
    return re.search(rf"_attn_implementation [!=]= [\"']{name}[\"']", source) is not None


def _wrapped_names(config: PreTrainedConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """The argument of ``set_attn_implementation``, for a configuration and those inside it."""
    own = config._attn_implementation
    inside = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": names.get(own, own)} | {
        name: _wrapped_names(sub, names) for name, sub in inside.items() if sub is not None
    }


def _names(config: PreTrainedConfig) -> set[str]:
    """The attention implementations of a configuration and of those inside it."""
    names: set[str] = set()
    left = [_wrapped_names(config, {})]
    while left:
        for value in left.pop().values():
            if isinstance(value, dict):
                left.append(value)
            elif value is not None:
                names.add(value)
    return names


def _implementation(name: str, attention: nn.Module) -> Callable[..., Any]:
    """The function that the model's own file calls by this name.

    The file may define its own version; for eager attention it always does.
    """
    for kind in type(attention).__mro__:
        file = vars(sys.modules[kind.__module__])
        if name == "eager" and "eager_attention_forward" in file:
            return file["eager_attention_forward"]
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in file:
            return file["ALL_ATTENTION_FUNCTIONS"][name]
    raise ValueError(
        f"`kv_cache_bits` found no {name} attention function beside {type(attention).__name__}; "
        "load the model with another `attn_implementation`"
    )


def _register(name: str) -> None:
    def attention_with_low_bit_cache(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        grid = kv_cache_grid(module)
        if grid is not None and not (isinstance(key, Rounded) and key.grid == grid):
            key, value = fake_quantize_tokens(key, grid), fake_quantize_tokens(value, grid)
        return _implementation(name, module)(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(WRAPPED[name], attention_with_low_bit_cache)
    AttentionMaskInterface.register(WRAPPED[name], AttentionMaskInterface()[name])


# At import, so that a copied or unpickled model finds the names in its configuration.
for _name in WRAPPED:
    _register(_name)
