"""The reference policy of TRL's preference trainers: the policy that training starts from."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from peft_lrqat.lrqat.layer import LRQATLayer

from .part import TrainerPart


NAME = "ref"  # the adapter that TRL's trainers take as their reference


class ReferencePolicy(TrainerPart):
    """Gives a trainer with a reference model the start of the policy as its reference.

    For a model that TRL wraps itself (``peft_config``), the reference would be the model with its
    adapter disabled: with LR-QAT, that is the weight before rounding and not the policy at its
    start. For a model that is wrapped already, TRL makes an adapter ``ref``, but leaves LR-QAT's
    tensors in it as a fresh adapter has them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._reference: Any = self  # the trainer has not said yet
        super().__init__(*args, **kwargs)

    @property
    def ref_model(self) -> nn.Module | None:
        """The trainer's reference model; None if the policy's model serves as reference, too."""
        if self._reference is self:
            raise AttributeError(f"{type(self).__name__} has no reference model")
        return self._reference

    @ref_model.setter
    def ref_model(self, value: nn.Module | None) -> None:
        # TRL sets it while the trainer is built, once the model is wrapped and before anything is
        # computed with the reference.
        self._reference = value
        has_layers = isinstance(self.model, PeftModel) and any(
            isinstance(module, LRQATLayer) for module in self.model.modules()
        )
        if value is None and has_layers and getattr(self, "beta", True):
            self._add_reference(self.model)

    def _add_reference(self, model: PeftModel) -> None:
        """Makes, or completes, the adapter ``ref``; it is frozen, and saved with checkpoints."""
        policy = model.active_adapters[0]
        if NAME not in model.peft_config:
            device = next(model.parameters()).device
            # The random numbers that follow are those of a model that was wrapped before.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                model.add_adapter(NAME, model.peft_config[policy])
        copy_adapter(model, policy, NAME)


@torch.no_grad()
def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Copies the parameters of one adapter into another one with the same settings."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if source in parts:
            parts[len(parts) - 1 - parts[::-1].index(source)] = target
            if (other := parameters.get(".".join(parts))) is not None:
                other.copy_(parameter)
