"""`lrqat prepare`: a low-bit base, made once, that `from_pretrained` loads as it is."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers.utils import logging

from peft_lrqat.base.calibrated import CalibratedStart
from peft_lrqat.base.config import LowBitConfig
from peft_lrqat.base.prepare import prepare_low_bit
from peft_lrqat.calibration.gptq import GPTQ
from peft_lrqat.calibration.methods import METHODS
from peft_lrqat.calibration.reconstruct import Reconstruction
from peft_lrqat.quant.grid import SCALE_DTYPES
from peft_lrqat.shared.plotting import require_matplotlib

from .fields import config_values, given_names, options_of
from .options import JsonOptions, ModelOptions
from .parser import Parser, print_table
from .run_file import write_run_file
from .sample import SampleOptions


logger = logging.get_logger(__name__)
# Fields that the library fills in.
FILLED_IN = {
    "calibration",
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
BlockArguments: Any = options_of(
    Reconstruction, "BlockArguments", "block reconstruction (--method blocks)", ()
)
GPTQArguments: Any = options_of(GPTQ, "GPTQArguments", "GPTQ (--method gptq)", ())
# Classes whose fields are options of one method alone.
OPTIONS_OF = {"blocks": BlockArguments, "gptq": GPTQArguments}
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


@dataclass(kw_only=True)
class CalibrationArguments(SampleOptions):
    """How the integers are chosen, and on which text."""

    _argument_group_name = "calibration"

    method: Literal["nearest", "blocks", "gptq"] = field(
        default="nearest",
        metadata={
            "help": "nearest: each weight goes to the nearest grid point, no data needed. blocks: "
            "each block of layers is trained to give its unquantised output; best below 4 bits. "
            "gptq: rounding errors are made up for by other weights, in less time"
        },
    )
    dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "text for --method blocks or gptq: files, a directory or a data set on the "
            "Hub, as for `lrqat train`"
        },
    )
    calibration_tokens: int = field(
        default=131_072, metadata={"help": "tokens of --dataset that are used, chosen at random"}
    )
    calibration_batch_size: int = field(default=4, metadata={"help": "examples in a batch"})
    plot: str | None = field(
        default=None, metadata={"help": "PNG file for the loss before and after each block"}
    )

    def rows(self, model: str, revision: str | None) -> Dataset:
        """The calibration examples, blocks of token ids."""
        if self.dataset is None:
            raise ValueError(
                f"--method {self.method} needs --dataset, a text like the one the model is for"
            )
        wanted = self.calibration_tokens
        return self.sample(self.dataset, model, revision, wanted, "--calibration_tokens")


def run_prepare(argv: Sequence[str]) -> int:
    """`lrqat prepare`."""
    parser = Parser(
        "prepare",
        "(--model M | --from CHECKPOINT) --output DIRECTORY [options]",
        [PrepareArguments, BaseArguments, CalibrationArguments, BlockArguments, GPTQArguments],
        "Makes a low-bit base: the frozen integers that LR-QAT trains on, which `from_pretrained`\n"
        "loads as they are. Memory holds one tensor of the model at a time.",
        "  lrqat prepare --model HuggingFaceTB/SmolLM2-135M --output smollm2-4bit --bits 4\n"
        "  lrqat prepare --model ./my-llama --output my-llama-3bit --bits 3 --group_size 128\n"
        "  lrqat prepare --from org/model-GPTQ-Int4 --output model-4bit\n"
        "  lrqat prepare --model ./my-llama --output my-llama-2bit --bits 2 --group_size 64 \\\n"
        "      --no_symmetric --downcast fixed8 --method blocks --dataset text.jsonl",
    )
    args, base, data, *of_methods = parser.parse(argv)
    with parser.user_errors():
        _check(args, given_names(parser.words))
        _check_method(data, given_names(parser.words))
        start = None
        if data.method != "nearest":
            chosen = dict(zip(OPTIONS_OF, of_methods, strict=True))[data.method]
            start = CalibratedStart(
                method=METHODS[data.method](**dataclasses.asdict(chosen)),
                dataset=data.rows(args.model, args.revision),
                batch_size=data.calibration_batch_size,
                progress=not args.json,
            )
        given = given_names(parser.words)
        values = {name: v for name, v in config_values(base).items() if name in given}
        settings = None if args.source else LowBitConfig(**values)
        made = prepare_low_bit(
            args.source or args.model,
            args.output,
            settings,
            start=start,
            dtype=SCALE_DTYPES.get(args.dtype),
            max_shard_bytes=parse_size(args.max_shard_size),
            progress=not args.json,
            revision=args.revision,
        )
    options = {
        name: value
        for part in (args, base, data, *of_methods)
        for name, value in vars(part).items()
    }
    write_run_file(args.output, options | {"from": args.source}, parser.words)
    size = sum(file.stat().st_size for file in Path(args.output).rglob("*") if file.is_file())
    found = {"output": args.output, "modules": len(made.modules), "bytes": size}
    losses = {} if start is None else start.losses
    if data.plot is not None and losses:
        plot_losses(losses, data.plot)
    if args.json:
        if losses:
            found["losses"] = losses
        print(json.dumps(found | {"bits": made.bits, "group_size": made.group_size}))
    else:
        if losses:
            print("loss of each block, rounded to nearest and calibrated:")
            print_table({name: f"{a:.4f} -> {b:.4f}" for name, (a, b) in losses.items()})
        print_table({name: f"{v:,}" if isinstance(v, int) else v for name, v in found.items()})
    return 0


def _check_method(data: CalibrationArguments, given: set[str]) -> None:
    for method, options in OPTIONS_OF.items():
        own = {option.name for option in dataclasses.fields(options)}
        if method != data.method and (wrong := sorted(own & given)):
            raise ValueError(f"--{wrong[0]} is an option of --method {method}; add that")
    if data.method == "nearest":
        own = {option.name for option in dataclasses.fields(data)}
        if wrong := sorted(own & given - {"method"}):
            raise ValueError(
                f"--{wrong[0]} changes nothing without calibration; add --method blocks or gptq"
            )
    if data.plot is not None:
        require_matplotlib()


def plot_losses(losses: Mapping[str, tuple[float, float]], path: str) -> None:
    """A PNG with the loss before and after each block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    panel = figure.subplots()
    before, after = zip(*losses.values(), strict=True)
    panel.semilogy(before, "o-", label="rounded to nearest")
    panel.semilogy(after, "o-", label="calibrated")
    panel.set(xlabel="block", ylabel="squared error of its output, relative")
    panel.legend()
    figure.savefig(path, dpi=120)


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
