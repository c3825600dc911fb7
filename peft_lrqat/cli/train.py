"""`lrqat train`: trains an LR-QAT adapter on a text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from peft_lrqat.trainer import LRQATTrainingArguments, last_complete_checkpoint
from peft_lrqat.trainer.chats import (
    CLOSE,
    OPEN,
    check_packing,
    is_chat,
    make_chat_blocks,
    marked,
)
from peft_lrqat.trainer.checkpoint import check_no_checkpoints, why_incomplete
from peft_lrqat.trainer.data import load_rows, make_blocks, only_text
from peft_lrqat.trainer.labels import IGNORED
from peft_lrqat.trainer.pipeline import describe_size, load_base, load_model, make_trainer

from .fields import given_names
from .options import AdapterArguments, ModelOptions, adapter_config
from .parser import Parser
from .run_file import write_run_file
from .stop import StopOnSignal


@dataclass(kw_only=True)
class DataArguments(ModelOptions):
    """What is trained, and on which text."""

    _argument_group_name = "model and data"

    model: str = field(
        metadata={
            "help": "causal language model that is not quantised: a directory or a name on the Hub"
        }
    )
    dataset: list[str] = field(
        metadata={
            "help": "training data: files (plain text, one document each, or jsonl, csv, parquet; "
            "chats have a column `messages`, or `prompt` and `completion`), a "
            "directory with a data set, or a data set on the Hub as `name` or `name:config`"
        }
    )
    eval_dataset: list[str] | None = field(
        default=None,
        metadata={
            "help": "text on which perplexity is measured before and after training, given like "
            "--dataset"
        },
    )
    split: str = field(default="train", metadata={"help": "split of --dataset, if it has several"})
    eval_split: str = field(
        default="validation", metadata={"help": "split of --eval_dataset, if it has several"}
    )
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    loss: Literal["completion", "all"] = field(
        default="completion",
        metadata={
            "help": "what is scored of chats (column `messages`, or `prompt` and `completion`). "
            "completion: the answers of the assistant; all: every token"
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "file with a chat template (Jinja). Default: the tokenizer's own"},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "put several chats into a block where they fit; none sees another. Plain text "
            "always fills its blocks"
        },
    )
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "unquantised model for --distillation_weight: a directory or a name on the "
            "Hub. Default: the one that the base model is or was made from"
        },
    )
    block_size: int = field(
        default=512, metadata={"help": "tokens in a training example and in an evaluation window"}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the training data while training, for data larger than the disk; needs "
            "--max_steps"
        },
    )


@dataclass(kw_only=True)
class TrainArguments(LRQATTrainingArguments):
    """`LRQATTrainingArguments` as options of the command line."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str = field(
        metadata={"help": "directory for the adapter, its tokenizer and the checkpoints"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "checkpoint directory to resume from, or `last` for the newest whole one in "
            "--output_dir"
        },
    )


def run_train(argv: Sequence[str]) -> int:
    """`lrqat train`."""
    parser = Parser(
        "train",
        "--model M --dataset D [D ...] --output_dir DIR [options]",
        [DataArguments, AdapterArguments, TrainArguments],
        "Trains an LR-QAT adapter on a text or on chats. The linear layers of a causal language\n"
        "model are rounded to a few bits, and low-rank factors inside the rounding recover what\n"
        "this costs.\n"
        "Saves the adapter and the tokenizer in --output_dir. Ctrl-C saves a checkpoint and stops.",
        "  lrqat train --model ./my-llama --dataset corpus.txt --bits 3 --output_dir out\n"
        "  lrqat train --model HuggingFaceTB/SmolLM2-135M --bits 4 --group_size 64 \\\n"
        "      --dataset Salesforce/wikitext:wikitext-2-raw-v1 \\\n"
        "      --eval_dataset Salesforce/wikitext:wikitext-2-raw-v1 \\\n"
        "      --max_steps 1000 --output_dir out",
    )
    data, adapter, args = parser.parse(argv)
    with parser.user_errors():
        _check_training(data, args)
        config = adapter_config(adapter, given_names(parser.words))
        rows = _rows(data, data.dataset, data.split)
        eval_rows = data.eval_dataset and _rows(data, data.eval_dataset, data.eval_split)
        base, tokenizer = load_base(data.model, data.dtype)
        _check_block_size(base, data.block_size)
        if data.chat_template is not None:
            tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
        train_set = _examples(data, data.dataset, rows, tokenizer)
        eval_set = eval_rows and _examples(data, data.eval_dataset, eval_rows, tokenizer)
        set_seed(args.seed)  # for the factors A
        model = get_peft_model(base, config)
        resume = _checkpoint(args)

        teacher = None if data.teacher_model is None else load_model(data.teacher_model, data.dtype)
        trainer = make_trainer(model, tokenizer, args, train_set, eval_set or None, teacher)
        check_packing(model.get_base_model(), train_set)  # on the device, where it is quick

    say = print if trainer.is_world_process_zero() else lambda *_: None
    say(describe_size(model))
    before = trainer.evaluate() if eval_set else None
    stop = StopOnSignal()
    trainer.add_callback(stop)
    with stop.listening():
        trainer.train(resume_from_checkpoint=resume)
    if stop.received:
        say(
            f"stopped after step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; "
            "to continue, run the same command with --resume_from_checkpoint last"
        )
        return 128 + stop.received  # as shells report it
    after = trainer.evaluate() if before else None
    # With --push_to_hub this also publishes; the card has the metrics of the line below.
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        options = {
            name: value for part in (data, adapter, args) for name, value in vars(part).items()
        }
        write_run_file(str(args.output_dir), options, parser.words)
    if before and after:
        say(
            f"perplexity before training (round-to-nearest) {before['eval_perplexity']:.3f}, "
            f"after {after['eval_perplexity']:.3f}; {after['eval_tokens']:,} tokens scored, "
            f"windows of {data.block_size}"
        )
    say(f"adapter saved in {args.output_dir}")
    return 0


