"""Low-bit embeddings, and an output layer that computes with the integers of the embedding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .downcast import DowncastLinear
from .experts import DowncastExperts, ExpertWeights


Plain = nn.Linear | Conv1D | nn.Embedding | ExpertWeights


class DowncastEmbedding(DowncastLinear):
    """A frozen `nn.Embedding` on an integer grid: a row of the weight for each token.

    The weight is (out, in) as that of a linear layer: ``out_features`` tokens of ``in_features``
    entries. ``project`` is the output layer that is tied to it. ``mark`` is empty and not saved:
    transformers takes the dtype of a model's first floating parameter for that of the model.
    """

    padding_idx: int | None = None
    mark: nn.Parameter

    def __init__(self, in_features: int, out_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, *args, **kwargs)
        # By these names of `nn.Embedding`, transformers asks for the shape.
        self.num_embeddings, self.embedding_dim = out_features, in_features
        mark = nn.Parameter(torch.empty(0, dtype=self.dtype, device="cpu"), requires_grad=False)
        mark.data = mark.data.to("cpu" if self.phi.is_meta else self.phi.device)
        vars(mark)["_is_hf_initialized"] = True
        vars(self)["_parameters"] = {"mark": mark, **self._parameters}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}mark", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        present = {f"{prefix}mark": self.mark, **state_dict}
        super()._load_from_state_dict(present, prefix, *args)

    def stand_for(self, plain: nn.Module) -> None:
        """Takes over the row of the padding of an `nn.Embedding`."""
        self.padding_idx = cast(nn.Embedding, plain).padding_idx

    def place_mark(self) -> None:
        """Moves the mark to the other parameters, once they are loaded."""
        self.mark.data = self.mark.data.to(self.phi.device)

    def resize(self, rows: int) -> None:
        super().resize(rows)
        self.num_embeddings = rows

    def forward(self, x: Tensor) -> Tensor:
        """Rows of the weight for the tokens ``x``, (...) -> (..., in), in ``dtype``."""
        ids = x
        if self.merged_weight is not None:
            return nn.functional.embedding(ids, self.merged_weight)
        rows = ids.reshape(-1)
        parts = (None if t is None else t[rows] for t in map(self.frozen, self.FROZEN))
        return self._dense(*parts).view(*ids.shape, self.in_features)

    def to_plain(self, weight: Tensor) -> nn.Embedding:
        """An `nn.Embedding` with ``weight`` (out, in)."""
        shape = (self.out_features, self.in_features)
        plain = nn.Embedding(*shape, padding_idx=self.padding_idx, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain


def width_of(module: Plain) -> int:
    """The width of a plain module's weight."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return module.nx if isinstance(module, Conv1D) else module.in_features


def layer_class(module: nn.Module) -> type[DowncastLinear]:
    """The kind of low-bit layer that stands for a plain module."""
    if isinstance(module, ExpertWeights):
        return DowncastExperts
    return DowncastEmbedding if isinstance(module, nn.Embedding) else DowncastLinear


class TiedHead(nn.Module):
    """An output layer without a weight of its own: it multiplies with that of the embedding.

    Args:
        find: gives the input embedding, whatever stands in its place at that time.
        bias: (out,), or None.
    """

    def __init__(self, find: Callable[[], nn.Module], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.find, self.bias = find, bias
        # How transformers ties the two, by model: put back when they become plain.
        self.ties: list[tuple[PreTrainedModel, dict[str, str]]] = []

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.find().weight)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        source: Any = self.find()
        if not hasattr(source, "project"):
            return nn.functional.linear(x, source.weight, self.bias)
        # In a model that is spread over devices, the embedding is on the first one.
        device = next(source.parameters()).device
        y = source.project(x.to(device)).to(x.device)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The names of a model's input embedding and of its output layer."""

    embedding: str
    head: str | None  # None: the model has none
    tied: bool

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the modules whose weights become low-bit."""
        return (self.embedding,) if self.tied or self.head is None else (self.embedding, self.head)


def input_embedding(model: PreTrainedModel) -> nn.Module | None:
    """The module that embeds tokens; None in models without one, such as those for speech."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def find_ends(model: PreTrainedModel) -> Ends:
    """The two ends of ``model``; ValueError where `embedding_bits` cannot serve it."""
    embedding: Any = input_embedding(model)
    head: Any = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found, head_name = names.get(id(embedding)), names.get(id(head))
    if found is None:
        raise ValueError(
            f"`embedding_bits` is for models with an input embedding, but {type(model).__name__} "
            "has none; leave it out"
        )
    if isinstance(head, TiedHead):
        return Ends(embedding=found, head=head_name, tied=True)
    if not hasattr(embedding, "project"):
        plain = type(embedding).forward is nn.Embedding.forward
        if not plain or getattr(embedding, "max_norm", None) is not None:
            raise ValueError(
                f"`embedding_bits` is for nn.Embedding, but `{found}` is a "
                f"{type(embedding).__name__} that computes more than a look-up; leave it out"
            )
    if head is not None and not isinstance(head, nn.Linear) and not hasattr(head, "project"):
        raise ValueError(
            f"`embedding_bits` is for output layers of type nn.Linear, but `{head_name}` is a "
            f"{type(head).__name__}; leave it out"
        )
    weight = f"{found}.weight"
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    others = {t for pair in ties.items() if weight in pair for t in pair} - {weight}
    if others - {f"{head_name}.weight"}:
        raise ValueError(
            "`embedding_bits` is for models that tie the input embedding to the output layer alone,"
            f" but `{weight}` is tied to {', '.join(map(repr, sorted(others)))}; leave it out"
        )
    return Ends(embedding=found, head=head_name, tied=bool(others))


