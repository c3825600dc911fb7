"""What packing costs a real LoRA adapter: perplexity or accuracy, error, true bits and bytes, by
method.

    python benchmarks/loraquant.py                                        # SmolLM2-135M on Python's
    help topics python benchmarks/loraquant.py --style shakespeare=tinyshakespeare.txt --style
    stories=stories.txt \\
        --task sst2=sst2_train.tsv,sst2_dev.tsv                           # files of your own

Each adapter is trained once (rank 16, all linear layers, bfloat16 base) and kept in ``--output``;
so is each finished row, and a second run goes on where the first ended. A style is a text, whose
last part is held out; its score is perplexity. A task is two files of tab-separated ``sentence``
and ``label`` (0 negative, 1 positive); its score is the share of sentences for which the right word
is the likelier one. About 5 minutes of training and 20 seconds a row for each adapter, on one core.

    FP16        the adapter itself, in float16
    RTN, sign   B and A each rounded as they are, by columns of B and rows of A, in groups of 128
    paper       LoRAQuant as published, bits_high @ ratio
    residual    this package's procedure in the storage that the paper's would take; or at
    --average_bits
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat.demo.smollm2 import load_smollm2
from peft_lrqat.demo.text import load_topics
from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter
from peft_lrqat.quant.factors.groups import quantize_midrise, quantize_rtn
from peft_lrqat.quant.factors.svd import squared_error, squared_norm
from peft_lrqat.quant.packing import packed_bytes
from peft_lrqat.trainer.metrics import evaluate_perplexity


WEIGHTS = "adapter_model.safetensors"
GROUP_SIZE, SCALE_DTYPE = 128, torch.bfloat16
BLOCK, HELD_OUT = 512, 8192  # tokens
WORDS = (" negative", " positive")
PLAIN = {"RTN 2-bit": (2, quantize_rtn), "sign 1-bit": (1, quantize_midrise)}
VARIANTS = [(2, 0.8), (2, 0.9), (3, 0.8)]


class Style:
    """A text to imitate; scored by perplexity on the part that was held out."""

    score = "perplexity"

    def __init__(self, path: str | None, tokenizer, steps: int, batch_size: int) -> None:
        texts = (
            ["\n\n".join(load_topics(split)) for split in ("train", "heldout")]
            if path is None
            else [read(path)]
        )
        ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
        if len(ids) == 1:
            ids = [ids[0][:-HELD_OUT], ids[0][-HELD_OUT:]]
        blocks = ids[0][: len(ids[0]) // BLOCK * BLOCK].view(-1, BLOCK).tolist()
        self.train_set = Dataset.from_dict({"input_ids": blocks, "labels": blocks})
        self.held_out = ids[-1][:HELD_OUT]
        self.collate = default_data_collator
        self.options = {"per_device_train_batch_size": batch_size, "max_steps": steps}

    def measure(self, model) -> float:
        return evaluate_perplexity(
            model, self.held_out, window=BLOCK, batch_size=4, progress=False
        )["perplexity"]


class Task:
    """Sentiment of a sentence as the next word after a prompt; scored by the share right."""

    score = "accuracy"

    def __init__(self, path: str, tokenizer, steps: int, batch_size: int) -> None:
        train, dev = (
            load_dataset("csv", data_files=p, delimiter="\t", quoting=3, split="train")
            for p in path.split(",")
        )
        self.words = torch.tensor([tokenizer(word)["input_ids"][0] for word in WORDS])

        def encode(row: dict) -> dict:
            prompt = tokenizer(f"Review: {row['sentence'].strip()}\nSentiment:")["input_ids"]
            answer = [int(self.words[row["label"]])]
            return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

        self.train_set = (
            train.shuffle(seed=0)
            .select(range(8 * batch_size * steps))
            .map(encode, remove_columns=train.column_names)
        )
        self.held_out = (
            dev.shuffle(seed=0).select(range(1000)).map(encode, remove_columns=dev.column_names)
        )
        self.held_out = sorted(self.held_out, key=lambda row: len(row["input_ids"]))
        self.collate = DataCollatorForSeq2Seq(tokenizer)
        self.options = {"per_device_train_batch_size": 8 * batch_size, "max_steps": steps}

    @torch.no_grad()
    def measure(self, model) -> float:
        model.eval()
        right = 0
        for start in range(0, len(self.held_out), 25):
            rows = self.held_out[start : start + 25]
            batch = self.collate(
                [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
            )
            last = batch["attention_mask"].sum(-1) - 2  # the place that predicts the answer
            logits = model(
                batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits
            chosen = self.words[
                logits[torch.arange(len(rows)), last][:, self.words].float().argmax(-1)
            ]
            right += int((chosen == batch["input_ids"][torch.arange(len(rows)), last + 1]).sum())
        return right / len(self.held_out)


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def train(data, base: Path, output: Path) -> None:
    """A LoRA adapter on the base model, saved in ``output``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    )
    args = TrainingArguments(
        str(output) + "-training",
        **data.options,
        learning_rate=5e-4,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        report_to=[],
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=data.train_set, data_collator=data.collate
    )
    trainer.train()
    model.save_pretrained(str(output))


