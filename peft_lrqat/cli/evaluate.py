"""`lrqat eval` and `lrqat compare`: perplexity of models, and how far apart they are."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_lrqat.shared.plotting import require_matplotlib
from peft_lrqat.shared.staging import check_target
from peft_lrqat.trainer.comparison import Comparison, compare_models
from peft_lrqat.trainer.data import concatenate, load_documents, text_bytes, tokenize
from peft_lrqat.trainer.llama_cpp import evaluate_in_llama_cpp, require_llama_cpp
from peft_lrqat.trainer.metrics import check_window, evaluate_perplexity
from peft_lrqat.trainer.opening import (
    Opened,
    gguf_file,
    gguf_tokenizer,
    is_adapter,
    open_model,
    read_gguf,
)
from peft_lrqat.trainer.record import EXAMPLE_LENGTH
from peft_lrqat.trainer.tasks import Tasks

from .fields import given_names
from .options import DATASET_HELP, HeldOutOptions, JsonOptions, ModelOptions
from .parser import Parser, print_columns


DEFAULT_WINDOW = 512
_TASK_OPTIONS = {"task_path", "num_fewshot", "limit", "apply_chat_template"}


@dataclass(kw_only=True)
class EvalArguments(ModelOptions, HeldOutOptions, JsonOptions):
    """Which models are evaluated, and on what."""

    dataset: list[str] | None = field(
        default=None, metadata={"help": DATASET_HELP + ". Not needed with --tasks"}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "LR-QAT adapter: a directory or a name on the Hub"}
    )
    merge: bool = field(
        default=False, metadata={"help": "merge the adapter into plain linear layers first"}
    )
    llama_cpp: bool = field(
        default=False,
        metadata={
            "help": "run GGUF files in llama.cpp itself (package xllamacpp), token after token. "
            "Without it, their weights are read into transformers, which is faster"
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "tasks of lm-eval, such as arc_easy piqa (pip install 'peft-lrqat[tasks]')"
        },
    )
    task_path: str | None = field(
        default=None,
        metadata={"help": "directory with task files (YAML) of your own, for local data"},
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "examples before each question. Default: the task's"}
    )
    limit: int | None = field(
        default=None, metadata={"help": "ask the first questions of each task only"}
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "ask the questions of --tasks as in a chat"}
    )


@dataclass(kw_only=True)
class CompareArguments(ModelOptions, HeldOutOptions, JsonOptions):
    """On which text, and how it is shown."""

    dataset: list[str] = field(metadata={"help": DATASET_HELP})
    plot: str | None = field(
        default=None, metadata={"help": "also draw the table, into this PNG or SVG file"}
    )


def run_eval(argv: Sequence[str]) -> int:
    """`lrqat eval`."""
    parser = Parser(
        "eval",
        "(PATH [PATH ...] | --model M | --adapter DIR) [--dataset D ...] [--tasks T ...] [options]",
        [EvalArguments],
        "Measures causal language models: their perplexity on a text, and what they score in\n"
        "tasks. PATH is an adapter, a model, a low-bit base, an export or a GGUF file; of\n"
        "several, the result is one table.",
        "  lrqat eval out --dataset test.txt --window 1024\n"
        "  lrqat eval ./my-llama out out-packed model.gguf --dataset test.txt\n"
        "  lrqat eval ./my-llama out --tasks arc_easy piqa --limit 500\n"
        "  lrqat eval --model ./my-llama --dataset test.txt --window 1024 --stride 512 --json",
    )
    parser.add_argument("paths", metavar="PATH", nargs="*", help="what is measured")
    args, more = parser.parse(argv)
    with parser.user_errors():
        places = _places(args, more.paths)
        if args.dataset is None and args.tasks is None:
            raise ValueError("give --dataset, for perplexity, or --tasks, or both")
        if args.merge and not (len(places) == 1 and is_adapter(places[0])):
            raise ValueError("--merge merges an adapter; give one alone, or leave --merge out")
        if args.tasks is None and (alone := _TASK_OPTIONS & given_names(parser.words)):
            raise ValueError(f"--{min(alone)} is for --tasks; name them, or leave it out")
        if args.llama_cpp:
            _check_llama_cpp(args, places)
        tasks = None if args.tasks is None else Tasks(_split(args.tasks), args.task_path)
        text = None if args.dataset is None else _Text(args, places)
    rows = [_measure(parser, place, args, text, tasks) for place in places]
    if args.json:
        options = dataclasses.asdict(args) | {"window": None if text is None else text.window}
        print(json.dumps(options | (rows[0] if len(rows) == 1 else {"models": rows})))
        return 0
    if text is not None:
        (_print_one if len(rows) == 1 else _print_several)(rows, text.window, args.stride)
    if tasks is not None:
        _print_tasks(rows)
    return 0


def _measure(
    parser: Parser,
    place: str,
    args: EvalArguments,
    text: _Text | None,
    tasks: Tasks | None,
) -> dict[str, Any]:
    """All that is said about one of the models."""
    file = gguf_file(place) if args.llama_cpp else None
    row: dict[str, Any] = {"name": place, "kind": "GGUF in llama.cpp", "model": place}
    if file is not None and text is not None:
        with parser.user_errors():
            read_gguf(file)
            tokens = text.tokens(gguf_tokenizer(file))
            seen: dict[str, Any] = {"window": text.window, "stride": args.stride}
            return row | text.in_bytes(evaluate_in_llama_cpp(file, tokens, **seen), tokens)
    with parser.user_errors():
        opened = open_model(place, args.dtype, base=args.model)
        base = None if opened.config is None else opened.config.base_model_name_or_path
        row |= {"kind": opened.kind, "model": args.model or base or place}
        if text is not None:
            tokens = text.tokens(opened.tokenizer)
            check_window(opened.model, tokens, **text.seen)
    model = opened.model.merge_and_unload() if args.merge else opened.model
    model.to(PartialState().device)
    if text is not None:
        row |= text.in_bytes(evaluate_perplexity(model, tokens, **text.seen), tokens)
    if tasks is not None:
        with parser.user_errors():
            row["tasks"] = tasks.evaluate(
                model,
                opened.tokenizer,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=args.apply_chat_template,
                batch_size=args.batch_size,
            )
    return row


def run_compare(argv: Sequence[str]) -> int:
    """`lrqat compare`."""
    parser = Parser(
        "compare",
        "REFERENCE CANDIDATE [CANDIDATE ...] --dataset D [D ...] [options]",
        [CompareArguments],
        "Measures how far the predictions of models are from those of a reference, on a text:\n"
        "perplexity, divergence from the reference, and how often both choose the same token.\n"
        "Each is an adapter, a model, a low-bit base, an export or a GGUF file.",
        "  lrqat compare ./my-llama out out-packed --dataset test.txt --plot compare.png\n"
        "  lrqat compare out model-gguf --dataset test.txt --json",
    )
    parser.add_argument("reference", metavar="REFERENCE", help="what the others are compared with")
    parser.add_argument("candidates", metavar="CANDIDATE", nargs="+", help="what is compared")
    args, places = parser.parse(argv)
    with parser.user_errors():
        if args.plot is not None:
            require_matplotlib()
            check_target(args.plot)
        text = _Text(args, [places.reference, *places.candidates])
        reference = open_model(places.reference, args.dtype, base=args.model)
        tokens = text.tokens(reference.tokenizer)
        check_window(reference.model, tokens, **text.seen)
    device = PartialState().device
    reference.model.to(device)
    found: dict[str, Comparison] = {}
    for place in places.candidates:
        with parser.user_errors():
            candidate = open_model(place, args.dtype, base=args.model)
            check_window(candidate.model, tokens, **text.seen)
            _check_same_tokens(reference, candidate)
        found[place] = compare_models(
            reference.model, candidate.model.to(device), tokens, **text.seen
        )
        del candidate
    if args.plot is not None:
        plot_comparisons(found, args.plot)
    if args.json:
        rows = [{"name": place, **dataclasses.asdict(row)} for place, row in found.items()]
        of = {"reference": places.reference, "window": text.window, "stride": args.stride}
        print(json.dumps(of | {"dataset": args.dataset, "candidates": rows}))
        return 0
    print_columns(
        ("against " + places.reference, "perplexity", "KL mean", "KL 99%", "same first choice"),
        [
            (
                place,
                f"{row.perplexity:.3f}",
                _with_error(row.kl_mean, row.kl_error, 4),
                f"{row.kl_99:.3f}",
                _with_error(100 * row.same_top, _times(100, row.same_top_error), 2) + " %",
            )
            for place, row in found.items()
        ],
    )
    count = next(iter(found.values())).tokens
    overlap = _overlap(args.stride)
    print(f"{count:,} tokens scored; windows of {text.window}, {overlap}; KL in nats")
    return 0


def plot_comparisons(found: dict[str, Comparison], file: str) -> None:
    """A panel for each figure, a bar for each candidate, with its standard error."""
    from matplotlib.figure import Figure

    panels: dict[str, tuple[list[float], list[float | None]]] = {
        "KL from the reference (nats)": (
            [row.kl_mean for row in found.values()],
            [row.kl_error for row in found.values()],
        ),
        "nats per token above the reference": (
            [row.nats_difference for row in found.values()],
            [row.nats_difference_error for row in found.values()],
        ),
        "other first choice (share)": (
            [1 - row.same_top for row in found.values()],
            [row.same_top_error for row in found.values()],
        ),
    }
    height = 1.5 + 0.5 * len(found)
    figure = Figure(figsize=(12, height), layout="constrained")
    for axes, (title, (values, errors)) in zip(
        figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True
    ):
        bars = axes.barh(list(found), values, xerr=[error or 0.0 for error in errors])
        axes.bar_label(bars, fmt="%.3g", padding=3)
        axes.margins(x=0.2)
        axes.set_title(title, fontsize=10)
    axes.invert_yaxis()
    figure.savefig(file, dpi=120)


class _Text:
    """The text that all models of a command are measured on, and the windows."""

    def __init__(self, args: Any, places: Sequence[str]) -> None:
        self._args = args
        self._documents: Any = load_documents(
            args.dataset, split=args.split, text_column=args.text_column
        )
        self.bytes = max(1, text_bytes(self._documents, text_column=args.text_column))
        self.window = _window(args, places)
        self.seen: dict[str, Any] = {
            "window": self.window,
            "stride": args.stride,
            "batch_size": args.batch_size,
        }

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        column = self._args.text_column
        return concatenate(tokenize(self._documents, tokenizer, text_column=column))

    def in_bytes(self, found: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        """Adds the bits per byte, which can be compared between tokenizers."""
        bits = found["nats_per_token"] / math.log(2) * len(tokens) / self.bytes
        return found | {"bits_per_byte": bits}


def _split(names: list[str]) -> list[str]:
    """Tasks, apart by spaces or, as lm-eval has them, by commas."""
    return [name for several in names for name in several.split(",") if name]


def _check_llama_cpp(args: EvalArguments, places: list[str]) -> None:
    require_llama_cpp()
    if not any(gguf_file(place) for place in places):
        raise ValueError("--llama_cpp runs GGUF files, but none is among the paths")
    if args.tasks is not None:
        raise ValueError("--tasks are asked in transformers; leave --llama_cpp out")


def _window(args: Any, places: Sequence[str]) -> int:
    """What was asked for, else what the first of the adapters that says so was trained on.

    One window for all, because perplexity depends on it.
    """
    if args.window is not None:
        return args.window
    for place in places:
        config = PeftConfig.from_pretrained(place) if is_adapter(place) else None
        record = getattr(config, "training_record", None) or {}
        if (length := record.get("settings", {}).get(EXAMPLE_LENGTH)) is not None:
            return int(length)
    return DEFAULT_WINDOW


def _places(args: Any, paths: list[str]) -> list[str]:
    """What is measured, in order."""
    if paths:
        if args.adapter is not None:
            raise ValueError("give paths, or --adapter, not both")
        return paths
    if args.adapter is not None:
        if not is_adapter(args.adapter):
            raise ValueError(f"there is no adapter in {args.adapter}, here or on the Hub")
        return [args.adapter]
    if args.model is None:
        raise ValueError("give PATH, or --model, --adapter, or both")
    return [args.model]


def _check_same_tokens(reference: Opened, candidate: Opened) -> None:
    if reference.tokenizer.get_vocab() != candidate.tokenizer.get_vocab():
        raise ValueError(
            f"{candidate.name} has another tokenizer than {reference.name}, so their predictions "
            "are of other tokens; compare models of one tokenizer, or use `lrqat eval`, whose bits "
            "per byte can be compared"
        )


def _print_one(rows: list[dict[str, Any]], window: int, stride: int | None) -> None:
    (row,) = rows
    error = row["nats_standard_error"]
    print(
        f"perplexity {row['perplexity']:.4f} "
        f"({_with_error(row['nats_per_token'], error, 4)} nats per token, "
        f"{row['bits_per_byte']:.4f} bits per byte; {row['tokens']:,} tokens scored; windows of "
        f"{window}, {_overlap(stride)})"
    )


def _print_several(rows: list[dict[str, Any]], window: int, stride: int | None) -> None:
    print_columns(
        ("", "kind", "perplexity", "nats per token", "bits per byte", "tokens"),
        [
            (
                row["name"],
                row["kind"],
                f"{row['perplexity']:.3f}",
                _with_error(row["nats_per_token"], row["nats_standard_error"], 4),
                f"{row['bits_per_byte']:.4f}",
                f"{row['tokens']:,}",
            )
            for row in rows
        ],
    )
    print(f"windows of {window}, {_overlap(stride)}; ± is one standard error, over windows")


def _print_tasks(rows: list[dict[str, Any]]) -> None:
    """A line for each model and metric: what counts are shares of 1, and so are most metrics."""
    print_columns(
        ("", "task", "metric", "score", "questions"),
        [
            (
                row["name"],
                name,
                metric,
                _with_error(score["value"], score["standard_error"], 4),
                "" if task["questions"] is None else f"{task['questions']:,}",
            )
            for row in rows
            for name, task in row["tasks"].items()
            for metric, score in task["metrics"].items()
        ],
    )
    print("± is one standard error, over questions")


def _overlap(stride: int | None) -> str:
    return f"stride {stride}" if stride else "not overlapping"


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _with_error(value: float, error: float | None, digits: int) -> str:
    plain = f"{value:.{digits}f}"
    return plain if error is None else f"{plain} ± {error:.{digits}f}"
