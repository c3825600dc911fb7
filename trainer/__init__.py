"""Training LR-QAT adapters with the transformers Trainer."""

from .optimizer import LRQATOptimizerFactory, parameter_groups


__all__ = ["LRQATOptimizerFactory", "parameter_groups"]
