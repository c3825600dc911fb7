"""What decides the frozen integers of a weight: grid, downcast, scales, first ranges."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Self

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ..quant import DOWNCASTS, RANGES, Grid, WeightFormat
from ..quant.grid import SCALE_DTYPES, k_group
from ..shared.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_items,
    check_regex,
)


@dataclass
class WeightSettings:
    """Fields that `LRQATConfig` and `LowBitConfig` share."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        vars(made)["given"] = frozenset(kwargs)
        return made

    @property
    def given_fields(self) -> frozenset[str]:
        """The names of the fields that the maker of this object gave a value."""
        return vars(self)["given"]

    bits: int = field(
        default=4,
        metadata={"help": "Bits per weight, 2 to 8. Default 4; the paper has 4, 3 and 2."},
    )
    group_size: int = field(
        default=-1,
        metadata={
            "help": "Weights of a row that share a scale; it must divide in_features. The default "
            "-1 is one scale for the whole row ('per channel'), as in GPTQ and AWQ "
            "configurations. The paper has -1 and 128."
        },
    )
    symmetric: bool = field(
        default=True,
        metadata={
            "help": "True, the default: signed integers -2^(b-1)..2^(b-1)-1. False: 0..2^b-1 with "
            "an integer zero point per group, which the paper uses at 2 bits."
        },
    )
    balanced: bool = field(
        default=False,
        metadata={
            "help": "Values of half steps: with True each integer stands for the value half a step "
            "above it, so that they lie evenly around 0, at 2 bits -1.5, -0.5, 0.5 and 1.5 steps. "
            "For grids without a zero point."
        },
    )
    k_quant: bool = field(
        default=False,
        metadata={
            "help": "Scales of llama.cpp's K blocks, which store small groups in few bits: whole "
            "numbers up to 15 times one float16 for each 256 weights of a row. Groups of 16 weights"
            " (2 bits; 3, 5 and 6 bits symmetric) or 32, unless `group_size` says more; 256 must "
            "divide in_features. Integers that no K block holds keep plain scales."
        },
    )
    downcast: Literal["fp32", "bf16", "fp16", "fixed8", "int"] = field(
        default="fixed8",
        metadata={
            "help": "How the frozen weight is kept during training. fixed8 (default): 8-bit fixed "
            "point, b integer and 8-b fractional bits (the paper's Q4.4 at 4 bits), 1 byte a "
            "weight. int: rounded integers, densely packed, b/8 bytes a weight. fp32, bf16, fp16: "
            "for reference."
        },
    )
    scale_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16",
        metadata={
            "help": "The scales are trained in float32 and rounded to this dtype in every forward "
            "pass, so storing them in this dtype changes nothing. Default bfloat16, which every "
            "format holds exactly."
        },
    )
    range_estimator: Literal["minmax", "lp"] = field(
        default="lp",
        metadata={
            "help": "First scales. lp (default): a search for the least sum of |error|^range_p in "
            "each group, as in the paper. minmax: the smallest grid that covers every weight."
        },
    )
    range_p: float = field(
        default=4.0,
        metadata={
            "help": "Exponent of range_estimator='lp', 1 to 8. Default 4, and 2 for calibrated "
            "bases; the paper has 2.4 to 5."
        },
    )
    bits_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Bits of single modules, by name, ending of a name or regular expression, like "
            'LoRA\'s rank_pattern: {"down_proj": 4} in a 3-bit model. Default: none.'
        },
    )
    group_size_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Group sizes of single modules, by name like bits_pattern. Default: none."
        },
    )

    embedding_bits: Optional[int] = field(
        default=None,
        metadata={
            "help": "Bits of the input embedding and of the output layer, 4 to 8; where these are "
            "tied, one set of integers and scales serves both. Grouped like other weights. "
            "Left out, they stay as they are."
        },
    )

    def check_weight_settings(self) -> None:
        """Raises ValueError for a field with a value that is not allowed."""
        check_choice("downcast", self.downcast, DOWNCASTS)
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        check_choice("range_estimator", self.range_estimator, RANGES)
        check_flag("symmetric", self.symmetric)
        check_flag("balanced", self.balanced)
        check_flag("k_quant", self.k_quant)
        if self.k_quant and "scale_dtype" not in self.given_fields:
            self.scale_dtype = "float16"
        if self.k_quant and self.scale_dtype != "float16":
            raise ValueError(
                f"`k_quant` has scales in float16, but `scale_dtype` is {self.scale_dtype!r}; "
                "leave one of them out"
            )
        if self.balanced and not self.symmetric:
            raise ValueError(
                "`balanced` grids have no zero point, but `symmetric` is False; leave one of them "
                "out"
            )
        check_bits("bits", self.bits)
        check_group_size("group_size", self.group_size)
        if self.embedding_bits is not None:
            check_bits("embedding_bits", self.embedding_bits, or_none=True, least=4)
        for name, check in (("bits_pattern", check_bits), ("group_size_pattern", check_group_size)):
            for key, value in check_items(name, getattr(self, name), "integers"):
                check(f"{name}[{key!r}]", value)
                check_regex(name, key)
        p = self.range_p
        if isinstance(p, bool) or not isinstance(p, int | float) or not 1 <= p <= 8:
            raise ValueError(f"`range_p` must be 1 to 8, but is {p!r}")

    def set_embedding_bits(self, bits: Mapping[str, int]) -> None:
        """Gives these embeddings their bits by name, unless ``bits_pattern`` names them."""
        for name, width in bits.items():
            if get_pattern_key(self.bits_pattern, name) not in self.bits_pattern:
                self.bits_pattern = {**self.bits_pattern, re.escape(name): width}

    def weight_grid(self, module_name: str) -> Grid:
        """The grid of one target; ValueError if there is none."""
        bits = self.bits_pattern.get(get_pattern_key(self.bits_pattern, module_name), self.bits)
        group_size = self.group_size_pattern.get(
            get_pattern_key(self.group_size_pattern, module_name), self.group_size
        )
        return self.grid_of(bits, group_size)

    def grid_in_words(self) -> str:
        """The grid of most targets, for a card."""
        grid = self.weight_grid("")
        groups = "output channel" if grid.group_size == -1 else f"{grid.group_size} weights"
        blocks = ", as llama.cpp's K blocks hold it" if grid.k_quant else ""
        return f"{grid.kind}, one scale per {groups}{blocks}"

    def exceptions_in_words(self) -> str:
        """The modules with other settings, an item of a list in a card, or nothing."""
        if not self.bits_pattern and not self.group_size_pattern:
            return ""
        sizes = self.group_size_pattern
        return f"\n- by module: bits {self.bits_pattern}, group sizes {sizes}"

    def grid_of(self, bits: int, group_size: int) -> Grid:
        """The grid of integers of a width, in groups of a size; ValueError if there is none."""
        unit = k_group(bits, self.symmetric and not self.balanced) if self.k_quant else None
        return Grid(
            bits=bits,
            symmetric=self.symmetric,
            group_size=unit if unit is not None and group_size == -1 else group_size,
            balanced=self.balanced,
            k_quant=unit is not None,
        )

    def weight_format(self, module_name: str, in_features: int) -> WeightFormat:
        """The format of one target; ValueError with its name if the group size does not fit."""
        try:
            return WeightFormat(
                grid=self.weight_grid(module_name),
                downcast=self.downcast,
                scale_dtype=self.scale_dtype,
                in_features=in_features,
            )
        except ValueError as error:
            raise ValueError(f"`{module_name}`: {error}") from error


