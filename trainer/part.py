"""The base class of the parts that `LRQATTrainerMixin` is composed of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from peft_lrqat.lrqat.config import LRQATConfig

from .arguments import LRQATTrainingArguments


if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class TrainerPart(Base):
    """One concern of a trainer, with its own state.

    Every method that overrides one of the Trainer's calls ``super()``: the call goes through the
    parts in their order, and then to the trainer that the mixin is put before. A part sets its
    state before it calls ``super().__init__``, because the trainer calls the parts while it is
    being built.
    """

    args: LRQATTrainingArguments  # or another trainer's arguments after `LRQATArguments`
    model: PeftModel
    teacher: nn.Module | None  # set by `Distillation`
    _trial: Any  # of a hyperparameter search; set by `WholeCheckpoints`

    def lrqat_config(self) -> LRQATConfig:
        """The config of the active adapter."""
        model = self.accelerator.unwrap_model(self.model)
        return model.peft_config[model.active_adapters[0]]
