"""The command `lrqat`: trains an adapter, evaluates and exports a model, quantises LoRA adapters, runs the demo."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from peft_lrqat import LRQATConfig, LRQATLayer, deployed_weight_bytes, target_weight_bytes
from peft_lrqat.data import load_blocks, load_tokens
from peft_lrqat.export import export_model, verify_export
from peft_lrqat.export.capabilities import RUNTIMES
from peft_lrqat.hub import push_folder_to_hub
from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, quantize_adapter
from peft_lrqat.metrics import check_window, compute_metrics, evaluate_perplexity, preprocess_logits_for_metrics
from peft_lrqat.staging import check_target
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments, last_complete_checkpoint
from peft_lrqat.trainer.checkpoint import why_incomplete


DTYPES = ("auto", "float32", "bfloat16", "float16")
# Fields of an adapter's config that the library fills in, or that only matter when an adapter is loaded.
NOT_FOR_TRAINING = {
    "base_dtype",
    "base_dtype_pattern",
    "format_version",
    "packed_factors",
    "training_record",
    "verify_base",
}
RECIPE = ("method", "bits_high", "ratio", "average_bits", "group_size", "scale_dtype")  # of `LoRAQuantConfig`
NAME = re.compile(r"[\w.]+")  # of a module; anything else in `--target_modules` is a regular expression


def json_object(text: str) -> dict[str, Any]:
    """A dict from the command line, such as ``'{"down_proj": 4}'``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        message = f'must be a JSON object such as {{"down_proj": 4}}, but is {text!r} ({error})'
        raise argparse.ArgumentTypeError(message) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"down_proj": 4}}, but is {text!r}')
    return value


def _command_line_type(hint: Any) -> Any:
    """The type hint of a config field as `HfArgumentParser` understands it."""
    lists = [option for option in get_args(hint) if get_origin(option) is list]
    if lists:
        return lists[0] | None  # one value is a list of one here; `adapter_config` tells names and patterns apart
    return json_object if get_origin(hint) is dict else hint


def _adapter_fields() -> list[tuple[str, Any, dataclasses.Field]]:
    """Name, type and default of each LR-QAT option; the help text is the config's own."""
    left_out = NOT_FOR_TRAINING | {inherited.name for inherited in dataclasses.fields(PeftConfig)}
    hints = get_type_hints(LRQATConfig)
    fields = []
    for option in dataclasses.fields(LRQATConfig):
        if option.name in left_out:
            continue
        metadata = _escaped(option)
        kind, factory = _command_line_type(hints[option.name]), option.default_factory
        if option.name == "target_modules":  # here a whole model is quantised, not PEFT's choice for LoRA
            copy = dataclasses.field(default_factory=lambda: ["all-linear"], metadata=metadata)
        else:
            copy = dataclasses.field(default=option.default, default_factory=factory, metadata=metadata)
        fields.append((option.name, kind, copy))
    return fields


def _recipe_fields() -> list[tuple[str, Any, dataclasses.Field]]:
    """Name, type and default of each option of the LORAQUANT recipe; the help text is the config's own."""
    hints = get_type_hints(LoRAQuantConfig)
    options = {option.name: option for option in dataclasses.fields(LoRAQuantConfig)}
    return [
        (name, hints[name], field(default=options[name].default, metadata=_escaped(options[name]))) for name in RECIPE
    ]


def _escaped(option: dataclasses.Field) -> dict[str, str]:
    """The help text of a config field for argparse."""
    return {"help": option.metadata["help"].replace("%", "%%")}


AdapterArguments = dataclasses.make_dataclass(
    "AdapterArguments", _adapter_fields(), namespace={"_argument_group_name": "LR-QAT adapter"}
)


RecipeArguments = dataclasses.make_dataclass(
    "RecipeArguments", _recipe_fields(), namespace={"_argument_group_name": "LORAQUANT recipe"}
)


def adapter_config(options: Any) -> LRQATConfig:
    """`LRQATConfig` for a causal language model from the parsed `AdapterArguments`."""
    values = dataclasses.asdict(options)
    for name in ("target_modules", "exclude_modules"):
        given = values[name]
        if given is not None and len(given) == 1 and (given[0] == "all-linear" or not NAME.fullmatch(given[0])):
            values[name] = given[0]
    return LRQATConfig(task_type="CAUSAL_LM", **values)