def check_bits(name: str, value: object, *, or_none: bool = False, least: int = 2) -> None:
    """An integer from ``least`` to 8."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 8:
        allowed = f"an integer from {least} to 8{', or None' if or_none else ''}"
        raise ValueError(f"`{name}` must be {allowed}, but is {value!r}")


def check_group_size(name: str, value: object) -> None:
    """A positive integer, or -1."""
    if value != -1:
        try:
            check_integer(name, value, 1)
        except ValueError as error:
            raise ValueError(f"{error}; -1 is one group per row") from None


# PEFT trains the outermost modules that end so in full, for tasks other than language modelling.
HEADS = ("classifier", "score", "qa_outputs")
ALL_EXPERTS = "all-experts"


def is_excluded(config: Any, name: str) -> bool:
    """Whether ``exclude_modules`` of a config names a module, as PEFT looks for it."""
    asked = copy.copy(config)
    asked.target_modules, asked.exclude_modules = config.exclude_modules, None
    return bool(config.exclude_modules) and bool(check_target_module_exists(asked, name))


def as_parameter_names(names: Any) -> Any:
    """``target_parameters``: names of parameters, or 'all-experts', also as the only name."""
    if names is None or names in (ALL_EXPERTS, [ALL_EXPERTS]):
        return None if names is None else ALL_EXPERTS
    if not isinstance(names, list | tuple | set) or not all(isinstance(n, str) for n in names):
        raise ValueError(
            f"`target_parameters` must be a list of names of parameters, or {ALL_EXPERTS!r}, but "
            f"is {names!r}"
        )
    return names
