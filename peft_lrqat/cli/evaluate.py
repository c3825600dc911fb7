"""`lrqat eval`: the perplexity of a model, with or without an adapter."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from peft import PeftConfig, TaskType

from peft_lrqat.trainer.data import load_tokens
from peft_lrqat.trainer.metrics import check_window, evaluate_perplexity
from peft_lrqat.trainer.pipeline import load_adapter, load_base
from peft_lrqat.trainer.tokenizers import load_tokenizer

from .options import JsonOptions, ModelOptions, WindowOptions
from .parser import Parser


@dataclass(kw_only=True)
class EvalArguments(ModelOptions, WindowOptions, JsonOptions):
    """Which model is evaluated, and on which text."""

    adapter: str | None = field(
        default=None, metadata={"help": "LR-QAT adapter: a directory or a name on the Hub"}
    )
    merge: bool = field(
        default=False, metadata={"help": "merge the adapter into plain linear layers first"}
    )
    dataset: list[str] = field(
        metadata={
            "help": "text files, a directory with a data set, or a data set on the Hub as `name` "
            "or `name:config`"
        }
    )
    split: str = field(default="test", metadata={"help": "split of --dataset, if it has several"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    stride: int | None = field(
        default=None,
        metadata={
            "help": "tokens from one window to the next. Without it, windows do not overlap, and "
            "an incomplete last window is dropped. Smaller than --window: every token but the "
            "first is scored once, with more context"
        },
    )
    batch_size: int = field(default=8, metadata={"help": "windows in a forward pass"})


def run_eval(argv: Sequence[str]) -> int:
    """`lrqat eval`."""
    parser = Parser(
        "eval",
        "[--model M] [--adapter DIR] --dataset D [D ...] [options]",
        [EvalArguments],
        "Measures the perplexity of a causal language model on a text, with or without an adapter.",
        "  lrqat eval --adapter out --dataset test.txt --window 1024\n"
        "  lrqat eval --model ./my-llama --dataset test.txt --window 1024 --stride 512 --json",
    )
    (args,) = parser.parse(argv)
    with parser.user_errors():
        if args.model is None and args.adapter is None:
            raise ValueError("give --model, --adapter, or both")
        if args.merge and args.adapter is None:
            raise ValueError("--merge merges an adapter; give --adapter, or leave --merge out")
        model: Any
        if args.adapter is None:
            name = args.model
            model, tokenizer = load_base(name, args.dtype)
        else:
            config = PeftConfig.from_pretrained(args.adapter)
            _check_task(config)
            model = load_adapter(args.adapter, args.model, args.dtype)
            tokenizer, _ = load_tokenizer(args.adapter, model.config.name_or_path)
            name = args.model or config.base_model_name_or_path
        tokens = load_tokens(
            args.dataset, tokenizer, split=args.split, text_column=args.text_column
        )
        check_window(
            model, tokens, window=args.window, stride=args.stride, batch_size=args.batch_size
        )

    model = model.merge_and_unload() if args.merge else model
    model = model.to(PartialState().device)
    result = evaluate_perplexity(
        model, tokens, window=args.window, stride=args.stride, batch_size=args.batch_size
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(args) | {"model": name} | result))
        return 0
    overlap = f"stride {args.stride}" if args.stride else "not overlapping"
    print(
        f"perplexity {result['perplexity']:.4f} ({result['nats_per_token']:.4f} nats per token; "
        f"{result['tokens']:,} tokens scored; windows of {args.window}, {overlap})"
    )
    return 0


def _check_task(config: PeftConfig) -> None:
    """ValueError for an adapter that does not predict the next token."""
    if config.task_type not in (None, TaskType.CAUSAL_LM):
        raise ValueError(
            "perplexity is measured of causal language models, but the `task_type` of this adapter"
            f" is {config.task_type}; evaluate it in Python with the metric of its task"
        )
