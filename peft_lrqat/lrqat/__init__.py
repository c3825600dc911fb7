"""LR-QAT (arXiv 2406.06385) as a PEFT adapter type."""

from .config import LRQATConfig
from .layer import LRQATLayer, LRQATLinear
from .model import LRQATModel


__all__ = ["LRQATConfig", "LRQATLayer", "LRQATLinear", "LRQATModel"]
