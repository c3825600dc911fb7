"""Low-bit weights of experts, which transformers keeps as one 3-D parameter for each projection.

A weight (experts, out, in) is handled as one of (experts * out, in): an integer grid knows rows
only. `LowBitExperts` sorts the tokens by expert, so that each projection gets those of one expert
after those of another, and multiplies them with that expert's rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.integrations import skip_init_on_device
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter

from .downcast import DowncastLinear
from .settings import ALL_EXPERTS, is_excluded


# What transformers' interface for experts says of a module: how it computes with its parameters.
INTERFACE = ("_apply_gate", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def by_expert(
    x: Tensor, counts: Sequence[int], product: Callable[[int, Tensor], Tensor], out_features: int
) -> Tensor:
    """``product(expert, tokens)`` for each expert that has tokens, one after another.

    ``x`` (tokens, in) is sorted by expert, ``counts`` says how many each has; (tokens, out).
    """
    parts = enumerate(x.split(list(counts)))
    products = [product(expert, tokens) for expert, tokens in parts if len(tokens)]
    return torch.cat(products) if products else x.new_empty(0, out_features)


class ExpertWeights(nn.Module):
    """The plain weights of all experts for one projection, as the rows of one matrix.

    Args:
        weight: (experts * out, in).
        experts: how many there are.
        is_transposed: whether the parameter it stands for is (experts, in, out).
    """

    bias = None  # those of experts stay where they are

    def __init__(self, weight: nn.Parameter, experts: int, is_transposed: bool) -> None:
        super().__init__()
        self.weight, self.experts, self.is_transposed = weight, experts, is_transposed
        self.out_features, self.in_features = weight.shape

    # Real weights, even if PEFT creates the adapter's own parameters on the meta device.
    @classmethod
    @skip_init_on_device
    def of(cls, experts: nn.Module, kind: str) -> ExpertWeights:
        """Those of the parameter ``kind`` of a module of experts, which stays as it is.

        A copy is made of a transposed one, once it is used, see `make`.
        """
        fused, transposed = cast(Tensor, getattr(experts, kind)).detach(), experts.is_transposed
        rows = fused.flatten(0, 1)
        if transposed:
            rows = torch.empty_like(fused.mT, device="meta").flatten(0, 1)
        made = cls(nn.Parameter(rows, requires_grad=False), len(fused), bool(transposed))
        vars(made)["source"] = fused
        return made

    @property
    def values(self) -> Tensor:
        """The weights in any order."""
        return cast(Tensor, vars(self).get("source", self.weight))

    @skip_init_on_device
    def take(self, fused: Tensor) -> None:
        """Takes the values of the parameter that this stands for."""
        vars(self)["source"] = fused
        if not self.is_transposed:
            self.weight = nn.Parameter(fused.flatten(0, 1), requires_grad=False)
        self.make()

    @skip_init_on_device
    def make(self) -> ExpertWeights:
        """These weights, each in its row."""
        source = vars(self).pop("source", None)
        if source is not None and self.is_transposed:
            self.weight = nn.Parameter(source.mT.flatten(0, 1), requires_grad=False)
        return self

    def fused(self) -> Tensor:
        """The parameter that this stands for."""
        weight = self.weight.detach().unflatten(0, (self.experts, -1))
        return weight.mT.contiguous() if self.is_transposed else weight

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """``x`` (tokens, in), sorted by expert, times each expert's weight: (tokens, out)."""
        weights = self.weight.unflatten(0, (self.experts, -1)).unbind()
        return by_expert(
            x,
            counts,
            lambda expert, tokens: nn.functional.linear(tokens, weights[expert]),
            self.out_features // self.experts,
        )


class DowncastExperts(DowncastLinear):
    """The frozen weights of all experts for one projection: (experts * out, in), a grid for each
    row or group of it.
    """

    is_transposed: bool = False

    def stand_for(self, plain: nn.Module) -> None:
        """Takes over how the parameter of `ExpertWeights` lies."""
        weights = cast(ExpertWeights, plain)
        self.experts, self.is_transposed = weights.experts, weights.is_transposed

    @property
    def transposed(self) -> bool:
        return self.is_transposed

    def rows(self, expert: int) -> slice:
        """The rows of one expert."""
        height = self.out_features // self.experts
        return slice(expert * height, (expert + 1) * height)

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:  # type: ignore[override]
        """``x`` (tokens, in), sorted by expert, times each expert's weight: (tokens, out)."""
        dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else self.dtype
        height = self.out_features // self.experts
        return by_expert(x.to(dtype), counts, self._product, height).to(x.dtype)

    def _product(self, expert: int, tokens: Tensor) -> Tensor:
        rows = self.rows(expert)
        if self.merged_weight is not None:
            return nn.functional.linear(tokens, self.merged_weight[rows])
        parts = (None if t is None else t[rows] for t in map(self.frozen, self.FROZEN))
        return nn.functional.linear(tokens, self._dense(*parts))

    def to_plain(self, weight: Tensor) -> ExpertWeights:  # type: ignore[override]
        """`ExpertWeights` with ``weight`` (experts * out, in)."""
        parameter = nn.Parameter(weight, requires_grad=False)
        return ExpertWeights(parameter, self.experts, self.is_transposed)


