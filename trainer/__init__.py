"""Training of LR-QAT adapters with the transformers Trainer; packed adapters of LoRA training."""

from .arguments import LRQATArguments, LRQATTrainingArguments
from .checkpoint import last_complete_checkpoint
from .comparison import Comparison, compare_models
from .divergence import distillation_loss
from .figures import LRQATCallback
from .loraquant_callback import LoRAQuantCallback
from .optimizer import LRQATOptimizerFactory, clip_by_group, parameter_groups
from .trainer import LRQATTrainer, LRQATTrainerMixin


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
