"""Training arguments of LR-QAT: new rates, decay and distillation, and changed defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Optional

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from peft_lrqat.shared.checks import check_choice
from peft_lrqat.shared.fields import listed_in_help

from .rates import check_rates


# How the names of transformers' optimizers begin that make their own parameter groups.
OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")


# Any trainer's arguments may follow in the order of base classes.
if TYPE_CHECKING:
    Base = TrainingArguments
else:
    Base = object


@dataclass(kw_only=True)
class LRQATArguments(Base):
    """The fields of LR-QAT alone; put them before any trainer's own arguments.

    The defaults are the paper's (LR-QAT, section 5: AdamW with betas 0.9 and 0.95, no weight decay,
    gradient norm clipped at 1, linear schedule with 10% warm-up), except for the rates: the paper
    has 1e-3 and 1e-5, for 10^4 steps and gamma = 1/32; here they are 5e-3 and 1e-4, which reached
    lower perplexities in runs of up to some hundred steps with gamma = 1. Each group is clipped by
    itself, see `clip_by_group`.

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
            "help": "peak learning rate of the factors A and B, and of everything trained in full"
        },
    )
    A_learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "peak learning rate of the factors A; default: --learning_rate"},
    )
    B_learning_rate: Optional[float] = field(
        default=None,
        metadata={"help": "peak learning rate of the factors B; default: --learning_rate"},
    )
    scale_learning_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "peak learning rate of the scales; default: 1e-4, or on a calibrated base a"
            " hundredth of their mean"
        },
    )
    scale_weight_decay: float = field(
        default=0.0,
        metadata={"help": "weight decay of the scales; --weight_decay is for all other parameters"},
    )
    adam_beta2: float = field(
        default=0.95, metadata={"help": "decay rate of AdamW's second moment"}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "steps of linear warm-up; below 1: their share of all steps"}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "steps between two logs; below 1: their share of all steps"}
    )
    factor_max_grad_norm: float = field(
        default=0.01,
        metadata={
            "help": "norm to which the gradients of A and of B are clipped, each by itself;"
            " --max_grad_norm is for the scales and everything else; 0 there clips nothing at all"
        },
    )
    overwrite_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "delete the checkpoints of an earlier run in --output_dir when training starts;"
            " without this, a new run there is refused"
        },
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "share of the loss, 0 to 1, that is the distance from the unquantised model;"
            " the rest is the task's own loss. Above 0, a frozen copy of the base model stays in"
            " memory, unless there is a --distillation_cache"
        },
    )
    distillation_target: Literal["predictions", "hidden_states"] = field(
        default="predictions",
        metadata={
            "help": "what is compared: 'predictions' of tokens, or the last 'hidden_states', which"
            " work with trainers that return no logits"
        },
    )
    distillation_cache: Optional[str] = field(
        default=None,
        metadata={
            "help": "directory that keeps what the unquantised model gives for each text. It is"
            " computed before the first step, and that model is then dropped"
        },
    )
    distillation_top_k: int = field(
        default=64,
        metadata={
            "help": "how many of the most probable tokens --distillation_cache keeps for each"
            " position, with --distillation_target predictions"
        },
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={
            "help": "both models' logits are divided by this before predictions are compared"
        },
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
                f"`factor_max_grad_norm` must be above 0, but is {self.factor_max_grad_norm}; "
                "`max_grad_norm=0` clips nothing"
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(
                "`distillation_weight` is a share of the loss, 0 to 1, but is "
                f"{self.distillation_weight}"
            )
        if not 0 < self.distillation_temperature < math.inf:
            raise ValueError(
                "`distillation_temperature` must be above 0, but is "
                f"{self.distillation_temperature}"
            )
        check_choice(
            "distillation_target", self.distillation_target, ("predictions", "hidden_states")
        )
        if self.distillation_top_k < 1:
            raise ValueError(
                f"`distillation_top_k` must be at least 1, but is {self.distillation_top_k}"
            )
        super().__post_init__()
        optim = OptimizerNames(self.optim).value
        if optim.startswith(OWN_GROUPS):
            raise ValueError(
                f"`optim` {optim!r} makes its own parameter groups, so the scales "
                "cannot have their own learning rate; choose another one, such as 'adamw_torch'"
            )


@listed_in_help
@dataclass(kw_only=True)
class LRQATTrainingArguments(LRQATArguments, TrainingArguments):
    """`TrainingArguments` with the defaults of LR-QAT, its learning rates, and distillation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Pinned memory helps accelerators; on a CPU it only makes PyTorch warn.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
