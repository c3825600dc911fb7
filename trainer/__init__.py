"""Training of LR-QAT adapters with the transformers Trainer; packed adapters of LoRA training."""

from typing import TYPE_CHECKING

from peft_lrqat.shared.lazy import lazy_names


if TYPE_CHECKING:
    from .arguments import LRQATArguments, LRQATTrainingArguments
    from .checkpoint import last_complete_checkpoint
    from .comparison import Comparison, compare_models
    from .divergence import distillation_loss
    from .figures import LRQATCallback
    from .loraquant_callback import LoRAQuantCallback
    from .optimizer import LRQATOptimizerFactory, clip_by_group, parameter_groups
    from .trainer import LRQATTrainer, LRQATTrainerMixin

# Imported when they are first asked for: a plan takes no Trainer, and no metrics.
_LAZY = {
    "Comparison": ".comparison",
    "LRQATArguments": ".arguments",
    "LRQATCallback": ".figures",
    "LRQATOptimizerFactory": ".optimizer",
    "LRQATTrainer": ".trainer",
    "LRQATTrainerMixin": ".trainer",
    "LRQATTrainingArguments": ".arguments",
    "LoRAQuantCallback": ".loraquant_callback",
    "clip_by_group": ".optimizer",
    "compare_models": ".comparison",
    "distillation_loss": ".divergence",
    "last_complete_checkpoint": ".checkpoint",
    "parameter_groups": ".optimizer",
}

__all__ = [
    "Comparison",
    "LRQATArguments",
    "LRQATCallback",
    "LRQATOptimizerFactory",
    "LRQATTrainer",
    "LRQATTrainerMixin",
    "LRQATTrainingArguments",
    "LoRAQuantCallback",
    "clip_by_group",
    "compare_models",
    "distillation_loss",
    "last_complete_checkpoint",
    "parameter_groups",
]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)