class LowBitExperts(nn.Module):
    """Stands for a module of experts whose parameters became layers of their own.

    It is the same object: transformers' module with another class. What else it holds, such as
    biases and the settings of its activation, is where it was, and ``fused_class`` says what it
    was.
    """

    fused_class: type[nn.Module]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(vars(self).get("fused_class"), name, None)
            if found is None:
                raise
            return found.__get__(self) if callable(found) else found

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs, weighted, (tokens, width), as transformers' interface has them.

        Args:
            hidden_states: (tokens, width).
            top_k_index: (tokens, k), the experts of each token.
            top_k_weights: (tokens, k), what each of them counts.
        """
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = self.count(chosen)
        x = hidden_states[order // top_k_index.shape[-1]]
        up = self._project("gate_up_proj" if self.has_gate else "up_proj", x, counts)
        if self.has_bias:
            ids = chosen[order]
            bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
            up = up + bias[ids]
        middle = self._apply_gate(up) if self.has_gate else self.act_fn(up)
        y = self._project("down_proj", middle, counts)
        if self.has_bias:
            y = y + self.down_proj_bias[ids]
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = y * top_k_weights.flatten()[order].unsqueeze(-1)
        y = y[order.argsort()].unflatten(0, top_k_index.shape).sum(1)
        return y.to(hidden_states.dtype)

    def count(self, chosen: Tensor) -> list[int]:
        """The tokens of each expert; the only wait for the device."""
        return torch.bincount(chosen, minlength=self.num_experts).tolist()

    def _project(self, kind: str, x: Tensor, counts: list[int]) -> Tensor:
        weights = getattr(self, kind)
        if isinstance(weights, nn.Module):
            return weights(x, counts)
        matrices = weights if self.is_transposed else weights.mT  # each (in, out)
        return by_expert(x, counts, lambda e, tokens: tokens @ matrices[e], matrices.shape[-1])


def is_experts(module: nn.Module) -> bool:
    """Whether it is known how a module computes with the weights of its experts."""
    return isinstance(module, LowBitExperts) or all(hasattr(module, name) for name in INTERFACE)


def expert_weights(model: nn.Module) -> dict[str, nn.Module]:
    """The weights of experts by the name of their parameter.

    Each is what stands in the parameter's place, or `ExpertWeights` that nothing holds yet.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            for kind in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                weights = getattr(module, kind)
                if not isinstance(weights, nn.Module):
                    weights = ExpertWeights.of(module, kind)
                found[f"{name}.{kind}"] = weights
    return found


def expert_weights_at(model: nn.Module, name: str) -> ExpertWeights | None:
    """Those of the parameter ``name``, which nothing holds yet; None if it is none of experts."""
    owner, _, kind = name.rpartition(".")
    try:
        experts = model.get_submodule(owner)
    except AttributeError:
        return None
    if not is_experts(experts) or not isinstance(getattr(experts, kind, None), nn.Parameter):
        return None
    return ExpertWeights.of(experts, kind)


def put_expert_weights(model: nn.Module, name: str, weights: nn.Module) -> None:
    """Puts ``weights`` in the place of the parameter ``name`` of a module of experts."""
    owner, _, kind = name.rpartition(".")
    experts = model.get_submodule(owner)
    if not isinstance(experts, LowBitExperts):
        vars(experts)["fused_class"] = type(experts)
        experts.__class__ = LowBitExperts
    if isinstance(weights, ExpertWeights):
        weights.make()
    experts._parameters.pop(kind, None)
    setattr(experts, kind, weights)
    # In the order of the forward pass, whichever was read first from a file.
    if last := experts._modules.pop("down_proj", None):
        experts._modules["down_proj"] = last


def set_layer(model: nn.Module, name: str, layer: DowncastLinear) -> None:
    """Puts a low-bit layer in the place of a plain module, or of the weights of experts."""
    if isinstance(layer, DowncastExperts):
        put_expert_weights(model, name, layer)
    else:
        model.set_submodule(name, layer)


