"""`lrqat quantize-adapter` and `lrqat dequantize-adapter`: factors to a few bits, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from peft_lrqat.hub import push_folder_to_hub
from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, quantize_adapter
from peft_lrqat.shared.staging import check_target
from peft_lrqat.trainer.data import load_tokens
from peft_lrqat.trainer.metrics import check_window, evaluate_perplexity
from peft_lrqat.trainer.pipeline import load_adapter
from peft_lrqat.trainer.tokenizers import load_tokenizer

from .options import JsonOptions, SourceOptions, WindowOptions
from .parser import Parser, escaped, print_table


# The fields of `LoRAQuantConfig` that are options here.
RECIPE = ("method", "bits_high", "ratio", "average_bits", "group_size", "scale_dtype")


def _recipe_fields() -> list[tuple[str, Any, dataclasses.Field]]:
    """Name, type and default of each option of the recipe; the help text is the config's own."""
    hints = get_type_hints(LoRAQuantConfig)
    options = {option.name: option for option in dataclasses.fields(LoRAQuantConfig)}
    return [
        (name, hints[name], field(default=options[name].default, metadata=escaped(options[name])))
        for name in RECIPE
    ]


RecipeArguments = dataclasses.make_dataclass(
    "RecipeArguments", _recipe_fields(), namespace={"_argument_group_name": "LORAQUANT recipe"}
)


@dataclass(kw_only=True)
class QuantizeArguments(SourceOptions, WindowOptions, JsonOptions):
    """Where a trained adapter comes from, and where the packed one goes."""

    _argument_group_name = "source and target"

    push_to_hub: str | None = field(
        default=None, metadata={"help": "repository on the Hub to which TARGET is uploaded"}
    )
    dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "text on which perplexity is measured before and after: files, a directory or "
            "a data set on the Hub"
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "base model: a directory or a name on the Hub, for --dataset, and to count "
            "the integers that change under an LR-QAT adapter. Without it: the one that the "
            "adapter names"
        },
    )


