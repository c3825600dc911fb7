"""Whether everything that a run trains is saved with its checkpoints and its adapter."""

from __future__ import annotations

from typing import Literal

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_lrqat.shared.words import some


def check_trained_is_saved(model: nn.Module) -> None:
    """ValueError if a trainable parameter of a PEFT model belongs to no adapter.

    PEFT saves adapters and ``modules_to_save``, but not a parameter of the base model that someone
    unfroze: its training would be lost. Other models save all their parameters.
    """
    if not isinstance(model, PeftModel):
        return
    lost = unsaved_parameters(model)
    if not lost:
        return
    inside = [name for name in lost if _is_in_adapter_layer(model, name)]
    modules = sorted({name.split(".")[-2] for name in lost if name not in inside})
    ways = [f"name their modules in the adapter's config, `modules_to_save={modules}`"]
    if inside:
        ways = ["leave their layers out of `target_modules` and name them in `modules_to_save`"]
    raise ValueError(
        f"{some(lost)} are trained, but neither a checkpoint nor the adapter would hold them; "
        f"{ways[0]}, or freeze them with `requires_grad_(False)`"
    )


def unsaved_parameters(model: PeftModel) -> list[str]:
    """The names of trainable parameters that `model.save_pretrained` does not write."""
    state = model.state_dict(keep_vars=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def without_saved(embeddings: bool | Literal["auto"]) -> dict[str, nn.Parameter]:
        saved = {
            id(tensor)
            for adapter in model.peft_config
            for tensor in get_peft_model_state_dict(
                model, state, adapter, save_embedding_layers=embeddings
            ).values()
        }
        return {name: p for name, p in trained.items() if id(p) not in saved}

    lost = without_saved(False)
    # PEFT looks for the base model's config to find out whether embeddings were resized, and then
    # saves them. That may need a hub, so it is asked only where it matters.
    layers = (model.get_input_embeddings(), model.get_output_embeddings()) if lost else ()
    embeddings = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    if any(id(p) in embeddings for p in lost.values()):
        lost = without_saved("auto")
    return list(lost)


def _is_in_adapter_layer(model: nn.Module, name: str) -> bool:
    owners = name.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(owners[:count])), BaseTunerLayer)
        for count in range(1, len(owners) + 1)
    )
