"""`lrqat quantize-adapter` and `lrqat dequantize-adapter`: factors at a few bits, and back."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType

from peft_lrqat.hub import push_folder_to_hub
from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, quantize_adapter
from peft_lrqat.shared.staging import check_target
from peft_lrqat.trainer.data import load_tokens
from peft_lrqat.trainer.metrics import check_window, evaluate_perplexity
from peft_lrqat.trainer.pipeline import load_base

from .parser import Parser, escaped, print_table


RECIPE = (
    "method",
    "bits_high",
    "ratio",
    "average_bits",
    "group_size",
    "scale_dtype",
)  # of `LoRAQuantConfig`


def _recipe_fields() -> list[tuple[str, Any, dataclasses.Field]]:
    """Name, type and default of each option of the LORAQUANT recipe; the help text is the config's own."""
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
class QuantizeArguments:
    """Where a trained adapter comes from, and where the packed one goes."""

    _argument_group_name = "source and target"

    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of SOURCE on the Hub"}
    )
    subfolder: str | None = field(
        default=None, metadata={"help": "folder in SOURCE that the adapter lies in"}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "repository on the Hub that TARGET is uploaded to as well"}
    )
    dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "text on which the perplexity before and after is measured; files, a directory or a hub data set"
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "base model, directory or hub name, for --dataset and for counting the integers that change under an LR-QAT"
            " adapter; left out: the base model that the adapter names"
        },
    )
    window: int = field(
        default=512,
        metadata={"help": "tokens that the model sees at once; perplexity depends on it"},
    )
    json: bool = field(
        default=False, metadata={"help": "print one JSON object, with all digits and every module"}
    )


@dataclass(kw_only=True)
class DequantizeArguments:
    """Where a packed adapter comes from, and how its factors are written."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = field(
        default=None,
        metadata={
            "help": "dtype of the factors in TARGET; left out: float16, and float32 for LR-QAT"
        },
    )
    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of SOURCE on the Hub"}
    )
    subfolder: str | None = field(
        default=None, metadata={"help": "folder in SOURCE that the adapter lies in"}
    )
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


def run_quantize_adapter(argv: Sequence[str]) -> int:
    """`lrqat quantize-adapter`."""
    parser = Parser(
        "quantize-adapter",
        "SOURCE TARGET [options]",
        [RecipeArguments, QuantizeArguments],
        "Stores the factors of a trained LoRA, DoRA or LR-QAT adapter at a few bits. No data is needed. PEFT loads the result\n"
        "once peft_lrqat is imported; `lrqat dequantize-adapter` makes a standard adapter of it.",
        "  lrqat quantize-adapter my-lora my-lora-2bit --dataset heldout.txt\n"
        "  lrqat quantize-adapter user/my-lora my-lora-small --average_bits 1.5 --push_to_hub user/my-lora-small",
    )
    _add_places(parser, "directory or hub name of a LoRA or LR-QAT adapter")
    recipe, options, places = parser.parse(argv)
    where = {"revision": options.revision, "subfolder": options.subfolder}
    model, before = None, None
    with parser.user_errors():
        check_target(places.target)  # before perplexity is measured
        config = LoRAQuantConfig(**dataclasses.asdict(recipe))
        if options.dataset or options.model:
            adapter = PeftConfig.from_pretrained(places.source, **where)
            base = options.model or adapter.base_model_name_or_path
            if base is None:
                raise ValueError(
                    f"the adapter in {places.source} does not name its base model; give --model"
                )
            model, tokenizer = load_base(base, "auto")
            model = PeftModel.from_pretrained(model, places.source, **where)
        if options.dataset:
            tokens = load_tokens(options.dataset, tokenizer)
            check_window(model, tokens, window=options.window)
    if options.dataset:
        before = evaluate_perplexity(model, tokens, window=options.window)["perplexity"]
    with parser.user_errors():
        # Only the integers of LR-QAT need the model. All other adapters are taken from their files, in their own dtype.
        live = model is not None and adapter.peft_type == PeftType.LRQAT
        source = {"source": model} if live else {"source": places.source, **where}
        made = quantize_adapter(target=places.target, config=config, **source)
        if options.push_to_hub:
            push_folder_to_hub(places.target, options.push_to_hub)
    report = made.report if isinstance(made, LoRAQuantConfig) else made.packed_factors["report"]
    if options.dataset:
        packed = PeftModel.from_pretrained(load_base(base, "auto")[0], places.target)
        after = evaluate_perplexity(packed, tokens, window=options.window)["perplexity"]
        report |= {"perplexity_before": before, "perplexity": after}
    if options.json:
        print(json.dumps(vars(places) | dataclasses.asdict(recipe) | report))
        return 0
    rows = {
        "relative error": f"{report['relative_error']:.4f}",
        "bits per parameter, as stored": f"{report['bits_per_parameter']:.3f}",
        "bits per parameter, codes alone": f"{report['nominal_bits_per_parameter']:.3f}",
        "bytes of the factors before": f"{report['bytes_before']:,}",
        "bytes of the factors after": f"{report['bytes']:,}",
    }
    if "flipped_integers" in report:
        rows["integers of the weights that change"] = f"{report['flipped_integers']:.2%}"
    if options.dataset:
        rows |= {"perplexity before": f"{before:.3f}", "perplexity after": f"{after:.3f}"}
    print_table(rows)
    print(f"adapter saved in {places.target}")
    return 0


def run_dequantize_adapter(argv: Sequence[str]) -> int:
    """`lrqat dequantize-adapter`."""
    parser = Parser(
        "dequantize-adapter",
        "SOURCE TARGET [options]",
        [DequantizeArguments],
        "Writes an adapter with packed factors as a standard LoRA (or LR-QAT) adapter, for servers and converters that know no\n"
        "other.",
        "  lrqat dequantize-adapter my-lora-2bit my-lora-again\n"
        "  lrqat dequantize-adapter user/my-lora-2bit my-lora-again --dtype bfloat16",
    )
    _add_places(parser, "directory or hub name of an adapter with packed factors")
    options, places = parser.parse(argv)
    with parser.user_errors():
        dtype = options.dtype and getattr(torch, options.dtype)
        where = {"revision": options.revision, "subfolder": options.subfolder}
        made = dequantize_adapter(places.source, places.target, dtype=dtype, **where)
    size = (Path(places.target) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    dtype = options.dtype or ("float32" if made.peft_type == PeftType.LRQAT else "float16")
    if options.json:
        print(json.dumps(vars(places) | {"dtype": dtype, "bytes": size}))
        return 0
    print_table({"dtype of the factors": dtype, "bytes of the file": f"{size:,}"})
    print(f"adapter saved in {places.target}")
    return 0


def _add_places(parser: Parser, source: str) -> None:
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument(
        "target", metavar="TARGET", help="directory to be made; one that exists is not written over"
    )