def fuse_experts(model: nn.Module) -> None:
    """Makes modules whose weights are all plain again what they were."""
    for module in model.modules():
        if not isinstance(module, LowBitExperts):
            continue
        layers = dict(_layers(module))
        if all(isinstance(layer, ExpertWeights) for layer in layers.values()):
            for kind, layer in layers.items():
                delattr(module, kind)
                fused = cast(ExpertWeights, layer).fused()
                module.register_parameter(kind, nn.Parameter(fused, requires_grad=False))
            module.__class__ = cast(Any, vars(module).pop("fused_class"))
    usual = vars(model).pop("_plain_weight_conversions", None)
    if usual is not None:
        vars(model)["_weight_conversions"] = usual
        keep_apart(model)  # those that stay low-bit


def keep_apart(model: nn.Module) -> None:
    """Tells transformers to save the weights of experts under the names that they have here.

    What it does with those of plain experts comes back with them, see `fuse_experts`.
    """
    names = [
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if isinstance(module, LowBitExperts)
        for kind, _ in _layers(module)
    ]
    if not names:
        return

    def of_these(conversion: Any) -> bool:
        return isinstance(conversion, WeightConverter) and any(
            re.search(p, name) for p in conversion.target_patterns for name in names
        )

    known = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
    usual = getattr(model, "_weight_conversions", None)
    if usual is None:
        usual = [c for c in known if not isinstance(c, PrefixChange)]
    elif not any(map(of_these, usual)):  # loaded from a low-bit base, which needed none of them
        usual = [*usual, *filter(of_these, known)]
    vars(model)["_plain_weight_conversions"] = usual
    vars(model)["_weight_conversions"] = [c for c in usual if not of_these(c)]


@contextmanager
def as_plain(model: nn.Module) -> Iterator[None]:
    """Lets transformers convert names as if all experts of ``model`` were plain."""
    usual = getattr(model, "_plain_weight_conversions", None)
    if usual is None:
        yield
        return
    now = vars(model)["_weight_conversions"]
    vars(model)["_weight_conversions"] = usual
    try:
        yield
    finally:
        vars(model)["_weight_conversions"] = now


def _layers(experts: LowBitExperts) -> Iterator[tuple[str, nn.Module]]:
    for kind in ("gate_up_proj", "up_proj", "down_proj"):
        if kind in experts._modules:
            yield kind, cast(nn.Module, experts._modules[kind])


def fused_elsewhere(model: nn.Module) -> list[str]:
    """3-D parameters of experts in modules of another kind, whose computation is not known."""
    return [
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if not is_experts(module)
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{name}.{kind}"
    ]


def find_experts(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """The weights of experts that ``config.target_parameters`` means, by name of the parameter.

    ``config`` is that of an adapter or of a low-bit base. Raises ValueError for a name that means
    none, or one whose computation is not known. ``exclude_modules``, which may also name what they
    lie in, ``layers_to_transform`` and ``modules_to_save`` are heeded as for modules.
    """
    asked = config.target_parameters
    if not asked:
        return {}
    present = expert_weights(model)
    everything = asked == ALL_EXPERTS
    names = {".".join(name.split(".")[-2:]) for name in present} if everything else set(asked)
    if not names:
        raise ValueError(_no_experts(model, ALL_EXPERTS, present))
    found: dict[str, nn.Module] = {}
    for asked_name in sorted(names):
        some = {n: m for n, m in present.items() if f".{n}".endswith(f".{asked_name}")}
        if not some:
            raise ValueError(_no_experts(model, asked_name, present))
        found |= {n: m for n, m in some.items() if _is_meant(config, n, asked_name)}
    return {name: weights for name, weights in present.items() if name in found}


def _is_meant(config: Any, name: str, asked_name: str) -> bool:
    asked = copy.copy(config)
    asked.target_modules = [asked_name]
    parts = name.split(".")
    inside = [".".join(parts[:i]) for i in range(1, len(parts))]
    excluded = any(is_excluded(config, parent) for parent in inside)
    return not excluded and bool(check_target_module_exists(asked, name))


def _no_experts(model: nn.Module, name: str, present: Collection[str]) -> str:
    start = f"`target_parameters` has {name!r}, but "
    for parameter in fused_elsewhere(model):
        if name == ALL_EXPERTS or f".{parameter}".endswith(f".{name}"):
            owner = model.get_submodule(parameter.rpartition(".")[0])
            return (
                f"{start}`{parameter}` is in a {type(owner).__name__}, which does not say by "
                "transformers' interface for experts how it computes; leave it out"
            )
    if present:
        return f"{start}no weight of experts has this name; one is `{min(present)}`, for example"
    return (
        f"{start}this {type(model).__name__} keeps no weights of experts in one parameter; name "
        "linear layers in `target_modules`"
    )
