"""LR-QAT and LoRAQuant as PEFT adapter types.

Importing this package registers the types ``LRQAT`` and ``LORAQUANT`` with PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._moved import find_moved_modules
from ._version import __version__
from .base.config import LowBitConfig
from .base.quantizer import register_low_bit
from .base.takeover import load_low_bit
from .hub import override_push_to_hub, push_folder_to_hub, push_to_hub
from .loraquant.card import describe_adapter as describe_loraquant
from .loraquant.config import LoRAQuantConfig
from .loraquant.model import LoRAQuantModel
from .lrqat.card import describe_adapter as describe_lrqat
from .lrqat.config import LRQATConfig
from .lrqat.layer import LRQATLayer, LRQATLinear
from .lrqat.model import LRQATModel
from .lrqat.size import deployed_weight_bytes, target_weight_bytes
from .registration import (
    override_hotswap,
    override_load_adapter,
    override_save_pretrained,
    register,
)
from .shared.adapter_files import sign_adapter
from .shared.hotswap import hotswap_adapter
from .shared.lazy import lazy_names
from .shared.model_files import sign_model


if TYPE_CHECKING:
    from .activations.cache import low_bit_cache
    from .base.bits import choose_bits
    from .base.calibrated import CalibratedStart, calibrate_low_bit
    from .base.prepare import prepare_low_bit
    from .export import export_model, load_quantized, verify_export
    from .loraquant import adapter_to_gguf, dequantize_adapter, quantize_adapter
    from .trainer import (
        LoRAQuantCallback,
        LRQATArguments,
        LRQATCallback,
        LRQATTrainer,
        LRQATTrainerMixin,
        LRQATTrainingArguments,
    )
    from .trainer.data import load_blocks, make_blocks
    from .trainer.metrics import evaluate_perplexity

# Imported when they are first asked for: registering the types takes none of them.
_LAZY = {
    "CalibratedStart": ".base.calibrated",
    "LRQATArguments": ".trainer",
    "LRQATCallback": ".trainer",
    "LRQATTrainer": ".trainer",
    "LRQATTrainerMixin": ".trainer",
    "LRQATTrainingArguments": ".trainer",
    "LoRAQuantCallback": ".trainer",
    "calibrate_low_bit": ".base.calibrated",
    "choose_bits": ".base.bits",
    "adapter_to_gguf": ".loraquant",
    "dequantize_adapter": ".loraquant",
    "evaluate_perplexity": ".trainer.metrics",
    "export_model": ".export",
    "load_blocks": ".trainer.data",
    "load_quantized": ".export",
    "low_bit_cache": ".activations.cache",
    "make_blocks": ".trainer.data",
    "prepare_low_bit": ".base.prepare",
    "quantize_adapter": ".loraquant",
    "verify_export": ".export",
}

__all__ = [
    "CalibratedStart",
    "LRQATArguments",
    "LRQATCallback",
    "LRQATConfig",
    "LRQATLayer",
    "LRQATLinear",
    "LRQATModel",
    "LRQATTrainer",
    "LRQATTrainerMixin",
    "LRQATTrainingArguments",
    "LoRAQuantCallback",
    "LoRAQuantConfig",
    "LoRAQuantModel",
    "LowBitConfig",
    "__version__",
    "adapter_to_gguf",
    "calibrate_low_bit",
    "choose_bits",
    "deployed_weight_bytes",
    "dequantize_adapter",
    "evaluate_perplexity",
    "export_model",
    "hotswap_adapter",
    "load_blocks",
    "load_low_bit",
    "load_quantized",
    "low_bit_cache",
    "make_blocks",
    "prepare_low_bit",
    "push_folder_to_hub",
    "push_to_hub",
    "quantize_adapter",
    "sign_adapter",
    "sign_model",
    "target_weight_bytes",
    "verify_export",
]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, __all__)


find_moved_modules()
register("lrqat", LRQATConfig, LRQATModel, describe_lrqat)
register("loraquant", LoRAQuantConfig, LoRAQuantModel, describe_loraquant)
register_low_bit()
override_push_to_hub()
override_load_adapter()
override_save_pretrained()
override_hotswap()
