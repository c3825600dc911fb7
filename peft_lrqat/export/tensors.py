"""Everything that a deployed model is made of, by its names in the plain base model."""

from __future__ import annotations

from collections.abc import Iterator

from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from ..base.downcast import DowncastLinear
from ..base.embedding import TiedHead
from ..lrqat.layer import LRQATLayer
from .linears import Layer, Model, base_of, frozen_of


# Where a wrapper of trained tokens keeps the embedding. The way to a trained copy is as long.
TOKENS_OF = ["token_adapter", "base_layer"]


def model_tensors(model: Model, adapter_name: str) -> Iterator[tuple[str, Tensor | Layer]]:
    """The names and tensors of the deployed model, one after another.

    The weight of a target comes as its layer under the module's name. Everything else comes as
    tensors: biases, embeddings with their trained tokens, norms, buffers, and the trained copies
    of ``modules_to_save``. Tensors that are tied to an earlier one are left out, as transformers
    does, unless training parted the head from the embeddings (`is_parted`).
    """
    parted = is_parted(model, adapter_name)
    seen: set[int] = set()
    tokens = _trained_tokens(base_of(model), adapter_name)
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
            if kind == "weight" and id(module) in tokens:
                tensor = tokens[id(module)].token_adapter.get_merged_weights([adapter_name])
            yield f"{plain}.{kind}" if plain else kind, tensor.detach()


def _trained_tokens(base: nn.Module, adapter_name: str) -> dict[int, TrainableTokensWrapper]:
    """The wrappers with the adapter's ``trainable_token_indices``, by the id of what they wrap."""
    return {
        id(module.original_module): module
        for module in base.modules()
        if isinstance(module, TrainableTokensWrapper)
        and adapter_name in module.token_adapter.trainable_tokens_delta
    }


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
        if not isinstance(module, AuxiliaryTrainingWrapper):
            yield _plain_name(parents, name), module


def _parents(base: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [base.get_submodule(".".join(parts[:i])) for i in range(1, len(parts))]


def _is_other_copy(parents: list[nn.Module], name: str, adapter_name: str) -> bool:
    """Whether a module lies in a wrapper of PEFT, but not in the copy there that runs."""
    parts = name.split(".")
    for i, parent in enumerate(parents, start=1):
        if isinstance(parent, TrainableTokensWrapper):
            own = TOKENS_OF
        elif isinstance(parent, ModulesToSaveWrapper):
            runs = adapter_name in parent.modules_to_save
            own = ["modules_to_save", adapter_name] if runs else ["original_module"]
        else:
            continue
        if parts[i : i + len(own)] != own:  # another copy, or what holds the copies
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
        if i < len(parents) and isinstance(parents[i], AuxiliaryTrainingWrapper):
            skip = 1 if parts[i + 1] == "original_module" else len(TOKENS_OF)
    return ".".join(plain)