def rounded(source: Path, target: Path, bits: int, quantize) -> dict[str, float]:
    """The adapter with B and A rounded as they are, written as LoRA; error, and the bytes that
    packing would take.
    """
    state = load_file(source / WEIGHTS)
    stored = error = norm = parameters = 0.0
    for key in [key for key in state if "lora_A" in key]:
        pair = [state[key.replace("lora_A", "lora_B")], state[key]]
        found = []
        for factor in (pair[0].T, pair[1]):
            codes = quantize(
                factor,
                torch.full((len(factor),), bits),
                group_size=GROUP_SIZE,
                scale_dtype=SCALE_DTYPE,
            )
            found.append(codes.values())
            stored += len(factor) * packed_bytes(factor.shape[1], bits) + 2 * codes.scale.numel()
            if codes.zero_point is not None:
                stored += len(factor) * packed_bytes(codes.scale.shape[1], bits)
            parameters += factor.numel()
        quantized = [found[0].T.contiguous(), found[1]]
        error += float(squared_error(*(t[None] for t in (*pair, *quantized))))
        norm += float(squared_norm(*(t[None] for t in pair)))
        state[key.replace("lora_A", "lora_B")], state[key] = quantized
    shutil.copytree(source, target, dirs_exist_ok=True)
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    return {
        "error": (error / norm) ** 0.5,
        "bits": 8 * stored / parameters,
        "nominal": float(bits),
        "bytes": stored,
    }


def packed(source: Path, target: Path, config: LoRAQuantConfig) -> dict[str, float]:
    report = quantize_adapter(source, target, config, progress=False).report
    return {
        "error": report["relative_error"],
        "bits": report["bits_per_parameter"],
        "nominal": report["nominal_bits_per_parameter"],
        "bytes": (target / WEIGHTS).stat().st_size,
    }


