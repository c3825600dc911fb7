"""An adapter on a low-bit base takes the grids from it: the integers are there already."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..base.config import LowBitConfig
from ..base.downcast import DowncastLinear
from ..base.embedding import (
    DowncastEmbedding,
    Ends,
    Plain,
    TiedHead,
    check_embedding,
    find_ends,
    input_embedding,
    layer_class,
    let_resize,
    tie_head,
    width_of,
)
from ..quant.grid import SCALE_DTYPES, k_group
from ..shared.card import public_name
from .config import LRQATConfig
from .layer import LRQATLinear


# Fields with one value for all targets.
SHARED_FIELDS = ("symmetric", "balanced", "k_quant", "downcast", "scale_dtype")
FIRST_RANGE = re.compile(r"(?P<estimator>minmax|lp)(?:, p = (?P<p>[\d.]+))?")


def is_low_bit(model: nn.Module) -> bool:
    """Whether ``model`` was loaded or made as a low-bit base."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return isinstance(config, LowBitConfig)


def made_from(model: nn.Module) -> str | None:
    """What a low-bit base was made from, as files may say it; None for other models."""
    config: Any = getattr(model, "config", None)
    return public_name(config.quantization_config.made_from) if is_low_bit(model) else None


def low_bit_layers(model: nn.Module) -> dict[str, DowncastLinear]:
    """The frozen layers of a low-bit base by name, with adapters or without; none elsewhere."""
    if not is_low_bit(model):
        return {}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LRQATLinear):
            found[name] = module.base_layer
        elif isinstance(module, DowncastLinear) and not name.endswith(".base_layer"):
            found[name] = module
    return found


def take_grids(config: LRQATConfig, layers: Mapping[str, DowncastLinear]) -> None:
    """Sets the fields of ``config`` that decide frozen integers to what ``layers`` have.

    ``layers`` are the targets by name. Raises ValueError for a field that its maker gave another
    value, and for layers that one configuration cannot describe.
    """
    for name, layer in layers.items():
        _check_given(config, name, layer)
    for field in SHARED_FIELDS:
        decided = {n: layer for n, layer in layers.items() if _decides(layer, field)} or layers
        values = {str(_value(layer, field)): name for name, layer in decided.items()}
        if len(values) > 1:
            raise ValueError(
                f"an adapter has one `{field}` for all targets, but the low-bit base has "
                + " and ".join(f"{value} in `{name}`" for value, name in values.items())
                + "; give each its own adapter, or leave some out of `target_modules`"
            )
        setattr(config, field, _value(next(iter(decided.values())), field))
    for field in ("bits", "group_size"):
        if not {field, f"{field}_pattern"} & config.given_fields:
            found = {name: _value(layer, field) for name, layer in layers.items()}
            ((most, _),) = Counter(found.values()).most_common(1)
            setattr(config, field, most)
            others = {re.escape(name): value for name, value in found.items() if value != most}
            setattr(config, f"{field}_pattern", others)
    ((first_range, _),) = Counter(layer.range for layer in layers.values()).most_common(1)
    if known := FIRST_RANGE.fullmatch(first_range):
        config.range_estimator = "lp" if known["estimator"] == "lp" else "minmax"
        config.range_p = float(known["p"] or config.range_p)


def frozen_layer(module: nn.Module | None) -> DowncastLinear | None:
    """The frozen layer that ``module`` is, or that its adapters stand on."""
    if isinstance(module, LRQATLinear):
        return module.base_layer
    return module if isinstance(module, DowncastLinear) else None


def take_embeddings(config: LRQATConfig, model: nn.Module) -> Ends | None:
    """The ends of ``model`` whose weights are low-bit, or are to become so; None if they stay.

    Sets ``embedding_bits`` to what is there already. Raises ValueError for settings that disagree
    with it, and for a model that `embedding_bits` cannot serve.
    """
    there = None
    if isinstance(model, PreTrainedModel):
        there = frozen_layer(input_embedding(model))
    if isinstance(there, DowncastEmbedding):
        bits = there.format.grid.bits
        if "embedding_bits" in config.given_fields and config.embedding_bits != bits:
            raise ValueError(
                f"`embedding_bits` is {config.embedding_bits}, but the embeddings of this model "
                f"hold {bits} bits already; leave it out, or load the base model anew"
            )
        config.embedding_bits = bits
    if config.embedding_bits is None:
        if config.train_embeddings:
            raise ValueError(
                "`train_embeddings` needs `embedding_bits`, such as 8; a plain embedding is "
                "trained by `modules_to_save`"
            )
        return None
    if not isinstance(model, PreTrainedModel):
        raise ValueError("`embedding_bits` is for models of transformers; leave it out")
    if there is None and is_low_bit(model):
        raise ValueError(
            f"`embedding_bits` is {config.embedding_bits}, but the embeddings of this low-bit base "
            "are plain; make a base with `embedding_bits`, or leave it out"
        )
    ends = find_ends(model)
    frozen = {name: frozen_layer(model.get_submodule(name)) for name in ends.weights}
    config.set_embedding_bits(
        {
            name: config.embedding_bits if layer is None else layer.format.grid.bits
            for name, layer in frozen.items()
        }
    )
    for name, layer in frozen.items():
        module = model.get_submodule(name)
        if layer is not None:
            _check_given(config, name, layer)
            continue
        check_embedding(name, module)
        config.weight_format(name, width_of(cast(Plain, module)))
    return ends


