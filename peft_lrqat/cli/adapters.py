"""`lrqat quantize-adapter` and `lrqat dequantize-adapter`: factors to a few bits, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers.utils import logging

from peft_lrqat.hub import push_folder_to_hub
from peft_lrqat.loraquant import (
    LoRAQuantConfig,
    adapter_to_gguf,
    dequantize_adapter,
    quantize_adapter,
)
from peft_lrqat.shared.plotting import require_matplotlib
from peft_lrqat.shared.staging import check_target
from peft_lrqat.shared.words import some
from peft_lrqat.trainer.data import load_tokens
from peft_lrqat.trainer.metrics import check_window, evaluate_perplexity
from peft_lrqat.trainer.pipeline import load_adapter
from peft_lrqat.trainer.tokenizers import load_tokenizer

from .fields import escaped, given_names
from .options import JsonOptions, SourceOptions, WindowOptions
from .parser import Parser, print_columns, print_table


logger = logging.get_logger(__name__)
LARGE_ERROR = 0.5  # of the product of the factors, relative
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
    sweep: list[float] | None = field(
        default=None,
        metadata={
            "help": "several --average_bits: TARGET then holds a folder for each, and a plot. Best "
            "with --dataset"
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
    format: Literal["peft", "gguf"] = field(
        default="peft",
        metadata={"help": "gguf: a file for llama.cpp, also of an adapter that is not packed"},
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "base model, a directory or a name on the Hub, for --format gguf. Without it: "
            "the one that the adapter names"
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
        "  lrqat quantize-adapter my-lora sweep --sweep 0.75 1 1.5 2.5 --dataset heldout.txt\n"
        "  lrqat quantize-adapter user/my-lora my-lora-small --average_bits 1.5 \\\n"
        "      --push_to_hub user/my-lora-small",
    )
    _add_places(parser, "LoRA or LR-QAT adapter: a directory or a name on the Hub")
    recipe, options, places = parser.parse(argv)
    where = {"revision": options.revision, "subfolder": options.subfolder}
    with parser.user_errors():
        check_target(places.target)  # before perplexity is measured
        if options.sweep is not None:
            _check_sweep(options, given_names(parser.words))
        config = LoRAQuantConfig(**dataclasses.asdict(recipe))
        recipes = {b: dataclasses.replace(config, average_bits=b) for b in options.sweep or ()}
        live = _load_live(places.source, where, options)
    known = live.measure() if live else {}
    if options.sweep is None:
        report = _quantize(parser, places, places.target, config, live, known, where)
        if options.push_to_hub:
            with parser.user_errors():
                push_folder_to_hub(places.target, options.push_to_hub)
        if options.json:
            print(json.dumps(vars(places) | dataclasses.asdict(recipe) | report))
            return 0
        print_table(_describe(report))
        print(f"adapter saved in {places.target}")
        return 0
    rows: dict[float, dict[str, Any]] = {}
    for bits, at in recipes.items():
        folder = str(Path(places.target) / f"{bits:g}-bits")
        rows[bits] = _quantize(parser, places, folder, at, live, known, where)
    plot_sweep(rows, str(Path(places.target) / "sweep.png"))
    if options.json:
        print(json.dumps(vars(places) | {"sweep": [{"bits": b} | r for b, r in rows.items()]}))
        return 0
    _print_sweep(rows)
    print(f"adapters and sweep.png saved in {places.target}")
    return 0


def _check_sweep(options: Any, given: set[str]) -> None:
    require_matplotlib()
    if wrong := sorted(given & {"average_bits", "push_to_hub"}):
        raise ValueError(f"--sweep writes several adapters, so --{wrong[0]} does not go with it")
    if len(set(options.sweep)) < len(options.sweep):
        raise ValueError("--sweep names a number of bits twice")


def _quantize(
    parser: Parser,
    places: Any,
    target: str,
    config: LoRAQuantConfig,
    live: _Live | None,
    known: dict[str, float],
    where: dict[str, Any],
) -> dict[str, Any]:
    """Writes one packed adapter; its report, with what it keeps of the adapter's gain."""
    with parser.user_errors():
        # Only the integers of LR-QAT need the model. Others come from files, in their own dtype.
        if live and live.model.active_peft_config.peft_type == "LRQAT":
            made = quantize_adapter(live.model, target, config)
        else:
            made = quantize_adapter(places.source, target, config, **where)
    is_lora = isinstance(made, LoRAQuantConfig)
    report = dict((made.report if is_lora else (made.packed_factors or {})["report"]) or {})
    if live and known:
        found: dict[str, Any] = {
            **known,
            "perplexity": live.with_adapter(target).perplexity(),
        }
        if "perplexity_without" in known:
            found["gain_kept"] = gain_kept(**found)
        report |= found
        if is_lora:  # also into the card
            made.report = report
            made.save_pretrained(target)
    _warn(report, target)
    return report


def gain_kept(
    *, perplexity_without: float, perplexity_before: float, perplexity: float
) -> float | None:
    """The share of an adapter's gain that is left once it is packed; None if it gains nothing.

    In nats per token: ``log(without / packed) / log(without / before)``. Over 1 is better than the
    adapter, under 0 worse than none.
    """
    gain = math.log(perplexity_without / perplexity_before)
    return math.log(perplexity_without / perplexity) / gain if gain > 0 else None


