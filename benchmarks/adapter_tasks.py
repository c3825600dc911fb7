"""Tasks with a score for each held-out item, and LoRA adapters trained on them.

    sst2   the right one of two words after a sentence, SST-2: share right
    gsm8k  the worked answer to a question, GSM8K: nats per token
    e2e    a text for a meaning representation, E2E, greedily: share of its values that the text has
    text   what follows in a text, CPython's help topics by default: nats per token

All training is on the tokens of the answer alone.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.optimization import get_scheduler

from peft_lrqat.demo.text import load_topics


WORDS = (" negative", " positive")
BLOCK = 256  # tokens of an example of a text
LONGEST = 128  # tokens of an example of a task; longer ones are left out
BATCH = 2048  # tokens that are scored at once
NEW_TOKENS = 40  # of a text that is generated
RANK, ALPHA, LEARNING_RATE = 16, 32, 5e-4


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is given, what should follow, and the values that it should name."""

    prompt: list[int]
    answer: list[int]
    values: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


Split = tuple[list[Example], list[Example]]  # for training, and held out


# Reading


def read_sst2(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Split:
    def examples(split: str) -> list[Example]:
        rows = (folder / f"sst2_{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        return [
            encode(tokenizer, f"{sentence.strip()}\nSentiment:", WORDS[int(label)])
            for sentence, label in (row.split("\t") for row in chosen(rows))
        ]

    return examples("train"), examples("dev")


def read_gsm8k(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Split:
    lines = (folder / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    made = (
        encode(tokenizer, f"Question: {row['question']}\nAnswer:", f" {row['answer']}")
        for row in map(json.loads, chosen(lines))
    )
    return parted(made, 0.25)


def read_e2e(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Split:
    lines = (folder / "e2e_valid.txt").read_text(encoding="utf-8").splitlines()
    texts: dict[str, list[str]] = {}
    for meaning, _, text in (line.partition("||") for line in lines):
        texts.setdefault(meaning.strip(), []).append(text.strip())
    made = []
    for meaning in chosen(list(texts)):
        slots = dict(slot.strip().split(" : ", 1) for slot in meaning.split(" | "))
        # "no" does not stand in "not family-friendly".
        values = tuple(value for slot, value in slots.items() if slot != "family friendly")
        end = f" {texts[meaning][0]}{tokenizer.eos_token}"
        made.append(encode(tokenizer, f"Data: {meaning}\nText:", end, values))
    return parted(made, 0.5)


def read_text(file: Path | None, tokenizer: PreTrainedTokenizerBase) -> Split:
    if file is None:
        texts = ["\n\n".join(load_topics(split)) for split in ("train", "heldout")]
    else:
        text = file.read_text(encoding="utf-8")
        texts = [text[: len(text) * 3 // 4], text[len(text) * 3 // 4 :]]

    def blocks(text: str) -> list[Example]:
        ids = tokenizer(text)["input_ids"]
        starts = range(0, len(ids) - BLOCK + 1, BLOCK)
        # The first token has nothing before it.
        return [Example(prompt=[ids[s]], answer=ids[s + 1 : s + BLOCK]) for s in starts]

    return blocks(texts[0]), blocks(texts[1])


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, values: tuple[str, ...] = ()
) -> Example:
    prompt_ids, answer_ids = (tokenizer(text)["input_ids"] for text in (prompt, answer))
    return Example(prompt=prompt_ids, answer=answer_ids, values=values)


def chosen(rows: list[str]) -> list[str]:
    """The rows in an order of chance that is always the same."""
    return random.Random(0).sample(rows, len(rows))


def parted(examples: Iterable[Example], share: float) -> Split:
    """A share to train on and the rest, of the examples that are not too long."""
    short = [example for example in examples if len(example) <= LONGEST]
    count = int(share * len(short))
    return short[:count], short[count:]


# Training


def trained(
    base: Path, examples: list[Example], *, seed: int, tokens: int, batch_size: int
) -> tuple[nn.Module, int]:
    """A LoRA adapter on all linear layers of the bfloat16 base, and the tokens it has seen.

    It sees examples chosen by the seed, ``tokens`` in all, each once, ``batch_size`` tokens a step.
    """
    set_seed(seed)
    left, seen = tokens, []
    for example in random.Random(seed).sample(examples, len(examples)):
        if len(example) <= left:
            seen.append(example)
            left -= len(example)
    batches = list(batched(seen, batch_size))
    random.Random(seed).shuffle(batches)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=RANK, lora_alpha=ALPHA
    )
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    schedule = get_scheduler("linear", optimizer, round(0.1 * len(batches)), len(batches))
    adapted.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = answer_losses(model, batch)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return adapted, tokens - left


# Scoring


def batched(examples: list[Example], tokens: int) -> Iterable[list[Example]]:
    """Examples of similar length, together up to ``tokens``, padding included."""
    batch: list[Example] = []
    for example in sorted(examples, key=len):
        if batch and len(example) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def hidden_states(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Last hidden states (rows, tokens, width); padding stands behind, where causality hides it."""
    length = max(map(len, rows))
    return model.model(
        torch.tensor([row + [0] * (length - len(row)) for row in rows]), use_cache=False
    ).last_hidden_state


def answer_losses(model: nn.Module, batch: list[Example]) -> tuple[Tensor, list[int]]:
    """The loss of each token of the answers, one answer after another, and their lengths."""
    hidden = hidden_states(model, [e.prompt + e.answer for e in batch])
    # The logits of other places would cost much, and nothing asks for them.
    places = [
        states[len(e.prompt) - 1 : len(e) - 1] for states, e in zip(hidden, batch, strict=True)
    ]
    logits = model.lm_head(torch.cat(places)).float()
    targets = torch.tensor([token for e in batch for token in e.answer])
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses, [len(e.answer) for e in batch]


def score_choice(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> list[float]:
    """1 where the right one of the two words is the likelier one."""
    words = [tokenizer(word)["input_ids"][0] for word in WORDS]
    found = []
    for batch in batched(examples, BATCH):
        hidden = hidden_states(model, [e.prompt for e in batch])
        last = hidden[torch.arange(len(batch)), [len(e.prompt) - 1 for e in batch]]
        picked = (last.float() @ model.lm_head.weight[words].float().T).argmax(-1).tolist()
        found += [float(words[p] == e.answer[0]) for p, e in zip(picked, batch, strict=True)]
    return found


def score_likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> list[float]:
    """Nats per token of each answer."""
    found = []
    for batch in batched(examples, BATCH):
        losses, lengths = answer_losses(model, batch)
        found += [float(answer.mean()) for answer in losses.split(lengths)]
    return found


def score_values(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> list[float]:
    """Share of the values that the generated text has, letter for letter."""
    found = []
    for batch in batched(examples, 4 * BATCH):  # most steps see one token of each
        length = max(len(e.prompt) for e in batch)
        pad = tokenizer.eos_token_id
        written = model.generate(
            torch.tensor([[pad] * (length - len(e.prompt)) + e.prompt for e in batch]),
            attention_mask=torch.tensor(
                [[0] * (length - len(e.prompt)) + [1] * len(e.prompt) for e in batch]
            ),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad,
        )
        for row, example in zip(written[:, length:], batch, strict=True):
            # A base that was not trained goes on with other lines.
            text = tokenizer.decode(row, skip_special_tokens=True).strip().split("\n")[0].lower()
            found.append(sum(v.lower() in text for v in example.values) / len(example.values))
    return found


Score = Callable[[nn.Module, PreTrainedTokenizerBase, list[Example]], list[float]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a task is read and scored."""

    read: Callable[[Path | None, PreTrainedTokenizerBase], Split]
    measure: str
    score: Score
    percent: bool  # the score is a share
    tokens: int  # to train on
    items: int  # to score


TASKS = {
    "sst2": Task(
        read=read_sst2,
        measure="accuracy",
        score=score_choice,
        percent=True,
        tokens=12_000,
        items=1000,
    ),
    "gsm8k": Task(
        read=read_gsm8k,
        measure="nats per token",
        score=score_likelihood,
        percent=False,
        tokens=14_000,
        items=120,
    ),
    "e2e": Task(
        read=read_e2e,
        measure="values named",
        score=score_values,
        percent=True,
        tokens=10_000,
        items=100,
    ),
    "text": Task(
        read=read_text,
        measure="nats per token",
        score=score_likelihood,
        percent=False,
        tokens=20_000,
        items=100,
    ),
}
