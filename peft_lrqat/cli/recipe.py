"""`lrqat recipe`: settings to train with, for a runtime or for an average number of bits."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peft_lrqat.base.bits import as_pattern, choose_bits
from peft_lrqat.base.config import LowBitConfig
from peft_lrqat.formats.base import ALL_BITS
from peft_lrqat.formats.linear import linear_names
from peft_lrqat.formats.runtimes import RUNTIMES, WIDTH, runtime_named
from peft_lrqat.lrqat.config import LRQATConfig
from peft_lrqat.trainer.pipeline import load_model
from peft_lrqat.trainer.plan import skeleton

from .by_bits import commands, recipe_for
from .fields import given_names
from .options import JsonOptions
from .parser import Parser
from .sample import SampleOptions


@dataclass(kw_only=True)
class RecipeForArguments(JsonOptions):
    """For which runtime."""

    bits: int = field(default=4, metadata={"help": "bits per weight"})
    activation_bits: int | None = field(
        default=None, metadata={"help": "bits of the inputs of the quantised layers; default: 16"}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "base model, a directory or a name on the Hub: group sizes then divide the "
            "widths of its layers, and the file's size is printed"
        },
    )


@dataclass(kw_only=True)
class AverageArguments(SampleOptions):
    """Bits for each layer, by what rounding it costs on a text."""

    _argument_group_name = "bits for each layer (--average_bits)"

    average_bits: float | None = field(
        default=None,
        metadata={
            "help": "instead of --bits: bits per weight on average, such as 2.5, without scales. "
            "Layers get different bits, by their loss on --dataset; needs --model"
        },
    )
    dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "text: files, a directory or a data set on the Hub, as for `lrqat train`"
        },
    )
    tokens: int = field(
        default=32_768, metadata={"help": "tokens of --dataset that are used, chosen at random"}
    )
    batch_size: int = field(default=4, metadata={"help": "examples in a backward pass"})
    group_size: int = field(
        default=-1, metadata={"help": "weights of a row that share a scale, without --for"}
    )
    symmetric: bool = field(
        default=True, metadata={"help": "signed integers without a zero point, without --for"}
    )


def run_recipe(argv: Sequence[str]) -> int:
    """`lrqat recipe`."""
    parser = Parser(
        "recipe",
        "(--bits B | --for RUNTIME | --average_bits B --model M --dataset TEXT) [options]",
        [RecipeForArguments, AverageArguments],
        "Settings to train with: what won at a number of bits; or so that a runtime loads the\n"
        "result as it is; or so that the layers share a number of bits by what rounding each of\n"
        "them costs.",
        "  lrqat recipe --bits 2 --model ./my-llama\n"
        "  lrqat recipe --for vllm --model ./my-llama\n"
        "  lrqat recipe --for llama.cpp --bits 2\n"
        "  lrqat recipe --average_bits 2.5 --model ./my-llama --dataset text.jsonl",
    )
    parser.add_argument("--for", dest="runtime", choices=RUNTIMES, help="what is to run the model")
    args, average, place = parser.parse(argv)
    with parser.user_errors():
        _check(average, given_names(parser.words))
        if average.average_bits is not None:
            return _by_layer(args, average, place.runtime)
    if place.runtime is None and not given_names(parser.words) & {"bits"}:
        parser.error("the following arguments are required: --bits, --for, or --average_bits")
    if place.runtime is None:
        with parser.user_errors():
            if args.activation_bits is not None:
                raise ValueError("--activation_bits depends on the runtime; add --for")
            return _by_bits(args)
    runtime = runtime_named(place.runtime)
    with parser.user_errors():
        model = None if args.model is None else skeleton(args.model)
        config = LRQATConfig.for_runtime(
            runtime.name,
            bits=args.bits,
            activation_bits=args.activation_bits,
            model=model,
            target_modules="all-linear",
        )
    grid = config.grid_of(config.bits, config.group_size)
    shapes = [(WIDTH, WIDTH)] if model is None else list(linear_names(model).values())
    sizes = runtime.stored_bits(grid, shapes, config.activation_grid)
    names: tuple[str, ...] = ("bits", "group_size", "symmetric", "scale_dtype")
    if config.k_quant:
        names += ("k_quant",)
    if args.activation_bits is not None:
        names += ("activation_bits",)
    fields = {name: getattr(config, name) for name in names}
    found = {"stored_bits_per_weight": round(sizes.stored, 4), "file_bytes": None}
    if model is not None:
        weights = sum(rows * columns for rows, columns in shapes)
        # All else is stored in the dtype of the model; tied weights count once.
        others = sum(p.numel() for p in model.parameters()) - weights
        found["file_bytes"] = round(weights * sizes.stored / 8) + others * model.dtype.itemsize
    format = runtime.format.name
    if args.json:
        print(json.dumps({"runtime": runtime.name, "format": format, **fields, **found}))
        return 0
    name = args.model or "MODEL"
    recipe = replace(recipe_for(args.bits, shapes), grid=fields)
    if args.activation_bits is not None:
        recipe = replace(recipe, base=None, train={})
    *lines, _ = commands(args.bits, recipe, name)
    print("\n".join(lines))
    print(f"lrqat export --adapter ADAPTER --format {format} --output DIRECTORY --verify")
    size = "" if model is None else f"; the file takes about {found['file_bytes']:,} bytes"
    print(f"# stored at {sizes.stored:.2f} bits per weight, scales included{size}")
    if sizes.wasteful:
        print(f"# {sizes.remark(runtime.format)}")
    return 0


def _by_bits(args: RecipeForArguments) -> int:
    shapes = () if args.model is None else linear_names(skeleton(args.model)).values()
    recipe = recipe_for(args.bits, shapes)
    lines = commands(args.bits, recipe, args.model or "MODEL")
    if args.json:
        print(json.dumps({"bits": args.bits, **asdict(recipe), "commands": lines}))
        return 0
    print("\n".join([*lines, f"# {recipe.measured}"]))
    return 0


def _check(average: AverageArguments, given: set[str]) -> None:
    if average.average_bits is not None:
        if "bits" in given:
            raise ValueError("give --bits or --average_bits, not both")
        return
    if wrong := sorted(given & vars(average).keys()):
        raise ValueError(f"--{wrong[0]} changes nothing without --average_bits; add that")


def _by_layer(args: RecipeForArguments, average: AverageArguments, runtime: str | None) -> int:
    """Settings with bits for each layer."""
    assert average.average_bits is not None
    if args.model is None or average.dataset is None:
        raise ValueError("--average_bits needs --model, and --dataset with a text like its own")
    model = load_model(args.model, "auto")
    fields: dict[str, Any] = {"group_size": average.group_size, "symmetric": average.symmetric}
    widths: tuple[int, ...] = ALL_BITS
    fused: tuple[tuple[str, ...], ...] = ()
    if runtime is not None:
        chosen = runtime_named(runtime)
        shapes = linear_names(model).values()
        fields = chosen.preset(int(average.average_bits), average.symmetric, shapes)
        config = LowBitConfig(**fields)
        widths = tuple(
            b
            for b in ALL_BITS
            if chosen.why_not(config.grid_of(b, config.group_size), config.scale_dtype) is None
        )
        fused = chosen.fused
    bits = choose_bits(
        model,
        average.sample(average.dataset, args.model, None, average.tokens, "--tokens"),
        LowBitConfig(**fields),
        average_bits=average.average_bits,
        widths=widths,
        fused=fused,
        batch_size=average.batch_size,
        progress=not args.json,
    )
    common, pattern = as_pattern(bits)
    sizes = {name: model.get_parameter(f"{name}.weight").numel() for name in bits}
    reached = sum(sizes[name] * width for name, width in bits.items()) / sum(sizes.values())
    fields |= {"bits": common, "bits_pattern": pattern}
    if args.json:
        print(json.dumps({"runtime": runtime, "average_bits": round(reached, 4), **fields}))
        return 0
    words = [
        f"--{name} {shlex.quote(json.dumps(value)) if isinstance(value, dict) else value}"
        for name, value in fields.items()
    ]
    print(
        f"lrqat train --model {args.model} --dataset {' '.join(average.dataset)} "
        f"--output_dir ADAPTER {' '.join(words)}"
    )
    layers = ", ".join(f"{n} of {b} bits" for b, n in sorted(Counter(bits.values()).items()))
    print(f"# {reached:.3f} bits per weight on average, without scales; layers: {layers}")
    return 0