def _warn(report: dict[str, Any], target: str) -> None:
    """Says what is lost: modules that became zero, and factors that are far off."""
    errors: dict[str, float] = report["relative_error_of_modules"]
    if zero := [name for name, error in errors.items() if error >= 1]:
        logger.warning(
            f"{target}: {len(zero)} of {len(errors)} modules are stored as zero, such as "
            f"{some(zero)}; give more bits"
        )
    elif report["relative_error"] > LARGE_ERROR:
        logger.warning(
            f"{target}: the factors' product is off by {report['relative_error']:.0%}; measure it "
            "with --dataset, or give more bits"
        )


def plot_sweep(rows: dict[float, dict[str, Any]], file: str) -> None:
    """Perplexity by bits where it was measured, else the relative error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bits = [row["bits_per_parameter"] for row in rows.values()]
    first = next(iter(rows.values()))
    key = "perplexity" if "perplexity" in first else "relative_error"
    values = [row[key] for row in rows.values()]
    axes.plot(bits, values, marker="o", label="packed")
    for x, y in zip(bits, values, strict=True):
        axes.annotate(f"{y:.4g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    for name, style in (("perplexity_before", "--"), ("perplexity_without", ":")):
        if name in first:
            label = "adapter" if name.endswith("before") else "without adapter"
            axes.axhline(first[name], linestyle=style, color="gray", label=label)
    axes.set(xlabel="bits per parameter of the adapter, as stored", ylabel=key.replace("_", " "))
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def _print_sweep(rows: dict[float, dict[str, Any]]) -> None:
    measured = all("perplexity" in row for row in rows.values())
    header = ["bits asked", "codes and scales", "as stored", "bytes", "relative error"]
    header += ["perplexity", "gain kept"] if measured else []
    table = []
    for bits, row in rows.items():
        cells = [
            f"{bits:g}",
            f"{row['nominal_bits_per_parameter']:.3f}",
            f"{row['bits_per_parameter']:.3f}",
            f"{row['bytes']:,}",
            f"{row['relative_error']:.4f}",
        ]
        if measured:
            cells += [f"{row['perplexity']:.3f}", _percent(row.get("gain_kept"))]
        table.append(cells)
    print_columns(header, table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


@dataclass(frozen=True, kw_only=True)
class _Live:
    """A base model with an adapter, and the text on which it is measured."""

    model: Any
    base: str
    tokens: Tensor | None
    window: int

    def measure(self) -> dict[str, float]:
        """Perplexity with the adapter, and without where that is the plain model; empty without a
        text.
        """
        if self.tokens is None:
            return {}
        found = {"perplexity_before": self.perplexity()}
        # Without its factors, an LR-QAT model is not the plain one.
        if self.model.active_peft_config.peft_type != "LRQAT":
            with self.model.disable_adapter():
                found["perplexity_without"] = self.perplexity()
        return found

    def perplexity(self) -> float:
        """With the adapter as it is, on the text, which must be there."""
        assert self.tokens is not None
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
        if "perplexity_without" in report:
            rows["perplexity without the adapter"] = f"{report['perplexity_without']:.3f}"
        rows["perplexity before"] = f"{report['perplexity_before']:.3f}"
        rows["perplexity after"] = f"{report['perplexity']:.3f}"
        if "gain_kept" in report:
            rows["share of the adapter's gain that is kept"] = _percent(report["gain_kept"])
    return rows


def run_dequantize_adapter(argv: Sequence[str]) -> int:
    """`lrqat dequantize-adapter`."""
    parser = Parser(
        "dequantize-adapter",
        "SOURCE TARGET [options]",
        [DequantizeArguments],
        "Turns an adapter with packed factors into a standard LoRA (or LR-QAT) adapter, for\n"
        "servers and converters that do not read packed ones, or into a GGUF file for llama.cpp.",
        "  lrqat dequantize-adapter my-lora-2bit my-lora-again\n"
        "  lrqat dequantize-adapter my-lora-2bit my-lora-gguf --format gguf\n"
        "  lrqat dequantize-adapter user/my-lora-2bit my-lora-again --dtype bfloat16",
    )
    _add_places(parser, "adapter with packed factors: a directory or a name on the Hub")
    options, places = parser.parse(argv)
    where = {"revision": options.revision, "subfolder": options.subfolder}
    with parser.user_errors():
        if options.format == "gguf":
            return _to_gguf(options, places, where)
        if options.model is not None:
            raise ValueError("--model changes nothing without --format gguf; add that")
        dtype = options.dtype and getattr(torch, options.dtype)
        made = dequantize_adapter(places.source, places.target, dtype=dtype, **where)
    size = (Path(places.target) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    dtype = options.dtype or ("float32" if made.peft_type == "LRQAT" else "float16")
    if options.json:
        print(json.dumps(vars(places) | {"dtype": dtype, "bytes": size}))
        return 0
    print_table({"dtype of the factors": dtype, "bytes of the file": f"{size:,}"})
    print(f"adapter saved in {places.target}")
    return 0


def _to_gguf(options: DequantizeArguments, places: Any, where: dict[str, Any]) -> int:
    if options.dtype is not None:
        raise ValueError("--dtype does not go with --format gguf, which is exact in float16 or 32")
    file = adapter_to_gguf(places.source, places.target, base=options.model, **where)
    size = file.stat().st_size
    if options.json:
        print(json.dumps(vars(places) | {"file": str(file), "bytes": size}))
        return 0
    print_table({"bytes of the file": f"{size:,}"})
    print(f"adapter saved in {file}; llama.cpp takes it with --lora")
    return 0


def _add_places(parser: Parser, source: str) -> None:
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument(
        "target", metavar="TARGET", help="directory to create; an existing one is not overwritten"
    )
