"""Everything that a deployed model is made of, by its names in the plain base model."""

from __future__ import annotations

from collections.abc import Iterator

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..base.downcast import DowncastLinear
from ..base.embedding import TiedHead
from ..lrqat.layer import LRQATLayer
from .linears import Layer, Model, base_of, frozen_of


def model_tensors(model: Model, adapter_name: str) -> Iterator[tuple[str, Tensor | Layer]]:
    """The names and tensors of the deployed model, one after another.

    The weight of a target comes as its layer under the module's name. Everything else comes as
    tensors: biases, embeddings, norms, buffers, and the trained copies of ``modules_to_save``.
    Tensors that are tied to an earlier one are left out, as transformers does, unless training
    parted the head from the embeddings (`is_parted`).
    """
    parted = is_parted(model, adapter_name)
    seen: set[int] = set()
    for plain, module in plain_modules(base_of(model), adapter_name):
        if isinstance(module, LRQATLayer | DowncastLinear):
            yield plain, module
            if (bias := frozen_of(module).bias) is not None:
                yield f"{plain}.bias", bias.detach()
            continue
        not_saved = module._non_persistent_buffers_set
        buffers = {name: b for name, b in module._buffers.items() if name not in not_saved}
        for kind, tensor in {**module._parameters, **buffers}.items():
            if tensor is None or (not parted and id(tensor) in seen):
                continue
            seen.add(id(tensor))
            yield f"{plain}.{kind}" if plain else kind, tensor.detach()


def is_parted(model: Model, adapter_name: str) -> bool:
    """Whether training a copy of the head, or of the embeddings, parted what the config ties.

    transformers must then tie nothing, and the files need a tensor under every name.
    """
    base = base_of(model)
    # Vision models have no such field.
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return False
    modules = [module for _, module in plain_modules(base, adapter_name)]
    if any(isinstance(module, TiedHead) for module in modules):
        return False
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if ends[0] is None or ends[1] is None:
        return False
    weights: list[int | None] = []
    for end in ends:
        inside = {id(module) for module in end.modules()}
        running = (module for module in modules if id(module) in inside)
        weights += [next((id(m.weight) for m in running if hasattr(m, "weight")), None)]
    return weights[0] != weights[1]


def plain_linears(model: Model, adapter_name: str) -> list[str]:
    """The names of the linear layers that are not quantised."""
    modules = plain_modules(base_of(model), adapter_name)
    return [name for name, module in modules if isinstance(module, nn.Linear | TiedHead)]


def plain_modules(base: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that run under an adapter, by their names without PEFT's wrappers.

    What lies inside a target is left out: it belongs to the target.
    """
    for name, module in base.named_modules():
        parents = _parents(base, name)
        if any(isinstance(parent, LRQATLayer) for parent in parents):
            continue
        if _is_other_copy(parents, name, adapter_name):
            continue
        if not isinstance(module, ModulesToSaveWrapper):
            yield _plain_name(parents, name), module


def _parents(base: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [base.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]


def _is_other_copy(parents: list[nn.Module], name: str, adapter_name: str) -> bool:
    """Whether a module lies in a copy that ``modules_to_save`` keeps beside the one that runs."""
    parts = name.split(".")
    for i, parent in enumerate(parents, start=1):
        if isinstance(parent, ModulesToSaveWrapper):
            runs = adapter_name in parent.modules_to_save
            own = ["modules_to_save", adapter_name] if runs else ["original_module"]
            rest = parts[i:]
            if rest[: len(own)] != own[: len(rest)]:
                return True
            if len(rest) < len(own):  # the dict of the copies
                return True
    return False


def _plain_name(parents: list[nn.Module], name: str) -> str:
    """The name of a module without the parts that PEFT put into it."""
    plain: list[str] = []
    skip = 0
    parts = name.split(".")
    for i, part in enumerate(parts):
        if skip:
            skip -= 1
            continue
        plain.append(part)
        if i < len(parents) and isinstance(parents[i], ModulesToSaveWrapper):
            skip = 1 if parts[i + 1] == "original_module" else 2
    return ".".join(plain)
