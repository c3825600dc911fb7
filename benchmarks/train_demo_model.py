"""Trains the small Llama that ships in `peft_lrqat/demo/model`, from scratch, on the documentation
that CPython carries.

    python benchmarks/train_demo_model.py

Text: the train side of the help topics (`pydoc_data.topics`), which alone are too few to load every
weight, and the docstrings of the standard library. A model this small, trained for many epochs
without regularisation, feels every bit of its weights: rounding them to 3 or 2 bits does real
damage, which a larger and less trained one would hardly notice. The defaults give the shipped
model, in about 20 minutes on one core; its exact weights also depend on the versions of Python and
PyTorch.
"""

import argparse
import ast
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from peft_lrqat.demo import load_topics, model_path


BOS, EOS = "<s>", "</s>"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=model_path())
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--intermediate-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument(
        "--window", type=int, default=256, help="tokens per training and evaluation window"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument(
        "--eval-every", type=int, default=250, help="steps between two held-out evaluations"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak of the schedule")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts BOS in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts in one row of token ids, each between BOS and EOS."""
    eos = tokenizer.eos_token_id
    return torch.tensor(
        [i for text in texts for i in [*tokenizer(text, verbose=False).input_ids, eos]]
    )


def docstrings() -> Iterator[str]:
    """One text for each module of the standard library that has docstrings; a docstring that comes
    twice is taken once.
    """
    root, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts[0] in ("site-packages", "pydoc_data", "ensurepip", "idlelib", "lib2to3") or {
            "test",
            "tests",
        } & {*parts}:
            continue
        found = []
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40 and text not in seen:
                    seen.add(text)
                    found.append(text)
        if found:
            yield "\n\n".join(found)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Untrained model with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=2 * args.window,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor, window: int) -> float:
    """Per token, over windows that do not overlap; the first token of a window is not scored."""
    model.eval()
    total = scored = 0
    for chunk in tokens.split(window):
        if len(chunk) > 1:
            total += model(input_ids=chunk[None], labels=chunk[None]).loss.item() * (len(chunk) - 1)
            scored += len(chunk) - 1
    return math.exp(total / scored)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to the peak, then a cosine to a hundredth of it."""
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    done = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    return args.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Weights in float16, and the tokenizer in a form that transformers 4 and 5 both load."""
    model.to(torch.float16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    args = parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    texts = [*load_topics("train"), *docstrings()]
    tokenizer = train_tokenizer(texts, args.vocab_size, max_length=2 * args.window)
    train, heldout = token_stream(tokenizer, texts), token_stream(tokenizer, load_topics("heldout"))
    model = build_model(args, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)
    )
    print(
        f"parameters {model.num_parameters():,}; tokens: train {len(train):,}, held-out "
        f"{len(heldout):,}",
        flush=True,
    )

    best, best_state, start = math.inf, {}, time.perf_counter()
    for step in range(1, args.steps + 1):
        model.train()
        # Windows start anywhere, so that no two epochs cut the text in the same places.
        starts = torch.randint(len(train) - args.window, (args.batch_size,))
        batch = torch.stack([train[i : i + args.window] for i in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0 or step == args.steps:
            current, seconds = perplexity(model, heldout, args.window), time.perf_counter() - start
            print(
                f"step {step}: loss {loss.item():.3f}, held-out perplexity {current:.2f}, "
                f"{seconds:.0f} s",
                flush=True,
            )
            if current < best:
                best, best_state = current, {k: v.clone() for k, v in model.state_dict().items()}

    model.load_state_dict(best_state)
    print(
        f"best: train {perplexity(model, train, args.window):.2f}, held-out {best:.2f}", flush=True
    )
    save(model, tokenizer, args.output_dir)
    print(
        f"{sum(p.stat().st_size for p in args.output_dir.iterdir()):,} bytes in "
        f"{args.output_dir.name}/"
    )


if __name__ == "__main__":
    main()
