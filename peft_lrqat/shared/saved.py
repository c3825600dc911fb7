"""Whether everything that is trained is saved with the adapters of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .words import some


def check_trained_is_saved(
    model: nn.Module,
    state: Mapping[str, Tensor] | None = None,
    embeddings: bool | Literal["auto"] = "auto",
) -> None:
    """ValueError if a trainable parameter of a model with adapters belongs to none of them.

    PEFT saves adapters and ``modules_to_save``, but not a parameter of the base model that someone
    unfroze: its training would be lost. Other models save all their parameters. ``state`` and
    ``embeddings`` are what ``save_pretrained`` gets.
    """
    if not getattr(model, "peft_config", None):
        return
    lost = unsaved_parameters(model, state, embeddings)
    if not lost:
        return
    inside = [name for name in lost if _is_in_adapter_layer(model, name)]
    modules = sorted({name.split(".")[-2] for name in lost if name not in inside})
    ways = [f"name their modules in the adapter's config, `modules_to_save={modules}`"]
    if inside:
        ways = ["leave their layers out of `target_modules` and name them in `modules_to_save`"]
    raise ValueError(
        f"{some(lost)} are trained, but neither a checkpoint nor the adapter would hold them; "
        f"{ways[0]}, or freeze them with `requires_grad_(False)` (and save them yourself, if they "
        "were trained already)"
    )


def unsaved_parameters(
    model: Any,
    state: Mapping[str, Tensor] | None = None,
    embeddings: bool | Literal["auto"] = "auto",
) -> list[str]:
    """The names of trainable parameters that `model.save_pretrained` does not write."""
    tensors = model.state_dict(keep_vars=True) if state is None else state
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name in tensors]

    def without_saved(embeddings: bool | Literal["auto"]) -> list[str]:
        saved = {
            id(tensor)
            for adapter in model.peft_config
            for tensor in get_peft_model_state_dict(
                model, tensors, adapter, save_embedding_layers=embeddings
            ).values()
        }
        return [name for name in trained if id(tensors[name]) not in saved]

    lost = without_saved(embeddings is True)
    if embeddings != "auto" or not lost:
        return lost
    # PEFT looks for the base model's config to find out whether embeddings were resized, and then
    # saves them. That may need a hub, so it is asked only where it matters.
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    if any(id(model.get_parameter(name)) in own for name in lost):
        lost = without_saved("auto")
    return lost


def _is_in_adapter_layer(model: nn.Module, name: str) -> bool:
    owners = name.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(owners[:count])), BaseTunerLayer)
        for count in range(1, len(owners) + 1)
    )