@dataclass(kw_only=True)
class DequantizeArguments(SourceOptions, JsonOptions):
    """Where a packed adapter comes from, and how its factors are written."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = field(
        default=None,
        metadata={
            "help": "dtype of the factors in TARGET. Without it: float16, or float32 for LR-QAT"
        },
    )


def run_quantize_adapter(argv: Sequence[str]) -> int:
    """`lrqat quantize-adapter`."""
    parser = Parser(
        "quantize-adapter",
        "SOURCE TARGET [options]",
        [RecipeArguments, QuantizeArguments],
        "Stores the factors of a trained LoRA, DoRA or LR-QAT adapter at a few bits. It needs no\n"
        "data. PEFT loads the result once peft_lrqat is imported; `lrqat dequantize-adapter`\n"
        "turns it back into a standard adapter.",
        "  lrqat quantize-adapter my-lora my-lora-2bit --dataset heldout.txt\n"
        "  lrqat quantize-adapter user/my-lora my-lora-small --average_bits 1.5 \\\n"
        "      --push_to_hub user/my-lora-small",
    )
    _add_places(parser, "LoRA or LR-QAT adapter: a directory or a name on the Hub")
    recipe, options, places = parser.parse(argv)
    where = {"revision": options.revision, "subfolder": options.subfolder}
    with parser.user_errors():
        check_target(places.target)  # before perplexity is measured
        config = LoRAQuantConfig(**dataclasses.asdict(recipe))
        live = _load_live(places.source, where, options)
    before = live.perplexity() if live else None
    with parser.user_errors():
        # Only the integers of LR-QAT need the model. Others come from files, in their own dtype.
        if live and live.model.active_peft_config.peft_type == "LRQAT":
            made = quantize_adapter(live.model, places.target, config)
        else:
            made = quantize_adapter(places.source, places.target, config, **where)
        if options.push_to_hub:
            push_folder_to_hub(places.target, options.push_to_hub)
    report: dict[str, Any] = {}
    if isinstance(made, LoRAQuantConfig):
        report |= made.report or {}
    else:
        report |= (made.packed_factors or {})["report"]
    if live and before is not None:
        after = live.with_adapter(places.target).perplexity()
        report |= {"perplexity_before": before, "perplexity": after}
    if options.json:
        print(json.dumps(vars(places) | dataclasses.asdict(recipe) | report))
    else:
        print_table(_describe(report))
        print(f"adapter saved in {places.target}")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Live:
    """A base model with an adapter, and the text on which it is measured."""

    model: Any
    base: str
    tokens: Tensor | None
    window: int

    def perplexity(self) -> float | None:
        """None without a text."""
        if self.tokens is None:
            return None
        return evaluate_perplexity(self.model, self.tokens, window=self.window)["perplexity"]

    def with_adapter(self, folder: str) -> _Live:
        """The same with another adapter, on a base model of its own."""
        model = load_adapter(folder, self.base, "auto")
        return dataclasses.replace(self, model=model)


def _load_live(source: str, where: dict[str, Any], options: Any) -> _Live | None:
    """The adapter ``source`` on its base model, if the options ask for one."""
    if not options.dataset and not options.model:
        return None
    model = load_adapter(source, options.model, "auto", **where)
    base, tokens = model.config.name_or_path, None
    if options.dataset:
        tokenizer, _ = load_tokenizer(source, base, **where)
        tokens = load_tokens(options.dataset, tokenizer)
        check_window(model, tokens, window=options.window)
    return _Live(model=model, base=base, tokens=tokens, window=options.window)


def _describe(report: dict[str, Any]) -> dict[str, str]:
    """The report of a conversion as rows of a table."""
    rows = {
        "relative error": f"{report['relative_error']:.4f}",
        "bits per parameter, as stored": f"{report['bits_per_parameter']:.3f}",
        "bits per parameter, codes and scales only": f"{report['nominal_bits_per_parameter']:.3f}",
        "bytes of the factors before": f"{report['bytes_before']:,}",
        "bytes of the factors after": f"{report['bytes']:,}",
    }
    if "flipped_integers" in report:
        rows["integers of the weights that change"] = f"{report['flipped_integers']:.2%}"
    if "perplexity" in report:
        rows["perplexity before"] = f"{report['perplexity_before']:.3f}"
        rows["perplexity after"] = f"{report['perplexity']:.3f}"
    return rows


def run_dequantize_adapter(argv: Sequence[str]) -> int:
    """`lrqat dequantize-adapter`."""
    parser = Parser(
        "dequantize-adapter",
        "SOURCE TARGET [options]",
        [DequantizeArguments],
        "Turns an adapter with packed factors into a standard LoRA (or LR-QAT) adapter, for\n"
        "servers and converters that do not read packed ones.",
        "  lrqat dequantize-adapter my-lora-2bit my-lora-again\n"
        "  lrqat dequantize-adapter user/my-lora-2bit my-lora-again --dtype bfloat16",
    )
    _add_places(parser, "adapter with packed factors: a directory or a name on the Hub")
    options, places = parser.parse(argv)
    with parser.user_errors():
        dtype = options.dtype and getattr(torch, options.dtype)
        where = {"revision": options.revision, "subfolder": options.subfolder}
        made = dequantize_adapter(places.source, places.target, dtype=dtype, **where)
    size = (Path(places.target) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    dtype = options.dtype or ("float32" if made.peft_type == "LRQAT" else "float16")
    if options.json:
        print(json.dumps(vars(places) | {"dtype": dtype, "bytes": size}))
        return 0
    print_table({"dtype of the factors": dtype, "bytes of the file": f"{size:,}"})
    print(f"adapter saved in {places.target}")
    return 0


def _add_places(parser: Parser, source: str) -> None:
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument(
        "target", metavar="TARGET", help="directory to create; an existing one is not overwritten"
    )
