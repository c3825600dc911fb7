"""One warning for an optimizer that trains the scales at the rate of the factors."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from .layer import LRQATLayer


logger = logging.get_logger(__name__)


class OneRateWarning:
    """Looks at each optimizer once, right before its first step, until it has warned.

    A plain ``Trainer`` puts all parameters into one group. A step that is right for a factor, whose
    unit is a step of the grid, is about as long as a scale. Nobody asks the model how it is
    trained, so that the optimizer's step is the first place where this can be seen.
    """

    def __init__(self) -> None:
        self._models: WeakSet[nn.Module] = WeakSet()
        self._seen: WeakSet[Optimizer] = WeakSet()
        self._hook: RemovableHandle | None = None
        self._said = False

    def watch(self, model: nn.Module) -> None:
        """From now on, warns if this model's scales and factors are trained at one rate."""
        self._models.add(model)
        if self._hook is None and not self._said:
            self._hook = register_optimizer_step_pre_hook(self._look)

    def _look(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer in self._seen:
            return
        self._seen.add(optimizer)
        layers = [m for model in self._models for m in model.modules() if isinstance(m, LRQATLayer)]
        scales = {id(p) for layer in layers for p in layer.lrqat_scale.parameters()}
        factors = {id(p) for layer in layers for p in layer.lrqat_B.parameters()}
        for group in optimizer.param_groups:
            members = {id(p) for p in group["params"] if p.requires_grad}
            if members & scales and members & factors:
                self._warn(float(group.get("initial_lr", group["lr"])))
                return

    def _warn(self, rate: float) -> None:
        self._said = True
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        logger.warning(
            f"the optimizer trains the scales of LR-QAT at the learning rate of its factors, "
            f"{rate:.3g}; a rate that is right for one of them is about fifty times too high or "
            "too low for the other. Use LRQATTrainer with LRQATTrainingArguments, whose "
            "`scale_learning_rate` is for the scales; or, with another Trainer, "
            "`TrainingArguments(..., max_grad_norm=0)` and "
            "`Trainer(..., optimizer_cls_and_kwargs=(LRQATOptimizerFactory, "
            '{"lr": 5e-3, "scale_lr": 1e-4, "max_grad_norm": 1.0}))`, which clips each group by '
            "itself; or, in a loop of your own, "
            "`AdamW(parameter_groups(model, lr=5e-3, scale_lr=1e-4))`; both are in "
            "`peft_lrqat.trainer`"
        )


one_rate = OneRateWarning()