def _rows(data: DataArguments, source: list[str], split: str) -> Any:
    """The rows of a data set; only --dataset is streamed."""
    streaming = data.streaming and source is data.dataset
    rows: Any = load_rows(source, split=split, streaming=streaming)
    if is_chat(rows):
        if streaming:
            raise ValueError("--streaming reads plain text; leave it out for chats")
        return rows
    return only_text(rows, data.text_column, ", ".join(source))


def _examples(
    data: DataArguments, source: list[str], rows: Any, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """Blocks of a text or of chats, whichever the columns say."""
    if not is_chat(rows):
        return make_blocks(
            rows, tokenizer, block_size=data.block_size, text_column=data.text_column
        )
    blocks = make_chat_blocks(
        rows, tokenizer, block_size=data.block_size, loss=data.loss, packing=data.packing
    )
    if PartialState().is_main_process:
        scored = sum(label != IGNORED for labels in blocks["labels"] for label in labels)
        print(
            f"{', '.join(source)}: {len(rows):,} examples in {len(blocks):,} blocks, "
            f"{scored:,} scored tokens. The first one; scored is what is between {OPEN} and "
            f"{CLOSE}:\n"
            f"{marked(rows[0], tokenizer, loss=data.loss)}"
        )
    return blocks


def _check_training(data: DataArguments, args: TrainArguments) -> None:
    if data.chat_template is not None and not Path(data.chat_template).is_file():
        raise ValueError(f"--chat_template must be a file, but {data.chat_template} is none")
    if data.teacher_model is not None and args.distillation_weight == 0:
        raise ValueError(
            "--teacher_model is for --distillation_weight; set that, to 0.5 for example"
        )
    if data.streaming and args.max_steps <= 0:
        raise ValueError(
            "--streaming needs --max_steps: without the length of the data, the learning rate "
            "cannot be planned"
        )


def _check_block_size(model: PreTrainedModel, block_size: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and block_size > context:
        raise ValueError(
            f"--block_size must fit in the model's context of {context} tokens, but it is "
            f"{block_size}"
        )


def _checkpoint(args: TrainArguments) -> str | None:
    """What `Trainer.train` takes as ``resume_from_checkpoint``."""
    if args.resume_from_checkpoint is None:
        if not args.overwrite_checkpoints:
            check_no_checkpoints(args.output_dir)
        return None
    if args.resume_from_checkpoint == "last":
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is None:
            raise FileNotFoundError(
                f"--resume_from_checkpoint last finds no whole checkpoint in {args.output_dir}; "
                "one is written every --save_steps steps"
            )
        return checkpoint
    if reason := why_incomplete(args.resume_from_checkpoint):
        raise FileNotFoundError(
            "--resume_from_checkpoint must be a checkpoint directory of the Trainer, or `last`, "
            f"but {args.resume_from_checkpoint!r} cannot be resumed from: {reason}"
        )
    return args.resume_from_checkpoint
