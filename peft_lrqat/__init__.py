"""LR-QAT and LoRAQuant as PEFT adapter types. Importing this package registers the types ``LRQAT`` and ``LORAQUANT`` with PEFT."""

from ._version import __version__
from .config import LRQATConfig
from .hub import push_folder_to_hub, push_to_hub
from .layer import LRQATLayer, LRQATLinear
from .loraquant import LoRAQuantConfig, LoRAQuantModel
from .model import LRQATModel
from .registration import register
from .size import deployed_weight_bytes, target_weight_bytes


__all__ = [
    "LRQATConfig",
    "LRQATLayer",
    "LRQATLinear",
    "LRQATModel",
    "LoRAQuantConfig",
    "LoRAQuantModel",
    "__version__",
    "deployed_weight_bytes",
    "push_folder_to_hub",
    "push_to_hub",
    "target_weight_bytes",
]

register("lrqat", LRQATConfig, LRQATModel)
register("loraquant", LoRAQuantConfig, LoRAQuantModel)
