"""The configuration of a LORAQUANT adapter: the LoRA it was, the recipe, and what was stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Optional, Union

from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from ..quant.factors.groups import MAX_BITS
from ..quant.factors.storage import FORMAT_VERSION, PackedFormat, check_bits, check_rank
from ..quant.grid import SCALE_DTYPES
from ..shared.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_items,
    check_json,
    check_names,
    check_number,
    check_regex,
)
from ..shared.config import AdapterConfig
from ..shared.fields import helpful_arguments


METHODS = ("residual", "paper")
BIASES = ("none", "all", "lora_only")


@helpful_arguments()
@dataclass
class LoRAQuantConfig(AdapterConfig):
    """Configures LORAQUANT: a trained LoRA adapter whose factors are stored at a few bits.

    The method is LoRAQuant (arXiv 2510.26690). Such an adapter is made from a saved LoRA adapter
    and is for inference. ``bits_high``, ``ratio`` and the other fields of the recipe say how. All
    other fields are taken from the LoRA adapter or filled in by the conversion.

    Example:
        ```py
        from peft import PeftModel
        from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter

        quantize_adapter("my-lora", "my-lora-2bit", LoRAQuantConfig(bits_high=2, ratio=0.9))
        model = PeftModel.from_pretrained(base, "my-lora-2bit")
        ```
    """

    newest_format: ClassVar[int] = FORMAT_VERSION
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    method: Literal["residual", "paper"] = field(
        default="residual",
        metadata={
            "help": "residual (default): quantise each component from what the others leave over, "
            "and give bits to where they lower the error most; small adapters, and those of rank 1 "
            "or 2, are stored as published if that has the lower error. paper: as published, "
            "rounded to nearest and refined by gradient descent."
        },
    )
    bits_high: int = field(
        default=2,
        metadata={
            "help": "Bits of the leading components, 2 to 8; the others have 1. The paper uses 2 "
            "and 3. With method='residual', bits_high and ratio say how much storage the adapter "
            "may take."
        },
    )
    ratio: float = field(
        default=0.9,
        metadata={
            "help": "Leading components are the fewest whose squared singular values reach this "
            "share of the total. The paper uses 0.8 and 0.9."
        },
    )
    average_bits: Optional[float] = field(
        default=None,
        metadata={
            "help": "With method='residual', replaces bits_high and ratio: bits of storage, scales "
            "included, for each parameter of the original factors. Default: not set."
        },
    )
    group_size: int = field(
        default=128,
        metadata={
            "help": "Entries of a component that share a scale; the last group may be shorter."
        },
    )
    scale_dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "How scales are stored."}
    )
    r: int = field(default=8, metadata={"help": "Rank of the LoRA adapter; taken over from it."})
    lora_alpha: float = field(
        default=8,
        metadata={
            "help": "The product of the factors is multiplied by lora_alpha / r; taken over."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Multiplied by lora_alpha / sqrt(r) instead; taken over."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks of single modules, by name or regular expression; taken over."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "lora_alpha of single modules, by name or regular expression; taken over."
        },
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "The modules that the LoRA adapter changes, as names or a regular expression; "
            "taken over."
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Modules that target_modules names, but that stay unchanged; taken over."
        },
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None,
        metadata={
            "help": "Index or indices of the layers that target_modules applies to; taken over."
        },
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Name of the ModuleList that layers_to_transform counts in; taken over."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Other modules that were trained in full and are stored with the adapter; "
            "taken over."
        },
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings were trained and are stored with the adapter; taken "
            "over."
        },
    )
    bias: Literal["none", "all", "lora_only"] = field(
        default="none",
        metadata={"help": "Which biases were trained and are stored with the adapter; taken over."},
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "The adapter has DoRA's magnitudes, which are stored as they are; taken over."
        },
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={
            "help": "As in the LoRA configuration; without effect: each layer knows its own layout."
        },
    )
    component_bits: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "What is stored: for each module the bits of its components, one digit each, "
            "largest first, such as '4421'; filled in by the conversion."
        },
    )
    shapes: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={
            "help": "Outputs and inputs of each module in component_bits; filled in by the "
            "conversion."
        },
    )
    embeddings: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Modules in component_bits that are embeddings; filled in by the conversion."
        },
    )
    zero_points: bool = field(
        default=False,
        metadata={
            "help": "Whether groups above 1 bit have their own integer zero point; filled in by "
            "the conversion."
        },
    )
    report: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Errors and sizes of the conversion, for the model card; filled in by the "
            "conversion, and without effect."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORAQUANT")
        # Codes cannot be trained. For `is_trainable=True` PEFT unsets this, and LoRAQuantModel
        # refuses.
        self.inference_mode = True
        self._check_recipe()
        self._check_lora()
        self._check_filled_in()

    def _check_recipe(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        check_integer("bits_high", self.bits_high, 2)
        if self.bits_high > MAX_BITS:
            raise ValueError(
                f"`bits_high` must be an integer from 2 to {MAX_BITS}, but is {self.bits_high!r}"
            )
        check_integer("group_size", self.group_size, 1)
        check_number("ratio", self.ratio, 1)
        if self.average_bits is not None:
            check_number("average_bits", self.average_bits, MAX_BITS)
            if self.method != "residual":
                raise ValueError(
                    f"`average_bits` needs method='residual', but `method` is {self.method!r}"
                )

    def _check_lora(self) -> None:
        check_integer("r", self.r, 1)
        check_number("lora_alpha", self.lora_alpha)
        check_choice("bias", self.bias, BIASES)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name), one_string=True)
        check_names("modules_to_save", self.modules_to_save, one_string=False)
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "zero_points"):
            check_flag(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in check_items(name, getattr(self, name), "numbers"):
                check_regex(name, key)
                if name == "rank_pattern":
                    check_integer(f"{name}[{key!r}]", value, 1)
                else:
                    check_number(f"{name}[{key!r}]", value)

    def _check_filled_in(self) -> None:
        for module, bits in check_items("component_bits", self.component_bits, "strings of digits"):
            try:
                check_bits(bits)
            except ValueError as error:
                raise ValueError(f"`component_bits` of `{module}`: {error}") from None
            if len(bits) > self.rank_of(module):
                raise ValueError(
                    f"`component_bits` of `{module}` has {len(bits)} components, but its rank is "
                    f"{self.rank_of(module)}; the configuration is damaged"
                )
        for module, shape in check_items("shapes", self.shapes, "[outputs, inputs]"):
            if (
                not isinstance(shape, list | tuple)
                or len(shape) != 2
                or any(type(n) is not int or n < 1 for n in shape)
            ):
                raise ValueError(
                    f"`shapes` of `{module}` must be [outputs, inputs], but is {shape!r}"
                )
            if module in self.component_bits:
                try:
                    check_rank(self.packed_format(module, *shape), self.rank_of(module))
                except ValueError as error:
                    raise ValueError(
                        f"`shapes` of `{module}`: {error}; the configuration is damaged"
                    ) from None
        check_names("embeddings", self.embeddings, one_string=False)
        check_items("report", self.report, "values")
        check_json("report", self.report)

    def rank_of(self, module: str) -> int:
        """Returns the rank that the LoRA adapter has on ``module``."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)

    def scaling_of(self, module: str) -> float:
        """Returns the factor that multiplies the product of ``module``.

        It uses the rank of the LoRA adapter, not the number of components that are left.
        """
        key = get_pattern_key(list(self.alpha_pattern), module)
        alpha = self.alpha_pattern.get(key, self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def packed_format(self, module: str, rows: int, columns: int) -> PackedFormat:
        """Returns how the product of ``module``, of shape (rows, columns), is stored."""
        return PackedFormat(
            bits=self.component_bits[module],
            rows=rows,
            columns=columns,
            group_size=self.group_size,
            scale_dtype=SCALE_DTYPES[self.scale_dtype],
            zero_points=self.zero_points,
        )
