"""`LRQATTrainer`, and the mixin that makes an LR-QAT trainer of any transformers or TRL trainer."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from peft_lrqat.lrqat.layer import LRQATLayer

from .arguments import LRQATArguments, LRQATTrainingArguments
from .checkpoint import WholeCheckpoints
from .distillation import Distillation
from .figures import LRQATCallback
from .finite import FiniteRuns
from .optimizer import GroupedOptimizer
from .rates import usual_scale_rate
from .record import Publishing, TrainingRecord
from .reference import ReferencePolicy
from .sharding import ShardedTraining


class LRQATTrainerMixin(
    GroupedOptimizer,
    Distillation,
    ReferencePolicy,
    TrainingRecord,
    FiniteRuns,
    WholeCheckpoints,
    ShardedTraining,
    Publishing,
):
    """What LR-QAT adds to a trainer.

    Put it first: ``class MyTrainer(LRQATTrainerMixin, DPOTrainer)``.

    - `GroupedOptimizer`: A, B and the scales have their own learning rates, with any optimizer
      that ``args.optim`` names; gradients are clipped group by group.
    - `Distillation`: the loss can include the divergence from the unquantised model.
    - `ReferencePolicy`: in TRL's preference trainers, the reference is the policy at its start.
    - `TrainingRecord`: the adapter's card says how the adapter was trained.
    - `FiniteRuns`: a loss, gradient or parameter that is not finite stops the run and is never
      saved.
    - `WholeCheckpoints`: a checkpoint is there completely or not at all;
      ``resume_from_checkpoint=True`` takes the last complete one.
    - `ShardedTraining`: under FSDP2, adapters are saved whole.
    - `Publishing`: cards that a hub accepts.

    It also logs the figures of `LRQATCallback`. Where two parts override the same method, the
    order above is the order of the calls: parameters are checked before a checkpoint is begun,
    and a checkpoint is published once it is in place.

    Args:
        args: `LRQATTrainingArguments`, or for another trainer its own arguments with
            `LRQATArguments` before them.
        teacher_model: the unquantised model, for ``distillation_weight`` above 0. Without it, the
            model is loaded from where the adapter's config says that the base model came from. It
            takes as much memory as the base model, less what the two share.
    """

    def __init__(
        self, *args: Any, teacher_model: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LRQATArguments):
            raise ValueError(
                "`args` must be LRQATTrainingArguments, but is "
                f"{type(self.args).__name__}; for another trainer, put LRQATArguments before that "
                "trainer's own arguments: `class MyConfig(LRQATArguments, DPOConfig)`"
            )
        if not isinstance(self.model, PeftModel) or not any(
            isinstance(module, LRQATLayer) for module in self.model.modules()
        ):
            raise ValueError(
                f"the model ({type(self.model).__name__}) has no LR-QAT layers; wrap it first: "
                "`model = get_peft_model(model, LRQATConfig(target_modules='all-linear'))`"
            )
        if self.args.scale_learning_rate is None:
            # A copy, so that the user's arguments may serve for another model.
            self.args = copy.copy(self.args)
            self.args.scale_learning_rate = usual_scale_rate(self.model)
        self.add_teacher(teacher_model)
        LRQATCallback.attach(self)


class LRQATTrainer(LRQATTrainerMixin, Trainer):
    """`transformers.Trainer` for LR-QAT: takes `LRQATTrainingArguments`, and otherwise what a
    Trainer takes.

    Example:
        ```py
        config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", bits=3)
        args = LRQATTrainingArguments("out", max_steps=1000, scale_learning_rate=1e-4)
        trainer = LRQATTrainer(get_peft_model(model, config), args, train_dataset=dataset)
        trainer.train()
        ```
    """

    args: LRQATTrainingArguments
