"""Training arguments of LR-QAT: what differs from transformers' defaults, and the rates, decay and distillation that are new."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

from transformers import TrainingArguments

from .optimizer import check_rates


# Optimizers of transformers that make their own parameter groups, by the beginning of their names.
OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")


@dataclass(kw_only=True)
class LRQATArguments:
    """The fields of LR-QAT alone, to be put before any trainer's own arguments.

    The defaults are the paper's (LR-QAT, section 5: AdamW with betas 0.9 and 0.95, no weight decay, gradient norm clipped at 1,
    linear schedule with 10% warm-up), but for the rates: 1e-3 and 1e-5 there, for 10^4 steps and gamma = 1/32; 5e-3 and 1e-4
    here, which reached lower perplexities in runs of up to some hundred steps with gamma = 1. And each group is clipped by
    itself, see :func:`.optimizer.clip_by_group`.

    Example:
        ```py
        @dataclass(kw_only=True)
        class LRQATDPOConfig(LRQATArguments, DPOConfig): ...


        class LRQATDPOTrainer(LRQATTrainerMixin, DPOTrainer): ...
        ```
    """

    learning_rate: float = field(
        default=5e-3,
        metadata={
            "help": "peak learning rate of the factors A and B, and of what is trained in full"
        },
    )
    A_learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "peak learning rate of the factors A; left out: --learning_rate"},
    )
    B_learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "peak learning rate of the factors B; left out: --learning_rate"},
    )
    scale_learning_rate: float = field(
        default=1e-4, metadata={"help": "peak learning rate of the scales"}
    )
    scale_weight_decay: float = field(
        default=0.0,
        metadata={"help": "weight decay of the scales; --weight_decay is that of all others"},
    )
    adam_beta2: float = field(
        default=0.95, metadata={"help": "decay rate of AdamW's second moment"}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "steps of linear warm-up; below 1: their share of all steps"}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "steps between two logs; below 1: share of all steps"}
    )
    factor_max_grad_norm: float = field(
        default=0.01,
        metadata={
            "help": "norm to which the gradients of A and of B are clipped, each by itself; --max_grad_norm is that of the scales"
            " and of all else, and 0 there clips nothing at all"
        },
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "share of the loss, 0 to 1, that is the divergence from the unquantised model's predictions; the rest is the"
            " task's own loss. Above 0 a frozen copy of the base model is kept in memory"
        },
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "both models' logits are divided by it for the divergence"}
    )

    def __post_init__(self) -> None:
        check_rates(
            {
                "learning_rate": self.learning_rate,
                "A_learning_rate": self.A_learning_rate,
                "B_learning_rate": self.B_learning_rate,
                "scale_learning_rate": self.scale_learning_rate,
            }
        )
        if not 0 <= self.scale_weight_decay < math.inf:
            raise ValueError(
                f"`scale_weight_decay` must be at least 0, but is {self.scale_weight_decay}"
            )
        if not self.factor_max_grad_norm > 0:
            raise ValueError(
                f"`factor_max_grad_norm` must be above 0, but is {self.factor_max_grad_norm}; `max_grad_norm=0` clips nothing"
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(
                f"`distillation_weight` is a share of the loss, 0 to 1, but is {self.distillation_weight}"
            )
        if not 0 < self.distillation_temperature < math.inf:
            raise ValueError(
                f"`distillation_temperature` must be above 0, but is {self.distillation_temperature}"
            )
        super().__post_init__()
        if self.optim.value.startswith(OWN_GROUPS):
            raise ValueError(
                f"`optim` {self.optim.value!r} makes its own parameter groups, so that the scales cannot have a learning rate of "
                "their own; choose another one, such as 'adamw_torch'"
            )


@dataclass(kw_only=True)
class LRQATTrainingArguments(LRQATArguments, TrainingArguments):
    """`TrainingArguments` with the defaults of LR-QAT, learning rates of their own for A, B and the scales, and distillation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Pinned memory serves accelerators; asked for on a CPU it only makes PyTorch warn.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
