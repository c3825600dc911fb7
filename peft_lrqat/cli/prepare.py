"""`lrqat prepare`: a low-bit base, made once, that `from_pretrained` loads as it is."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_lrqat.base.config import LowBitConfig
from peft_lrqat.base.prepare import prepare_low_bit
from peft_lrqat.quant.grid import SCALE_DTYPES

from .fields import config_values, given_names, options_of
from .options import JsonOptions, ModelOptions
from .parser import Parser, print_table


# Fields that the library fills in.
FILLED_IN = {
    "digests",
    "format_version",
    "library_version",
    "made_from",
    "modules",
    "quant_method",
    "source",
}
BaseArguments: Any = options_of(
    LowBitConfig, "BaseArguments", "low-bit base (not with --from)", FILLED_IN
)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(kw_only=True)
class PrepareArguments(ModelOptions, JsonOptions):
    """Which model becomes a low-bit base."""

    _argument_group_name = "model and output"

    model: str | None = field(
        default=None,
        metadata={"help": "model that is not quantised: a directory or a name on the Hub"},
    )
    source: str | None = field(
        default=None,
        metadata={
            "aliases": ["--from"],
            "help": "instead of --model: a GPTQ, AWQ or compressed-tensors (pack-quantized) "
            "checkpoint, whose integers are kept as they are",
        },
    )
    output: str = field(
        metadata={
            "help": "directory to write; it must be new or empty. While it is written, it is "
            "called OUTPUT.partial, and the same command goes on after an interruption"
        }
    )
    revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the model on the Hub"}
    )
    max_shard_size: str = field(
        default="2GB", metadata={"help": "bytes of tensors in a file, such as 500MB"}
    )


def run_prepare(argv: Sequence[str]) -> int:
    """`lrqat prepare`."""
    parser = Parser(
        "prepare",
        "(--model M | --from CHECKPOINT) --output DIRECTORY [options]",
        [PrepareArguments, BaseArguments],
        "Makes a low-bit base: the frozen integers that LR-QAT trains on, which `from_pretrained`\n"
        "loads as they are. Memory holds one tensor of the model at a time.",
        "  lrqat prepare --model HuggingFaceTB/SmolLM2-135M --output smollm2-4bit --bits 4\n"
        "  lrqat prepare --model ./my-llama --output my-llama-3bit --bits 3 --group_size 128\n"
        "  lrqat prepare --from org/model-GPTQ-Int4 --output model-4bit",
    )
    args, base = parser.parse(argv)
    with parser.user_errors():
        _check(args, given_names(argv))
        settings = None if args.source else LowBitConfig(**config_values(base))
        made = prepare_low_bit(
            args.source or args.model,
            args.output,
            settings,
            dtype=SCALE_DTYPES.get(args.dtype),
            max_shard_bytes=parse_size(args.max_shard_size),
            progress=not args.json,
            revision=args.revision,
        )
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    found = {"output": args.output, "modules": len(made.modules), "bytes": size}
    if args.json:
        print(json.dumps(found | {"bits": made.bits, "group_size": made.group_size}))
    else:
        print_table({name: f"{v:,}" if isinstance(v, int) else v for name, v in found.items()})
    return 0


def _check(args: PrepareArguments, given: set[str]) -> None:
    if (args.model is None) == (args.source is None):
        raise ValueError("give either --model, which is not quantised, or --from, which is")
    if args.source is not None:
        wrong = sorted(given & {option.name for option in dataclasses.fields(BaseArguments)})
        if wrong:
            raise ValueError(
                f"--{wrong[0]} cannot be given with --from: the integers of {args.source} are kept "
                "as they are; start from the model before its quantisation with --model instead"
            )


def parse_size(text: str) -> int:
    """Bytes in ``2GB``, ``500MB`` or ``4096``."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS:
        number, unit = text, ""
    try:
        size = int(float(number) * UNITS.get(unit, 1))
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"--max_shard_size must be a size such as 500MB or 2GB, but is {text!r}")
    return size