@dataclass(kw_only=True)
class DataArguments:
    """What is trained, and on which text."""

    _argument_group_name = "model and data"

    model: str = field(metadata={"help": "directory or hub name of a causal language model, not quantised"})
    dataset: list[str] = field(
        metadata={
            "help": "training text: one or more files (plain text, one document each; or jsonl, csv, parquet), a data set"
            " directory, or a hub data set as `name` or `name:config`"
        }
    )
    eval_dataset: list[str] | None = field(
        default=None, metadata={"help": "text for the perplexity before and after training, given like --dataset"}
    )
    split: str = field(default="train", metadata={"help": "split of a training data set that has several"})
    eval_split: str = field(default="validation", metadata={"help": "split of an evaluation data set that has several"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    block_size: int = field(default=512, metadata={"help": "tokens per training example, and per evaluation window"})
    streaming: bool = field(
        default=False,
        metadata={"help": "read the training data while training, for sets larger than the disk; needs --max_steps"},
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the base model; auto: as saved"}
    )


@dataclass(kw_only=True)
class TrainArguments(LRQATTrainingArguments):
    """`LRQATTrainingArguments` as the command line has them."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str = field(metadata={"help": "directory for the adapter, its tokenizer and the checkpoints"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "checkpoint directory to go on from, or `last` for the newest whole one in --output_dir"},
    )


@dataclass(kw_only=True)
class EvalArguments:
    """Which model is evaluated, and on which text."""

    model: str | None = field(
        default=None, metadata={"help": "directory or hub name; left out: the base model that --adapter names"}
    )
    adapter: str | None = field(default=None, metadata={"help": "directory or hub name of an LR-QAT adapter"})
    merge: bool = field(default=False, metadata={"help": "merge the adapter into plain linear layers first"})
    dataset: list[str] = field(
        metadata={"help": "text files, one data set directory, or the `name` or `name:config` of a hub data set"}
    )
    split: str = field(default="test", metadata={"help": "split of a data set that has several"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    window: int = field(default=512, metadata={"help": "tokens that the model sees at once; perplexity depends on it"})
    stride: int | None = field(
        default=None,
        metadata={
            "help": "tokens from one window to the next. Left out: windows do not overlap, and an incomplete last one is"
            " dropped. Smaller than --window: every token but the first is scored once, with more context"
        },
    )
    batch_size: int = field(default=8, metadata={"help": "windows per forward pass"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the model; auto: as saved"}
    )
    json: bool = field(default=False, metadata={"help": "print one JSON object, with all digits"})


@dataclass(kw_only=True)
class QuantizeArguments:
    """Where a trained adapter comes from, and where the packed one goes."""

    _argument_group_name = "source and target"

    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of SOURCE on the Hub"})
    subfolder: str | None = field(default=None, metadata={"help": "folder in SOURCE that the adapter lies in"})
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
    window: int = field(default=512, metadata={"help": "tokens that the model sees at once; perplexity depends on it"})
    json: bool = field(default=False, metadata={"help": "print one JSON object, with all digits and every module"})


@dataclass(kw_only=True)
class DequantizeArguments:
    """Where a packed adapter comes from, and how its factors are written."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = field(
        default=None, metadata={"help": "dtype of the factors in TARGET; left out: float16, and float32 for LR-QAT"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of SOURCE on the Hub"})
    subfolder: str | None = field(default=None, metadata={"help": "folder in SOURCE that the adapter lies in"})
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


@dataclass(kw_only=True)
class ExportArguments:
    """Which model is exported, and how."""

    adapter: str = field(metadata={"help": "directory or hub name of an LR-QAT adapter"})
    output: str = field(metadata={"help": "directory to be made; one that is not empty is not written over"})
    format: Literal["compressed-tensors", "gguf", "gptq", "packed", "dequantized"] = field(
        default="compressed-tensors",
        metadata={"help": "see the table in the README; `lrqat recipe` chooses before training"},
    )
    model: str | None = field(
        default=None, metadata={"help": "directory or hub name; left out: the base model that --adapter names"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the model; auto: as saved"}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "bytes of tensors in a file"})
    container_bits: int | None = field(
        default=None,
        metadata={"help": "store integers at this width: 3 bits as 4, for a runtime that reads only those"},
    )
    activations: Literal["write", "ignore"] = field(
        default="write",
        metadata={
            "help": "of an adapter with activation_bits or kv_cache_bits. write: as part of the export, or it is refused; ignore:"
            " the weights alone"
        },
    )
    verify: bool = field(
        default=False,
        metadata={"help": "load the export, compare every weight and some logits, and fail if one differs"},
    )
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


@dataclass(kw_only=True)
class RecipeForArguments:
    """For which runtime."""

    bits: int = field(default=4, metadata={"help": "bits per weight"})
    activation_bits: int | None = field(
        default=None, metadata={"help": "bits of the inputs of the quantised layers; left out: 16"}
    )
    json: bool = field(default=False, metadata={"help": "print one JSON object"})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and names the defaults that the help texts do not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or "").lower():
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line: the usage of a hundred options would bury them."""

    def __init__(self, command: str, usage: str, dataclass_types: Sequence[type], description: str, examples: str):
        super().__init__(
            dataclass_types,
            prog=f"lrqat {command}",
            usage=f"lrqat {command} {usage}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        with self.user_errors():
            *parsed, unknown = self.parse_args_into_dataclasses(
                argv, look_for_args_file=False, return_remaining_strings=True
            )
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}")
        return tuple(parsed)

    @contextmanager
    def user_errors(self) -> Iterator[None]:
        """Ends the program with one clear line where a check of the user's input fails; bugs keep their traceback.

        Only checks belong inside, not training itself. TypeError: an adapter refuses layers it cannot quantise with it.
        """
        try:
            yield
        except (ValueError, OSError, ImportError, TypeError) as error:
            self.exit(2, f"{self.prog}: error: {' '.join(str(error).split())}\n")


def load_base(name: str, dtype: str | torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer. A local directory is made absolute, so that an adapter finds its base from anywhere."""
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: LRQATTrainingArguments,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | None = None,
) -> LRQATTrainer:
    """An `LRQATTrainer` for blocks of tokens, with perplexity as its metric."""
    return LRQATTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )


def describe_size(model: PeftModel) -> str:
    """What the adapter quantises and what it trains, in one line."""
    training, deployed = target_weight_bytes(model), deployed_weight_bytes(model)
    trainable, _ = model.get_nb_trainable_parameters()
    names = [name for name, module in model.named_modules() if isinstance(module, LRQATLayer)]
    kinds = sorted({name.rpartition(".")[2] for name in names})
    return (
        f"{len(names)} layers quantised ({', '.join(kinds)}); target weights:"
        f" {training:,} bytes while training, {deployed:,} bytes deployed;"
        f" trainable parameters: {trainable:,}"
    )


def run_train(argv: Sequence[str]) -> int:
    """`lrqat train`."""
    parser = _Parser(
        "train",
        "--model M --dataset D [D ...] --output_dir DIR [options]",
        [DataArguments, AdapterArguments, TrainArguments],
        "Trains an LR-QAT adapter: the linear layers of a causal language model are rounded to a few bits, and low-rank\n"
        "factors inside the rounding win back what that costs. The adapter and the tokenizer are saved in --output_dir.",
        "  lrqat train --model ./my-llama --dataset corpus.txt --target_modules all-linear --bits 3 --output_dir out\n"
        "  lrqat train --model HuggingFaceTB/SmolLM2-135M --dataset Salesforce/wikitext:wikitext-2-raw-v1 \\\n"
        "      --eval_dataset Salesforce/wikitext:wikitext-2-raw-v1 --target_modules all-linear --bits 4 \\\n"
        "      --group_size 64 --max_steps 1000 --output_dir out",
    )
    data, adapter, args = parser.parse(argv)
    with parser.user_errors():
        _check_training(data, args)
        config = adapter_config(adapter)
        model, tokenizer = load_base(data.model, data.dtype)
        _check_block_size(model, data.block_size)
        options = {"block_size": data.block_size, "text_column": data.text_column}
        train_set = load_blocks(data.dataset, tokenizer, split=data.split, streaming=data.streaming, **options)
        eval_set = data.eval_dataset and load_blocks(data.eval_dataset, tokenizer, split=data.eval_split, **options)
        set_seed(args.seed)  # for the factors A
        model = get_peft_model(model, config)
        resume = _checkpoint(args)

        trainer = make_trainer(model, tokenizer, args, train_set, eval_set or None)

    say = print if trainer.is_world_process_zero() else lambda *_: None
    say(describe_size(model))
    before = trainer.evaluate() if eval_set else None
    trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate() if before else None
    # With --push_to_hub this publishes as well, and the card has the metrics of the line above.
    trainer.save_model()
    trainer.save_state()
    if after:
        say(
            f"perplexity before training (round-to-nearest) {before['eval_perplexity']:.3f}, after"
            f" {after['eval_perplexity']:.3f}; {after['eval_tokens']:,} tokens scored, windows of {data.block_size}"
        )
    say(f"adapter saved in {args.output_dir}")
    return 0


def run_eval(argv: Sequence[str]) -> int:
    """`lrqat eval`."""
    parser = _Parser(
        "eval",
        "[--model M] [--adapter DIR] --dataset D [D ...] [options]",
        [EvalArguments],
        "Prints the perplexity of a causal language model, with or without an LR-QAT adapter, on a text.",
        "  lrqat eval --adapter out --dataset test.txt --window 1024\n"
        "  lrqat eval --model ./my-llama --dataset test.txt --window 1024 --stride 512 --json",
    )
    (args,) = parser.parse(argv)
    with parser.user_errors():
        if args.model is None and args.adapter is None:
            raise ValueError("give --model, --adapter, or both")
        if args.merge and args.adapter is None:
            raise ValueError("--merge merges an adapter; give --adapter, or leave --merge out")
        name = args.model or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
        model, tokenizer = load_base(name, args.dtype)
        if args.adapter is not None:
            model = PeftModel.from_pretrained(model, args.adapter)
        tokens = load_tokens(args.dataset, tokenizer, split=args.split, text_column=args.text_column)
        check_window(model, tokens, window=args.window, stride=args.stride, batch_size=args.batch_size)

    model = model.merge_and_unload() if args.merge else model
    model = model.to(PartialState().device)
    result = evaluate_perplexity(model, tokens, window=args.window, stride=args.stride, batch_size=args.batch_size)
    if args.json:
        print(json.dumps(dataclasses.asdict(args) | {"model": name} | result))
        return 0
    windows = f"windows of {args.window}" + (f", stride {args.stride}" if args.stride else ", not overlapping")
    print(
        f"perplexity {result['perplexity']:.4f} ({result['nats_per_token']:.4f} nats per token;"
        f" {result['tokens']:,} tokens scored; {windows})"
    )
    return 0


def run_quantize_adapter(argv: Sequence[str]) -> int:
    """`lrqat quantize-adapter`."""
    parser = _Parser(
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
                raise ValueError(f"the adapter in {places.source} does not name its base model; give --model")
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
    _print_table(rows)
    print(f"adapter saved in {places.target}")
    return 0


def run_dequantize_adapter(argv: Sequence[str]) -> int:
    """`lrqat dequantize-adapter`."""
    parser = _Parser(
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
    _print_table({"dtype of the factors": dtype, "bytes of the file": f"{size:,}"})
    print(f"adapter saved in {places.target}")
    return 0


def run_export(argv: Sequence[str]) -> int:
    """`lrqat export`."""
    parser = _Parser(
        "export",
        "--adapter ADAPTER --output DIRECTORY [options]",
        [ExportArguments],
        "Writes a trained LR-QAT model in a format that a runtime loads: the integers and scales of training, no weight changed.",
        "  lrqat export --adapter lrqat-4bit --output model-ct --verify\n"
        "  lrqat export --adapter lrqat-4bit --output model-gguf --format gguf",
    )
    (args,) = parser.parse(argv)
    with parser.user_errors():
        check_target(args.output)
        name = args.model or PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
        if name is None:
            raise ValueError(f"the adapter in {args.adapter} does not name its base model; give --model")
        model, tokenizer = load_base(name, args.dtype)
        model = PeftModel.from_pretrained(model, args.adapter).eval()
        export_model(
            model,
            args.output,
            format=args.format,
            tokenizer=tokenizer,
            max_shard_size=args.max_shard_size,
            container_bits=args.container_bits,
            activations=args.activations,
        )
    if not args.verify:
        size = sum(file.stat().st_size for file in Path(args.output).iterdir())
        print(json.dumps(vars(args) | {"bytes": size}) if args.json else f"{size:,} bytes in {args.output}")
        return 0
    found = verify_export(model, args.output, format=args.format)
    if args.json:
        print(json.dumps(vars(args) | dataclasses.asdict(found) | {"exact": found.exact}))
    else:
        logits = "not run" if found.logits_difference is None else f"{found.logits_difference:.3g}"
        _print_table(
            {
                "loaded by": found.loader,
                "layers whose weights differ": f"{len(found.different_layers)} of {found.layers}",
                "other tensors that differ": f"{len(found.different_tensors)}",
                "largest difference of a logit": logits,
                "bytes": f"{found.bytes:,}",
            }
        )
        print("every weight is what was trained" if found.exact else "the export is NOT what was trained")
    return 0 if found.exact else 1


def run_recipe(argv: Sequence[str]) -> int:
    """`lrqat recipe`."""
    parser = _Parser(
        "recipe",
        "--for RUNTIME [options]",
        [RecipeForArguments],
        "Settings to train with, so that a runtime loads the result as it is.",
        "  lrqat recipe --for vllm\n  lrqat recipe --for llama.cpp --bits 2",
    )
    parser.add_argument("--for", dest="runtime", choices=RUNTIMES, required=True, help="what is to run the model")
    args, place = parser.parse(argv)
    with parser.user_errors():
        config = LRQATConfig.for_runtime(place.runtime, bits=args.bits, activation_bits=args.activation_bits)
    names = ("bits", "group_size", "symmetric", "scale_dtype")
    if args.activation_bits is not None:
        names += ("activation_bits",)
    fields = {name: getattr(config, name) for name in names}
    format = RUNTIMES[place.runtime].format
    if args.json:
        print(json.dumps({"runtime": place.runtime, "format": format, **fields}))
        return 0
    options = " ".join(f"--{name} {value}" for name, value in fields.items())
    print(f"lrqat train --model MODEL --dataset TEXT --output_dir ADAPTER {options}")
    print(f"lrqat export --adapter ADAPTER --format {format} --output DIRECTORY --verify")
    return 0


def _add_places(parser: _Parser, source: str) -> None:
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("target", metavar="TARGET", help="directory to be made; one that exists is not written over")


def _print_table(rows: dict[str, str]) -> None:
    names, values = (max(map(len, column)) for column in (rows.keys(), rows.values()))
    for name, value in rows.items():
        print(f"{name:{names}}  {value:>{values}}")


def run_demo(argv: Sequence[str]) -> int:
    """`lrqat demo`."""
    try:
        from peft_lrqat.demo.run import DemoArguments, check_arguments, run
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        print("lrqat demo: error: the plot needs matplotlib; run `pip install 'peft-lrqat[demo]'`", file=sys.stderr)
        return 2

    parser = _Parser(
        "demo",
        "[options]",
        [DemoArguments],
        "Quantises a small language model to a few bits in three ways (round-to-nearest, training the scales only,\n"
        "LR-QAT), on this machine and without a network: Python's own help topics are the text. Prints one table, plots the\n"
        "losses, and checks that the saved and the merged adapters give the same perplexity to the last digit.",
        "  lrqat demo\n  lrqat demo --model smollm2 --bits 3 --output smollm2-demo",
    )
    (args,) = parser.parse(argv)
    with parser.user_errors():
        check_arguments(args)
    return run(args)


COMMANDS = {
    "train": (run_train, "train an LR-QAT adapter on a text"),
    "eval": (run_eval, "perplexity of a model, with or without an adapter"),
    "quantize-adapter": (run_quantize_adapter, "store a trained LoRA adapter at a few bits"),
    "dequantize-adapter": (run_dequantize_adapter, "make a standard LoRA adapter of such a one"),
    "recipe": (run_recipe, "settings to train with for a runtime"),
    "export": (run_export, "write a trained model for a runtime, no weight changed"),
    "demo": (run_demo, "LR-QAT against its baselines on a small model, offline, in a few minutes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="lrqat",
        description="LR-QAT: low-rank quantisation-aware training of language models.",
        epilog="commands:\n" + "\n".join(f"  {name:18} {about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="what to do; `lrqat COMMAND --help` tells more")
    command, _ = COMMANDS[parser.parse_args(argv[:1]).command]
    return command(argv[1:])


def _check_training(data: DataArguments, args: TrainArguments) -> None:
    if data.streaming and args.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: a stream has no length from which to plan the learning rate")


def _check_block_size(model: PreTrainedModel, block_size: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and block_size > context:
        raise ValueError(f"--block_size must fit in the model's context of {context} tokens, but it is {block_size}")


def _checkpoint(args: TrainArguments) -> str | None:
    """What `Trainer.train` takes as ``resume_from_checkpoint``."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint == "last":
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is None:
            raise FileNotFoundError(
                f"--resume_from_checkpoint last finds no whole checkpoint in {args.output_dir}; checkpoints are written every"
                " --save_steps steps"
            )
        return checkpoint
    if reason := why_incomplete(args.resume_from_checkpoint):
        raise FileNotFoundError(
            f"--resume_from_checkpoint must be a checkpoint directory of the Trainer, or `last`, but"
            f" {args.resume_from_checkpoint!r} cannot be resumed from: {reason}"
        )
    return args.resume_from_checkpoint


if __name__ == "__main__":
    sys.exit(main())