def half(source: Path, target: Path) -> dict[str, float]:
    shutil.copytree(source, target, dirs_exist_ok=True)
    state = {name: tensor.half() for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    return {"error": 0.0, "bits": 16.0, "nominal": 16.0, "bytes": (target / WEIGHTS).stat().st_size}


def rows_of(args: argparse.Namespace) -> dict:
    """What makes each row's adapter, by the row's name."""
    rows = {"FP16": half}
    for name, (bits, quantize) in PLAIN.items():
        rows[name] = lambda s, t, b=bits, q=quantize: rounded(s, t, b, q)
    for bits, ratio in VARIANTS:
        for method in ("paper", "residual"):
            config = LoRAQuantConfig(
                method=method, bits_high=bits, ratio=ratio, group_size=GROUP_SIZE
            )
            rows[f"{method} {bits}@{ratio}"] = lambda s, t, c=config: packed(s, t, c)
    for bits in args.average_bits:
        config = LoRAQuantConfig(average_bits=bits, group_size=GROUP_SIZE)
        rows[f"residual {bits} bits"] = lambda s, t, c=config: packed(s, t, c)
    return rows


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    adapters = list(dict.fromkeys(row["adapter"] for row in results))
    figure, axes = plt.subplots(
        2, len(adapters), figsize=(4.2 * len(adapters), 7), squeeze=False, sharex=True
    )
    kinds = {"paper": "o", "residual": "s", "RTN": "^", "sign": "v"}
    for column, adapter in enumerate(adapters):
        own = [row for row in results if row["adapter"] == adapter]
        for kind, marker in kinds.items():
            points = sorted(
                (row["bits"], row["error"], row["score"])
                for row in own
                if row["row"].startswith(kind)
            )
            for axis, what in ((axes[0][column], 1), (axes[1][column], 2)):
                line = "-" if kind in ("paper", "residual") else ""
                axis.plot(
                    [p[0] for p in points], [p[what] for p in points], line + marker, label=kind
                )
        for name, style in (("no adapter", ":"), ("FP16", "--")):
            axes[1][column].axhline(
                next(r["score"] for r in own if r["row"] == name), color="grey", ls=style
            )
        axes[0][column].set(title=adapter, ylabel="relative error of BA")
        axes[1][column].set(
            xlabel="true bits per parameter", ylabel=own[0]["measure"] + " (-- FP16, .. no adapter)"
        )
        if own[0]["measure"] == "perplexity":
            axes[1][column].set_yscale("log")
        axes[0][column].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--style", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=TRAIN,DEV")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--batch_size",
        type=int,
        default=2,
        help="blocks of 512 tokens a step; 8 times as many sentences",
    )
    parser.add_argument("--average_bits", type=float, nargs="*", default=[0.75, 1.0, 2.5])
    parser.add_argument("--train_only", action="store_true", help="train the adapters and stop")
    parser.add_argument("--output", default="loraquant-benchmark")
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    base = output / "base"
    if not base.exists():
        model, tokenizer = load_smollm2()
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sources = [(Style, *pair.split("=", 1)) for pair in args.style] + [
        (Task, *p.split("=", 1)) for p in args.task
    ]
    log = output / "results.jsonl"
    for kind, name, path in sources or [(Style, "topics", None)]:
        data = kind(path, tokenizer, args.steps, args.batch_size)
        source = output / name
        if not source.exists():
            train(data, base, source)
        if args.train_only:
            continue
        done = {(r["adapter"], r["row"]) for r in read_results(log)}
        for row, make in {"no adapter": None, **rows_of(args)}.items():
            if (name, row) in done:
                continue
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            found = {"error": 1.0, "bits": 0.0, "nominal": 0.0, "bytes": 0}
            if make is not None:
                target = output / f"{name} {row}"
                shutil.rmtree(target, ignore_errors=True)
                found = make(source, target)
                model = PeftModel.from_pretrained(model, str(target))
            result = {
                "adapter": name,
                "row": row,
                "measure": kind.score,
                "score": data.measure(model),
                **found,
            }
            with open(log, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    results = read_results(log)
    for adapter in dict.fromkeys(row["adapter"] for row in results):
        print(
            f"\n{adapter}\n{'':20} {'score':>8} {'error':>7} {'bits':>7} {'nominal':>8} "
            f"{'bytes':>11}"
        )
        for r in (r for r in results if r["adapter"] == adapter):
            print(
                f"{r['row']:20} {r['score']:8.3f} {r['error']:7.3f} {r['bits']:7.3f} "
                f"{r['nominal']:8.3f} {r['bytes']:11,.0f}"
            )
    if results:
        plot(results, output / "loraquant.png")


def read_results(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


if __name__ == "__main__":
    main()
