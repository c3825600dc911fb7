"""Low-bit keys and values in attention, through transformers' attention interface: in training, evaluation and generation.

A model with ``kv_cache_bits`` calls the attention function it had before, on keys and values that were rounded: after the rotary
embedding, where they are cached, one range for each token and head. The cache itself keeps what the model computed, so that the
same token is rounded to the same values whether it comes from the cache or not.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..quant import Grid, fake_quantize_tokens


# The attribute of a projection inside attention (LR-QAT's layer, or the plain one it was merged into) that says the grid.
GRID = "kv_cache_grid"
# The attribute of keys and values that a low-bit cache has rounded.
ROUNDED = "rounded_to"
# transformers' attention implementations that can be wrapped. Flash attention looks its kernels up by the name of the
# implementation, and flex attention compiles its own masks: neither works under another name.
WRAPPED = {name: f"lrqat_{name}" for name in ("eager", "sdpa")}


def kv_cache_grid(attention: nn.Module) -> Grid | None:
    """The grid of an attention layer's keys and values; None where they stay as they are, as in an encoder, without a cache."""
    if not _keeps_cache(attention):
        return None
    for projection in attention._modules.values():
        grid = getattr(projection, GRID, None)
        if grid is not None:
            return grid
    return None


def mark_rounded(x: Tensor, grid: Grid) -> Tensor:
    """Says that ``x`` lies on ``grid`` already. Whatever is computed from it is not marked."""
    setattr(x, ROUNDED, grid)
    return x


def check_attention(model: nn.Module, parents: list[nn.Module]) -> None:
    """Raises ValueError where keys and values cannot be rounded. ``parents``: the modules that the targets lie in."""
    where = "`kv_cache_bits` is set, but"
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise ValueError(
            f"{where} {type(model).__name__} does not call attention through transformers' attention interface, which is where "
            "keys and values are rounded; leave `kv_cache_bits` out"
        )
    for part in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
        name = part.config._attn_implementation
        if name in WRAPPED and _asks_for(name, part):
            other = next(n for n in WRAPPED if n != name)
            raise ValueError(
                f"{where} {type(part).__name__} does something of its own where the attention implementation is {name!r}, and "
                f"would not under another name; load the model with attn_implementation={other!r}"
            )
        if name not in (*WRAPPED, *WRAPPED.values()):
            raise ValueError(
                f"{where} the attention implementation is {name!r}, and only {', '.join(map(repr, WRAPPED))} can be wrapped; load "
                "the model with attn_implementation='sdpa'"
            )
    if not any("Attention" in type(m).__name__ and _keeps_cache(m) for m in parents):
        raise ValueError(
            f"{where} no target module lies in an attention layer that keeps a cache; the keys and values of the layers with "
            "target modules are rounded. Add the attention's projections to `target_modules`, or leave `kv_cache_bits` out"
        )


def route_attention(model: PreTrainedModel) -> None:
    """Lets every attention layer of the model ask for its grid before the function that it called up to now; again: no change."""
    model.set_attn_implementation(_wrapped_names(model.config))


def unroute_attention(model: PreTrainedModel) -> None:
    """Back to the functions of before."""
    model.set_attn_implementation(
        _wrapped_names(model.config, {wrapped: name for name, wrapped in WRAPPED.items()})
    )


def _keeps_cache(attention: nn.Module) -> bool:
    # Encoder-decoder models and BERT say `is_decoder`; decoders without a choice have at most `is_causal`.
    return bool(getattr(attention, "is_decoder", getattr(attention, "is_causal", True)))


def _asks_for(name: str, part: PreTrainedModel) -> bool:
    """Whether the file of a model compares the implementation with a name. transformers looks into such files, too."""
    try:
        source = inspect.getsource(sys.modules[type(part).__module__])
    except (OSError, TypeError):
        return False
    return re.search(rf"_attn_implementation [!=]= [\"']{name}[\"']", source) is not None


def _wrapped_names(config: PreTrainedConfig, names: dict[str, str] = WRAPPED) -> dict[str, Any]:
    """What ``set_attn_implementation`` takes, for a configuration and those inside it."""
    own = config._attn_implementation
    inside = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": names.get(own, own)} | {
        name: _wrapped_names(sub, names) for name, sub in inside.items() if sub is not None
    }


def _implementation(name: str, attention: nn.Module) -> Callable[..., Any]:
    """What the model's own file calls by this name: it may have a version of its own, and eager attention always is one."""
    for kind in type(attention).__mro__:
        file = vars(sys.modules[kind.__module__])
        if name == "eager" and "eager_attention_forward" in file:
            return file["eager_attention_forward"]
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in file:
            return file["ALL_ATTENTION_FUNCTIONS"][name]
    raise ValueError(
        f"`kv_cache_bits` found no {name} attention function beside {type(attention).__name__}; load the model with another "
        "`attn_implementation`"
    )


def _register(name: str) -> None:
    def attention_with_low_bit_cache(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        grid = kv_cache_grid(module)
        if grid is not None and getattr(key, ROUNDED, None) != grid:
            key, value = fake_quantize_tokens(key, grid), fake_quantize_tokens(value, grid)
        return _implementation(name, module)(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(WRAPPED[name], attention_with_low_bit_cache)
    AttentionMaskInterface.register(WRAPPED[name], AttentionMaskInterface()[name])


# When this package is imported, so that a copied or unpickled model finds the names that its configuration has.
for _name in WRAPPED:
    _register(_name)
