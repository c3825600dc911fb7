"""Options that several commands share, each with its help told once."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from peft_lrqat.lrqat.config import LRQATConfig
from peft_lrqat.shared.config import AdapterConfig

from .fields import config_values, options_of


DATASET_HELP = (
    "text files, a directory with a data set, or a data set on the Hub as `name` or `name:config`"
)


@dataclass(kw_only=True)
class ModelOptions:
    """Which base model is loaded, and in which dtype."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "base model: a directory or a name on the Hub. Without it: the one that the "
            "adapter names"
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the base model; auto: the dtype of its files"}
    )


@dataclass(kw_only=True)
class WindowOptions:
    """How perplexity is measured."""

    window: int = field(
        default=512,
        metadata={"help": "tokens that the model sees at once; perplexity depends on it"},
    )


@dataclass(kw_only=True)
class HeldOutOptions:
    """Which part of ``--dataset`` models are measured on, and in which windows."""

    split: str = field(default="test", metadata={"help": "split of --dataset, if it has several"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    window: int | None = field(
        default=None,
        metadata={
            "help": "tokens that the model sees at once; perplexity depends on it. Default: the "
            "length of the examples that an adapter was trained on, where it says so, else 512"
        },
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "tokens from one window to the next. Without it, windows do not overlap, and "
            "an incomplete last window is dropped. Smaller than --window: every token but the "
            "first is scored once, with more context"
        },
    )
    batch_size: int = field(default=8, metadata={"help": "windows in a forward pass"})


@dataclass(kw_only=True)
class SourceOptions:
    """Which version and which folder of the adapter SOURCE is read."""

    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of SOURCE on the Hub"}
    )
    subfolder: str | None = field(
        default=None, metadata={"help": "folder inside SOURCE that holds the adapter"}
    )


@dataclass(kw_only=True)
class JsonOptions:
    """How the result is printed."""

    json: bool = field(default=False, metadata={"help": "print one JSON object, with all digits"})


# Fields that the library fills in, or that matter only when an adapter is loaded.
NOT_FOR_TRAINING = {
    "base_dtype",
    "base_dtype_pattern",
    "base_made_from",
    "packed_factors",
    "training_record",
    "base_dtype_found",
    "verify_base",
}
AdapterArguments = options_of(
    LRQATConfig,
    "AdapterArguments",
    "LR-QAT adapter",
    NOT_FOR_TRAINING | {inherited.name for inherited in dataclasses.fields(AdapterConfig)},
)


def adapter_config(options: Any, given: Collection[str] | None = None) -> LRQATConfig:
    """`LRQATConfig` for a causal language model from the parsed `AdapterArguments`.

    ``given``: the options that the user named; a low-bit base decides the others. None: all.
    """
    values = config_values(options)
    if given is not None:
        values = {n: v for n, v in values.items() if n in given or n == "target_modules"}
    return LRQATConfig(task_type="CAUSAL_LM", **values)