def put_embeddings(
    config: LRQATConfig, model: PreTrainedModel, ends: Ends, trained: Container[str]
) -> None:
    """Makes the plain ends of ``model`` low-bit.

    Those that the adapter does not train, by name, hold integers whatever ``downcast`` says: what
    no product can tip over is computed with as it will be deployed.
    """
    for name in ends.weights:
        module = model.get_submodule(name)
        if frozen_layer(module) is not None:
            continue
        plain = cast(Plain, module)
        format = config.weight_format(name, width_of(plain))
        made = layer_class(plain).from_linear(
            plain,
            format if name in trained else replace(format, downcast="int"),
            estimator=config.range_estimator,
            p=config.range_p,
            base_dtype=SCALE_DTYPES[config.base_dtype_of(name) or "float32"],
        )
        model.set_submodule(name, made)
    let_resize(model)
    if ends.tied and not isinstance(model.get_output_embeddings(), TiedHead):
        tie_head(model, ends)


def check_trained_tokens(config: LRQATConfig, model: nn.Module, low_bit: Iterable[str]) -> None:
    """Raises ValueError unless ``trainable_token_indices`` names rows of plain embeddings.

    ``low_bit``: the names of modules that hold integers, or will.
    """
    asked = config.trainable_token_indices
    if asked is None:
        return
    ends: list[nn.Module | None] = [None, None]
    if isinstance(model, PreTrainedModel):
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found: list[tuple[str, nn.Module, list[int]]] = []
    for name, module in model.named_modules():
        if isinstance(asked, dict):  # as PEFT looks for them
            found += [(name, module, ids) for end, ids in asked.items() if name.endswith(end)]
        elif module is ends[0]:
            found.append((name, cast(nn.Module, module), asked))
    for name, module, ids in found:
        if name in low_bit:
            raise ValueError(
                f"`trainable_token_indices` trains rows of `{name}`, but it holds low-bit "
                "integers, or will; leave it out, or train its scales and factors: "
                "`train_embeddings=True` or `target_modules`"
            )
        if any(name.endswith(saved) for saved in config.modules_to_save or ()):
            raise ValueError(
                f"`trainable_token_indices` trains rows of `{name}`, which `modules_to_save` "
                "trains in full; leave it out of one of them"
            )
        weight = getattr(module, "weight", None)
        if weight is not None and max(ids) >= weight.shape[0]:
            raise ValueError(
                f"`trainable_token_indices` has {max(ids)}, but `{name}` has {weight.shape[0]} "
                "rows; call model.resize_token_embeddings(len(tokenizer)) for new tokens first"
            )
    embedding, head = ([ids for _, m, ids in found if m is end] for end in ends)
    config_of: Any = getattr(model, "config", None)
    if head and head != embedding and getattr(config_of, "tie_word_embeddings", False):
        raise ValueError(
            "`trainable_token_indices` names the output layer, which shares its weight with the "
            "input embedding, but not the same tokens there; give a list of tokens, which are then "
            "trained in both"
        )


def check_saved_modules(config: LRQATConfig, names: Iterable[str]) -> None:
    """Raises ValueError where ``modules_to_save`` names a module without a plain weight."""
    for name in names:
        for asked in config.modules_to_save or ():
            if name.endswith(asked):  # as PEFT looks for them
                raise ValueError(
                    f"`modules_to_save` names `{asked}`, but `{name}` holds low-bit integers, "
                    "which are not trained in full; leave it out, and train its scales and "
                    "factors instead: `train_embeddings=True` or `target_modules`"
                )


def _decides(layer: DowncastLinear, field: str) -> bool:
    """Whether a layer shows what a field was; integers that no K block holds never have one."""
    grid = layer.format.grid
    return field != "k_quant" or k_group(grid.bits, grid.kind == "symmetric") is not None


def _value(layer: DowncastLinear, field: str) -> object:
    format = layer.format
    return (
        getattr(format, field)
        if field in ("downcast", "scale_dtype")
        else getattr(format.grid, field)
    )


def _check_given(config: LRQATConfig, name: str, layer: DowncastLinear) -> None:
    asked = {field: getattr(config, field) for field in SHARED_FIELDS}
    grid = config.weight_format(name, layer.in_features).grid if _asks_for_grid(config) else None
    for field in ("bits", "group_size"):
        if {field, f"{field}_pattern"} & config.given_fields and grid is not None:
            asked[field] = getattr(grid, field)
    for field, value in asked.items():
        given = field in config.given_fields or f"{field}_pattern" in config.given_fields
        if given and _decides(layer, field) and value != _value(layer, field):
            raise ValueError(
                f"`{field}` is {value!r}, but the low-bit base holds `{name}` with "
                f"{_value(layer, field)!r}, and adapters take the grids from it; leave `{field}` "
                "out, or make a base with these settings"
            )


def _asks_for_grid(config: LRQATConfig) -> bool:
    fields = {"bits", "bits_pattern", "group_size", "group_size_pattern"}
    return bool(fields & config.given_fields)
