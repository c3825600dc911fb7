"""Options that several commands share, each with its help told once."""

from dataclasses import dataclass, field
from typing import Literal


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
