"""Opens whatever holds a causal language model: a base, an adapter, an export, a GGUF file."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType
from peft.utils import CONFIG_NAME
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_lrqat.formats.table import FORMATS

from .pipeline import find_file, load_adapter, load_base
from .tokenizers import load_tokenizer


GGUF = ".gguf"
# What reading beyond the end, or bytes that mean something else, happens to raise.
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that can be run, in eval mode, with its tokenizer."""

    name: str
    kind: str  # in words
    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: PeftConfig | None  # of an adapter


def open_model(place: str, dtype: str | torch.dtype = "auto", *, base: str | None = None) -> Opened:
    """The causal language model in a directory, in a GGUF file or on the Hub.

    Args:
        place: an adapter (LR-QAT, LoRA, packed), a model, a low-bit base, or an export.
        dtype: of the model that is loaded. A GGUF file or a GPTQ export becomes plain weights.
        base: of an adapter, if it is not the one that the adapter names.

    Raises:
        ValueError: there is no causal language model.
    """
    if is_adapter(place):
        config = PeftConfig.from_pretrained(place)
        check_task(config)
        model = load_adapter(place, base, dtype)
        tokenizer, _ = load_tokenizer(place, model.get_base_model().config.name_or_path)
        kind = f"{getattr(config.peft_type, 'value', config.peft_type)} adapter"
        return Opened(name=place, kind=kind, model=model, tokenizer=tokenizer, config=config)
    if (file := gguf_file(place)) is not None:
        return _open_gguf(place, file, dtype)
    stored = find_config(place)
    method = quant_method(stored)
    if method == "gptq" and Path(place).is_dir():
        return _open_gptq(place, stored.dtype if dtype == "auto" else dtype)
    model, tokenizer = load_base(place, dtype)
    kind = "model" if method is None else f"{method} model"
    return Opened(name=place, kind=kind, model=model.eval(), tokenizer=tokenizer, config=None)


def is_adapter(place: str) -> bool:
    """Whether a directory or repository holds an adapter of PEFT."""
    return not Path(place).is_file() and find_file(place, CONFIG_NAME) is not None


def gguf_file(place: str) -> Path | None:
    """The GGUF file that ``place`` is, or the only one in that directory; None if there is none."""
    path = Path(place)
    if path.is_file() and path.suffix.lower() == GGUF:
        return path
    files = sorted(path.glob(f"*{GGUF}")) if path.is_dir() else []
    if len(files) > 1:
        raise ValueError(
            f"{place} holds {len(files)} GGUF files; name one of them: "
            f"{', '.join(file.name for file in files)}"
        )
    return files[0] if files else None


def check_task(config: PeftConfig) -> None:
    """ValueError for an adapter that does not predict the next token."""
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            "perplexity is measured of causal language models, but the `task_type` of this adapter"
            f" is {config.task_type}; evaluate it in Python with the metric of its task"
        )


def _open_gptq(place: str, dtype: str | torch.dtype | None) -> Opened:
    """A GPTQ checkpoint as plain weights: no reader of it is installed with this package."""
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")
    loaded = FORMATS["gptq"].load(Path(place), PreTrainedModel, found)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = loaded.model.eval()
    return Opened(name=place, kind="gptq model", model=model, tokenizer=tokenizer, config=None)


def read_gguf(file: Path) -> Any:
    """The header of a GGUF file, as gguf's reader has it.

    Raises:
        ImportError: the package gguf is not installed.
        ValueError: it is no GGUF file, or not whole.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ImportError("GGUF files need gguf; run `pip install 'peft-lrqat[export]'`") from error
    try:
        return GGUFReader(file)
    except UNREADABLE as error:
        raise ValueError(
            f"{file} is no GGUF file, or is not whole ({error}); copy or export it again"
        ) from error


def _open_gguf(place: str, file: Path, dtype: str | torch.dtype) -> Opened:
    read_gguf(file)
    folder = str(file.parent)
    own = (file.parent / "config.json").exists()
    # The folder's own config has what a GGUF file does not say; a bare file describes itself.
    options: dict[str, Any] = {"config": AutoConfig.from_pretrained(folder)} if own else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    )
    tokenizer = gguf_tokenizer(file)
    return Opened(
        name=place, kind="GGUF file", model=model.eval(), tokenizer=tokenizer, config=None
    )


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a GGUF file, else the one that the file describes."""
    beside = (file.parent / "tokenizer_config.json").exists()
    options = {} if beside else {"gguf_file": file.name}
    return AutoTokenizer.from_pretrained(str(file.parent), **options)


def find_config(place: str) -> PreTrainedConfig:
    """The configuration of a model; ValueError if there is none."""
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        if (folder := Path(place)).is_dir():
            inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
            hint = f"; adapters lie in its folders {', '.join(inside)}" if inside else ""
            if hint or not (folder / "config.json").exists():
                raise ValueError(
                    f"{place} holds neither an adapter nor a model nor a GGUF file{hint}"
                ) from error
            raise
        raise ValueError(
            f"{place} holds neither an adapter nor a model nor a GGUF file, and no such repository "
            f"can be had from the Hub ({type(error).__name__})"
        ) from error


def quant_method(config: PreTrainedConfig) -> str | None:
    """How the files of a model say that it is quantised; None if they do not."""
    entry: Any = getattr(config, "quantization_config", None)
    if entry is None:
        return None
    method = entry["quant_method"] if isinstance(entry, dict) else entry.quant_method
    return str(getattr(method, "value", method))
