"""Target layers that a model holds, but that no training step reaches."""

from __future__ import annotations

from torch import nn

from peft_lrqat.lrqat.layer import LRQATLayer


def idle_layers(model: nn.Module) -> list[str]:
    """The names of LR-QAT layers whose active adapter has no gradient after a backward pass.

    Nothing called such a layer or read its weight, or nothing used the result. Empty if no layer
    has a gradient: then gradients are kept elsewhere, as DeepSpeed does.
    """
    reached, idle = False, []
    for name, layer in model.named_modules():
        if not isinstance(layer, LRQATLayer):
            continue
        trained = [
            parameters[adapter]
            for kind in layer.adapter_layer_names
            for parameters in [getattr(layer, kind)]
            for adapter in layer.active_adapters
            if adapter in parameters and parameters[adapter].requires_grad
        ]
        if any(parameter.grad is not None for parameter in trained):
            reached = True
        elif trained:
            idle.append(layer.name or name)
    return idle if reached else []