def tie_head(model: PreTrainedModel, ends: Ends) -> None:
    """Puts a `TiedHead` in the place of the tied output layer, and tells transformers of it."""
    assert ends.head is not None
    linear = cast(nn.Linear, model.get_submodule(ends.head))
    head = TiedHead(model.get_input_embeddings, linear.bias)
    pair = {f"{ends.embedding}.weight", f"{ends.head}.weight"}
    for prefix, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        start = f"{prefix}." if prefix else ""
        ties = getattr(part, "all_tied_weights_keys", None) or {}
        kept = {t: s for t, s in ties.items() if {start + t, start + s} != pair}
        if kept == ties:
            continue
        head.ties.append((part, dict(ties)))
        part.all_tied_weights_keys = kept
        own = type(part)._tied_weights_keys or {}
        # Of the instance: `tie_weights` would look for a weight that is not there.
        vars(part)["_tied_weights_keys"] = {
            t: s
            for t, s in own.items()
            if not any(re.match(t, n.removeprefix(start)) for n in pair)
        }
    model.set_submodule(ends.head, head)


def untie_head(model: PreTrainedModel) -> None:
    """A plain output layer again, tied to the plain embedding; nothing without a `TiedHead`."""
    for name, head in list(model.named_modules()):
        if not isinstance(head, TiedHead):
            continue
        weight = cast(nn.Parameter, head.find().weight)
        plain: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight, plain.bias = weight, head.bias
        model.set_submodule(name, plain)
        for part, ties in head.ties:
            part.all_tied_weights_keys = ties
            vars(part).pop("_tied_weights_keys", None)
    vars(model).pop("_resize_token_embeddings", None)


def resize_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """What transformers' `resize_token_embeddings` does, on low-bit embeddings without adapters.

    New tokens get the mean of all rows, rounded to the grid.
    """
    embedding: Any = model.get_input_embeddings()
    count = embedding.weight.shape[0] if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
    if count == embedding.weight.shape[0]:
        return embedding
    layers = {name: model.get_submodule(name) for name in find_ends(model).weights}
    for name, layer in layers.items():
        if not isinstance(layer, DowncastLinear):
            raise ValueError(
                f"`{name}` carries adapters, whose factors fit the {embedding.weight.shape[0]} "
                "tokens of now; resize the embeddings before adapters are added"
            )
    for layer in layers.values():
        cast(DowncastLinear, layer).resize(count)
    return embedding


def let_resize(model: PreTrainedModel) -> None:
    """Lets transformers resize low-bit embeddings, where it would ask for an `nn.Embedding`."""
    vars(model)["_resize_token_embeddings"] = partial(resize_embeddings, model)


def check_embedding(name: str, module: nn.Module) -> None:
    """Raises ValueError unless the weight of ``module`` is in memory and finite."""
    weight = cast(Tensor, module.weight)
    if weight.device.type == "meta":
        raise ValueError(
            f"the weight of `{name}` is not in memory (meta device, or offloaded to CPU or disk): "
            "its integers cannot be made. Load the base model onto one device, without offloading"
        )
    if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise ValueError(
            f"the weight of `{name}` has NaN or infinite entries; repair the base model first"
        )
