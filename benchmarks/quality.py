"""Perplexity at equal tokens: grids, starts and ways to train, on one model and one text.

    python benchmarks/quality.py run --settings W3 --starts nearest blocks --trainings lrqat
    python benchmarks/quality.py table

A run is a setting (the grid), a start (how the first integers are found), a training and a seed.
Each writes one JSON file into --results when it ends; runs that have theirs are passed over, so the
command goes on where it was stopped. ``table`` prints what there is, and ``--plot FILE`` draws it.

By default the model is SmolLM2-135M from its wheel in bfloat16, and the text is the help topics of
CPython. With --train and --heldout, both plain text, it is any other one. Calibration and training
see the same tokens of the training text in every run of a seed.
"""

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from records import read_results, write_result
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.optimization import get_scheduler
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import (
    CalibratedStart,
    LowBitConfig,
    LRQATConfig,
    calibrate_low_bit,
    choose_bits,
)
from peft_lrqat.activations import attention
from peft_lrqat.base.bits import as_pattern
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.calibration.gptq import GPTQ
from peft_lrqat.calibration.methods import CalibrationMethod
from peft_lrqat.calibration.reconstruct import Reconstruction
from peft_lrqat.calibration.weights import TrainedWeight
from peft_lrqat.demo.run import freeze_factors
from peft_lrqat.demo.smollm2 import load_smollm2
from peft_lrqat.demo.text import load_topics, model_path
from peft_lrqat.quant import Grid, fake_quantize_tokens
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments
from peft_lrqat.trainer.data import load_blocks, load_tokens, make_blocks
from peft_lrqat.trainer.metrics import evaluate_perplexity


SETTINGS: dict[str, dict[str, Any]] = {
    "W4": {"bits": 4},
    "W3": {"bits": 3},
    "W2-g64": {"bits": 2, "group_size": 64, "symmetric": False},
    "W2": {"bits": 2, "symmetric": False},
    # Bits of each layer by what rounding it costs, as many on average.
    "W3-by-layer": {"average_bits": 3.0},
    "W2.5-by-layer": {"average_bits": 2.5, "symmetric": False, "group_size": 32},
    "W4-k": {"bits": 4, "symmetric": False, "k_quant": True},
    "W3-k": {"bits": 3, "k_quant": True},
    "W2-k": {"bits": 2, "symmetric": False, "k_quant": True},
    "W2-symmetric": {"bits": 2},
    "W2-balanced": {"bits": 2, "balanced": True},
    "W4-g32": {"bits": 4, "group_size": 32},
    "W3-g32": {"bits": 3, "group_size": 32},
    "W2-g32": {"bits": 2, "group_size": 32, "symmetric": False},
    "W2-balanced-g64": {"bits": 2, "balanced": True, "group_size": 64},
    "W2-balanced-g32": {"bits": 2, "balanced": True, "group_size": 32},
    "W4A8": {"bits": 4, "activation_bits": 8},
    "W4A8KV4": {"bits": 4, "activation_bits": 8, "kv_cache_bits": 4},
    "W4A4KV4": {"bits": 4, "activation_bits": 4, "kv_cache_bits": 4},
}
# The fields of a setting that are the adapter's, and not the base's.
OF_ADAPTER = ("activation_bits", "kv_cache_bits")
UNQUANTISED = "unquantised"
TUNED = "tuned-blocks"
DEFAULT_SETTINGS = ["W4", "W3", "W2-g64", "W2"]
# What is written beside a figure.
OPTIONS = (
    "dtype",
    "window",
    "heldout_window",
    "epochs",
    "calibration_blocks",
    "calibration_batch_size",
    "reconstruction_rate",
    "range_p",
    "first_steps",
    "steps",
    "batch_size",
    "rank",
    "learning_rate",
    "scale_learning_rate",
    "scales_only_learning_rate",
    "distillation_weight",
    "full_rate",
    "lora_rate",
    "unquantised_rate",
    "gamma",
    "clipping",
    "downcast",
)
# The paper's own options, for the training of that name (LR-QAT, section 5).
PUBLISHED = {
    "gamma": 1 / 32,
    "learning_rate": 1e-3,
    "scale_learning_rate": 1e-5,
    "clipping": "all",
    "downcast": "fixed8",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One figure."""

    model: str
    text: str
    setting: str
    start: str
    training: str
    seed: int

    @property
    def file(self) -> str:
        name = "-".join(str(part) for part in asdict(self).values())
        return f"{name.replace(' ', '-')}.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the runs share: model, text and settings."""

    model: Path
    text: str
    train_blocks: Dataset  # of --window tokens
    heldout: Tensor  # (T,) token ids
    chosen_by: Tensor  # (T,) the ones behind those, to choose settings by; may be empty
    tokenizer: Any
    args: argparse.Namespace
    bases: Path
    callbacks: tuple[TrainerCallback, ...] = ()  # of every Trainer

    def load(self, folder: Path) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.args.dtype)
        return model.to(self.args.device)

    def plain(self, run: Run) -> PreTrainedModel:
        """The unquantised model that a run starts from."""
        if run.start != TUNED:
            return self.load(self.model)
        folder = self.bases / f"tuned-{run.seed}"
        if not folder.exists():
            tuned: Any = lora(self, run, self.load(self.model), steps=self.args.first_steps)
            self.bases.mkdir(parents=True, exist_ok=True)
            whole = Path(tempfile.mkdtemp(dir=self.bases.parent))
            tuned.merge_and_unload().save_pretrained(whole)
            with suppress(OSError):  # another process was faster
                whole.rename(folder)
        return self.load(folder)

    def left(self, run: Run) -> int:
        """Steps of a run that are left for the training on the grid."""
        steps: int = self.args.steps
        return steps - self.args.first_steps if run.start == TUNED else steps

    def blocks(self, seed: int, count: int) -> Dataset:
        """Examples chosen by the seed; calibration and training take them from the front."""
        if count > len(self.train_blocks):
            raise ValueError(
                f"the training text has {len(self.train_blocks)} blocks of {self.args.window} "
                f"tokens, but {count} are needed; give a longer --train or fewer --steps"
            )
        return self.train_blocks.shuffle(seed=seed).select(range(count))

    def perplexity(self, model: nn.Module, tokens: Tensor) -> float:
        window = self.args.heldout_window or self.args.window
        found = evaluate_perplexity(model, tokens, window=window, batch_size=4, progress=False)
        return round(found["perplexity"], 3)


# Starts


def nearest(place: Place, run: Run, config: LowBitConfig) -> PreTrainedModel:
    """Each weight rounded to the nearest point of its grid."""
    model = AutoModelForCausalLM.from_pretrained(
        place.model, dtype=place.args.dtype, quantization_config=config
    )
    return model.to(place.args.device)


def gptq(place: Place, run: Run, config: LowBitConfig) -> PreTrainedModel:
    """GPTQ's integers, with the fractions that are left of them."""
    return _calibrated(place, run, config, GPTQ())


def blocks(place: Place, run: Run, config: LowBitConfig) -> PreTrainedModel:
    """Block reconstruction."""
    args = place.args
    method = Reconstruction(
        epochs=args.epochs, learning_rate=args.reconstruction_rate, seed=run.seed
    )
    return _calibrated(place, run, config, method)


def _calibrated(
    place: Place, run: Run, config: LowBitConfig, method: CalibrationMethod
) -> PreTrainedModel:
    start = CalibratedStart(
        method=method,
        dataset=place.blocks(run.seed, place.args.calibration_blocks),
        batch_size=place.args.calibration_batch_size,
        activations=adapter_config(run).activation_grid,
        progress=False,
    )
    return calibrate_low_bit(place.plain(run), config, start)


Start = Callable[[Place, Run, LowBitConfig], PreTrainedModel]
# The last one trains the unquantised model first, with LoRA on the first --first_steps batches; its
# blocks are reconstructed, it is the teacher, and the other batches are for the training that
# follows.
STARTS: dict[str, Start] = {"nearest": nearest, "gptq": gptq, "blocks": blocks, TUNED: blocks}


def adapter_config(run: Run, **fields: Any) -> LRQATConfig:
    """An adapter on the base of a run."""
    rounded = {k: v for k, v in SETTINGS[run.setting].items() if k in OF_ADAPTER}
    return LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", **rounded, **fields)


def settings_of(place: Place, run: Run) -> dict[str, Any]:
    """The fields of the base of a setting; bits by layer are chosen on calibration data."""
    fields = {k: v for k, v in SETTINGS[run.setting].items() if k not in OF_ADAPTER}
    average = fields.pop("average_bits", None)
    if average is not None:
        text = place.blocks(run.seed, min(64, place.args.calibration_blocks))
        grid = LowBitConfig(**fields)
        layers = choose_bits(place.load(place.model), text, grid, average_bits=average)
        fields["bits"], fields["bits_pattern"] = as_pattern(layers)
    return fields


def started(place: Place, run: Run) -> tuple[PreTrainedModel, float]:
    """The base that a run starts from, made once for all trainings, and the seconds that took."""
    folder = place.bases / f"{run.setting}-{run.start}-{run.seed}"
    seconds = folder / "seconds.json"
    if not seconds.exists():
        p = {} if place.args.range_p is None else {"range_p": place.args.range_p}
        config = LowBitConfig(downcast=place.args.downcast, **settings_of(place, run), **p)
        begin = time.perf_counter()
        base = STARTS[run.start](place, run, config)
        took = time.perf_counter() - begin
        base.save_pretrained(folder)
        seconds.write_text(json.dumps(took))
    return place.load(folder), json.loads(seconds.read_text())


# Trainings


def untrained(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """Not trained; on a grid, with the integers that would be deployed."""
    if run.setting == UNQUANTISED:
        return model
    # A fresh adapter adds nothing but the rounding.
    return get_peft_model(model, adapter_config(run))


def low_rank(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """LR-QAT."""
    return _adapted(place, run, model)


def published(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """LR-QAT with the rates, the factor of the product and the clipping of the paper."""
    args = argparse.Namespace(**vars(place.args) | PUBLISHED)
    return _adapted(replace(place, args=args), run, model)


def scales_only(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """Only the scales; the integers stay those of the start."""
    rate = place.args.scales_only_learning_rate
    return _adapted(place, run, model, scales_only=True, scale_learning_rate=rate)


def predictions(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """LR-QAT, with a part of the loss from the unquantised model's predictions, 64 for a token."""
    return _distilled(place, run, model, distillation_target="predictions")


def hidden_states(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """LR-QAT, with a part of the loss from the unquantised model's last hidden states."""
    return _distilled(place, run, model, distillation_target="hidden_states")


def resident_teacher(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """LR-QAT, with a part of the loss from all predictions of the unquantised model, which stays
    in memory.
    """
    return _distilled(place, run, model, distillation_cache=None)


def _distilled(place: Place, run: Run, model: PreTrainedModel, **fields: Any) -> nn.Module:
    given = {
        "distillation_weight": place.args.distillation_weight,
        "distillation_cache": str(Path(place.args.work) / "teacher"),
    }
    return _adapted(place, run, model, **given | fields)


class ClippedOverAll(LRQATTrainer):
    """One gradient norm over all trained parameters, as in a plain Trainer."""

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        return Trainer._clip_grad_norm(self, model)


CLIPPINGS: dict[str, type[LRQATTrainer]] = {"group": LRQATTrainer, "all": ClippedOverAll}


def freeze_scales(model: nn.Module) -> None:
    """Trains only the factors."""
    for name, parameter in model.named_parameters():
        if "lrqat_scale" in name:
            parameter.requires_grad_(False)


def _adapted(
    place: Place, run: Run, model: PreTrainedModel, *, scales_only: bool = False, **fields: Any
) -> nn.Module:
    """``fields`` are those of the training arguments, and win over the options."""
    args = place.args
    config = adapter_config(run, r=args.rank, lora_alpha=args.gamma * args.rank)
    adapted = get_peft_model(model, config)
    if scales_only:
        freeze_factors(adapted)
    rates = {name: getattr(args, name) for name in ("learning_rate", "scale_learning_rate")}
    if rates["scale_learning_rate"] == 0:
        freeze_scales(adapted)
        del rates["scale_learning_rate"]
    options = LRQATTrainingArguments(**_options(place, run, place.left(run)) | rates | fields)
    trainer = CLIPPINGS[args.clipping](
        model=adapted,
        args=options,
        train_dataset=_training_set(place, run, place.left(run)),
        data_collator=default_data_collator,
        callbacks=list(place.callbacks),
        teacher_model=place.plain(run) if options.distillation_weight else None,
    )
    trainer.train()
    return adapted


def lora(place: Place, run: Run, model: PreTrainedModel, steps: int | None = None) -> nn.Module:
    """Plain LoRA on the unquantised model."""
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=place.args.rank, lora_alpha=32
    )
    adapted = get_peft_model(model, config)
    groups = [
        {"params": [p for p in adapted.parameters() if p.requires_grad], "lr": place.args.lora_rate}
    ]
    return train_in_full(place, run, adapted, groups, steps or place.args.steps, first=True)


def full(place: Place, run: Run, model: PreTrainedModel) -> nn.Module:
    """All weights of the target layers, and on a grid their scales and zero points: full QAT."""
    model.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    rounded = None if run.setting == UNQUANTISED else adapter_config(run)
    for name, module in list(model.named_modules()):
        if isinstance(module, DowncastLinear):
            layer = FullQAT(module, rounded and rounded.activation_grid)
            model.set_submodule(name, layer)
            trained, step = layer.trained, float(module.scale0.mean())
            groups.append({"params": [trained.weight], "lr": place.args.full_rate * step})
            shared = {"lr": place.args.full_rate * step / 5}
            groups.append({"params": [trained.scale], **shared})
            if trained.zero_point is not None:
                groups.append({"params": [trained.zero_point], "lr": place.args.full_rate / 5})
        elif run.setting == UNQUANTISED and isinstance(module, nn.Linear) and "lm_head" not in name:
            module.float().requires_grad_(True)
            groups.append({"params": [module.weight], "lr": place.args.unquantised_rate})
    if rounded is not None:
        names = [name for name, module in model.named_modules() if isinstance(module, FullQAT)]
        attention.add_adapter(model, FullQAT.ADAPTER, rounded.kv_cache_grid, names)
        # The Trainer would ask for an adapter.
        vars(model).pop("hf_quantizer")
        del model.config.quantization_config
        vars(model)["is_quantized"] = False
    if run.setting == UNQUANTISED:
        # Master weights in float32; products in bfloat16, as under a grid.
        bf16 = place.args.dtype == "bfloat16"
        return train_in_full(place, run, model, groups, place.args.steps, bf16=bf16)
    return train_in_full(place, run, model, groups, place.left(run))


class FullQAT(nn.Module):
    """A linear layer whose full-rank weight is trained through the rounding, with the rounding of
    activations, keys and values that an adapter would have.
    """

    ADAPTER = "full"

    def __init__(self, layer: DowncastLinear, activations: Grid | None) -> None:
        super().__init__()
        self.activations = activations
        self.merged_adapters: list[str] = []
        grid, format = layer.format.grid, layer.format
        zero = None if layer.zero_point is None else layer.zero_point.data
        units = format.decode(layer.phi.data).float()
        weight = grid.values(units, layer.scale0.data, zero)
        self.trained = TrainedWeight(weight, layer.scale0.data, zero, format, layer.dtype)
        self.bias = layer.bias

    def adapter_that_runs(self) -> str:
        """Whose grid the attention around this layer takes."""
        return self.ADAPTER

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = fake_quantize_tokens(x, self.activations)
        return nn.functional.linear(x, self.trained(), self.bias)


def train_in_full(
    place: Place,
    run: Run,
    model: nn.Module,
    groups: list[dict[str, Any]],
    steps: int,
    *,
    first: bool = False,
    **fields: Any,
) -> nn.Module:
    options = TrainingArguments(**_options(place, run, steps), warmup_steps=0.1, **fields)
    optimizer = AdamW(groups, betas=(0.9, 0.95), weight_decay=0)
    schedule = get_scheduler("linear", optimizer, round(0.1 * steps), steps)
    trainer = Trainer(
        model=model,
        args=options,
        train_dataset=_training_set(place, run, steps, first=first),
        data_collator=default_data_collator,
        callbacks=list(place.callbacks),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    return model


def _training_set(place: Place, run: Run, steps: int, *, first: bool = False) -> Dataset:
    """The rows of ``steps`` batches; ``first``, or those that come last."""
    # A short text is seen several times.
    total = min(place.args.steps * place.args.batch_size, len(place.train_blocks))
    count = min(steps * place.args.batch_size, total)
    rows = place.blocks(run.seed, total)
    return rows.select(range(count) if first else range(total - count, total))


def _options(place: Place, run: Run, steps: int) -> dict[str, Any]:
    args = place.args
    return {
        "output_dir": str(Path(args.work) / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "seed": run.seed,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": args.device == "cpu",
    }


Training = Callable[[Place, Run, PreTrainedModel], nn.Module]
# LoRA is for the unquantised model, which has "none" and "full" beside it.
TRAININGS: dict[str, Training] = {
    "none": untrained,
    "scales": scales_only,
    "published": published,
    "lrqat": low_rank,
    "predictions": predictions,
    "hidden states": hidden_states,
    "resident teacher": resident_teacher,
    "full": full,
    "lora": lora,
}


# Runs


def perform(place: Place, run: Run) -> dict[str, Any]:
    """Trains and measures; what is written into the run's file."""
    args = place.args
    set_seed(run.seed)
    if run.setting == UNQUANTISED:
        model, calibrated = place.plain(run), 0.0
    else:
        model, calibrated = started(place, run)
    begin = time.perf_counter()
    trained = TRAININGS[run.training](place, run, model)
    seconds = time.perf_counter() - begin
    tokens = 0 if run.training == "none" else args.steps * args.batch_size * args.window
    trained.eval()
    if args.adapters and isinstance(trained, PeftModel):
        trained.save_pretrained(Path(args.adapters, run.file).with_suffix(""))
    chosen_by = place.chosen_by
    return {
        **asdict(run),
        "perplexity": place.perplexity(trained, place.heldout),
        "chosen_by": place.perplexity(trained, chosen_by) if len(chosen_by) else None,
        "tokens": tokens,
        "calibration_seconds": round(calibrated, 1),
        "training_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "data": data_digest(place),
        "options": {name: getattr(args, name) for name in OPTIONS}
        | (PUBLISHED if run.training == "published" else {}),
    }


def data_digest(place: Place) -> str:
    """Names the held-out tokens."""
    data = place.heldout.contiguous().view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def find_place(args: argparse.Namespace) -> Place:
    """The model and the texts."""
    work = Path(args.work)
    if args.model == "tiny":
        model = Path(model_path())
    elif args.model == "smollm2":
        model = work / "smollm2"
        if not (model / "config.json").exists():
            for part in load_smollm2(getattr(torch, args.dtype)):
                part.save_pretrained(model)
    else:
        model = Path(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if args.train is None:
        documents = Dataset.from_dict({"text": load_topics("train")})
        made: Any = make_blocks(documents, tokenizer, block_size=args.window)
        file = work / "heldout.jsonl"
        Dataset.from_dict({"text": load_topics("heldout")}).to_json(file)
        text = "topics"
    else:
        made = load_blocks(args.train, tokenizer, block_size=args.window)
        file, text = Path(args.heldout), Path(args.train).name.split(".")[0]
    heldout = load_tokens(str(file), tokenizer)
    return Place(
        model=model,
        text=text,
        train_blocks=made,
        heldout=heldout[: args.heldout_tokens],
        chosen_by=heldout[args.heldout_tokens :][: args.heldout_tokens],
        tokenizer=tokenizer,
        args=args,
        bases=find_bases(args, text),
    )


def find_bases(args: argparse.Namespace, text: str) -> Path:
    """The folder of the bases that are made with these options."""
    made_with = [args.window, args.epochs, args.calibration_blocks, args.calibration_batch_size]
    made_with += [args.reconstruction_rate, args.first_steps]
    made_with += [] if args.range_p is None else [args.range_p]
    made_with += [] if args.downcast == "fixed8" else [args.downcast]
    name = "-".join(map(str, ("bases", Path(args.model).name, text, *made_with)))
    return Path(args.work) / name


def run_all(args: argparse.Namespace) -> None:
    place, results = find_place(args), Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    wanted = [
        Run(
            model=Path(args.model).name,
            text=place.text,
            setting=setting,
            start="none" if setting == UNQUANTISED else start,
            training=training,
            seed=seed,
        )
        for seed in args.seeds
        for setting in args.settings
        for start in args.starts
        for training in args.trainings
        if training in ("none", "full") or (training == "lora") == (setting == UNQUANTISED)
    ]
    by_base: dict[tuple[str, str, int], list[Run]] = {}
    for run in dict.fromkeys(wanted):
        if not (results / run.file).exists():
            by_base.setdefault((run.setting, run.start, run.seed), []).append(run)
    if args.workers == 1:
        for runs in by_base.values():
            perform_all(args, runs)
        return
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(perform_all, args, runs) for runs in by_base.values()]:
            done.result()


def perform_all(args: argparse.Namespace, runs: list[Run]) -> None:
    """The runs of one base, one after another; each leaves its file, whole or not at all."""
    disable_progress_bar()
    set_verbosity_error()
    place = find_place(args)
    for run in runs:
        found = perform(place, run)
        file = Path(args.results) / run.file
        write_result(file, found)


# The table


def summarise(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Perplexities of all seeds, by setting and start, and by training."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        by_training = found.setdefault((row["setting"], row["start"]), {})
        by_training.setdefault(row["training"], []).append(row["perplexity"])
    order = [UNQUANTISED, *SETTINGS]
    starts = ["none", *STARTS]
    return dict(
        sorted(found.items(), key=lambda item: (order.index(item[0][0]), starts.index(item[0][1])))
    )


def in_cell(perplexities: list[float] | None) -> str:
    """The mean, and the spread of several seeds."""
    if not perplexities:
        return "-"
    mean = statistics.mean(perplexities)
    digits = 2 if mean < 20 else 1 if mean < 1000 else 0
    if len(perplexities) == 1:
        return f"{mean:,.{digits}f}"
    half = (max(perplexities) - min(perplexities)) / 2
    return f"{mean:,.{digits}f} ± {half:,.{digits}f}"


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown: a line for each setting and start, a column for each training."""
    return _lines(summarise(rows), in_cell)


def closed_gaps(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """The share of the gap in log-perplexity that a row closes, in per cent, for each seed: from
    rounding to nearest, untrained (0), to LoRA on the unquantised model (100).
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    logs = {
        (row["setting"], row["start"], row["training"], row["seed"]): math.log(row["perplexity"])
        for row in rows
    }
    for (setting, start), by_training in summarise(rows).items():
        for training in by_training:
            for seed in {row["seed"] for row in rows}:
                worst = logs.get((setting, "nearest", "none", seed))
                best = logs.get((UNQUANTISED, "none", "lora", seed))
                here = logs.get((setting, start, training, seed))
                if worst is not None and best is not None and here is not None:
                    shares = found.setdefault((setting, start), {}).setdefault(training, [])
                    shares.append(100 * (worst - here) / (worst - best))
    return found


def gap_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of `closed_gaps`, mean over the seeds."""
    return _lines(
        closed_gaps(rows), lambda shares: f"{statistics.mean(shares):.0f}%" if shares else "-"
    )


def _lines(
    found: dict[tuple[str, str], dict[str, list[float]]],
    cell: Callable[[list[float] | None], str],
) -> list[str]:
    trainings = [name for name in TRAININGS if any(name in by for by in found.values())]
    lines = ["| setting | start | " + " | ".join(trainings) + " |"]
    lines.append("|---|---|" + "---|" * len(trainings))
    for (setting, start), by_training in found.items():
        cells = " | ".join(cell(by_training.get(name)) for name in trainings)
        lines.append(f"| {setting} | {start} | {cells} |")
    return lines


def print_table(args: argparse.Namespace) -> None:
    rows = [row for row in read_results(Path(args.results)) if row["model"] == args.model]
    if not rows:
        raise SystemExit(f"there are no results of {args.model} in {args.results}")
    print("\n".join(table_lines(rows)))
    if len(gaps := gap_lines(rows)) > 2:
        print("\nShare of the gap in log-perplexity closed:\n\n" + "\n".join(gaps))
    if args.plot:
        found = summarise(rows)
        plot(found, [n for n in TRAININGS if any(n in by for by in found.values())], args.plot)


def plot(
    found: dict[tuple[str, str], dict[str, list[float]]], trainings: list[str], file: str
) -> None:
    """A panel per setting of several trainings: perplexity by start, one line per training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    trained = {setting: len(by_training) for (setting, _), by_training in found.items()}
    settings = [s for s in SETTINGS if trained.get(s, 0) > 2]
    figure = Figure(figsize=(4 * len(settings), 4), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for panel, setting in zip(panels, settings, strict=True):
        for training in trainings:
            points = [
                (start, statistics.mean(found[setting, start][training]))
                for start in STARTS
                if training in found.get((setting, start), {})
            ]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=training)
        panel.set(title=setting, xlabel="start", ylabel="perplexity", yscale="log")
        plain = sorted(
            (statistics.mean(v), n) for n, v in found.get((UNQUANTISED, "none"), {}).items()
        )
        for number, (value, training) in enumerate(plain):
            panel.axhline(value, linestyle=":", linewidth=1, color="gray")
            panel.text(0.6 * number, value, f"unquantised, {training}", fontsize=7)
        panel.yaxis.set_minor_formatter(NullFormatter())
        low, high = panel.get_ylim()
        panel.set_yticks([low * (high / low) ** (i / 5) for i in range(6)])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        panel.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--model", default="smollm2", help="tiny, smollm2 or a directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--train", help="a file of plain text; default: help topics of CPython")
    parser.add_argument("--heldout", help="a file of plain text, with --train")
    parser.add_argument("--heldout_tokens", type=int, default=16_384)
    parser.add_argument("--settings", nargs="+", default=DEFAULT_SETTINGS)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--trainings", nargs="+", default=["none", "scales", "lrqat"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--window", type=int, default=512, help="tokens in an example")
    parser.add_argument("--heldout_window", type=int, help="of the perplexity; default: --window")
    parser.add_argument("--calibration_blocks", type=int, default=64, help="examples")
    parser.add_argument("--calibration_batch_size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="of block reconstruction")
    parser.add_argument(
        "--reconstruction_rate", type=float, default=0.03, help="of weights, in steps of the grid"
    )
    parser.add_argument(
        "--range_p", type=float, help="exponent of the search for scales; default: the package's"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--first_steps", type=int, default=30, help=f'of the unquantised model, with "{TUNED}"'
    )
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gamma", type=float, default=1.0, help="factor of the product of A and B")
    parser.add_argument(
        "--clipping", choices=CLIPPINGS, default="group", help="what one gradient norm is taken of"
    )
    parser.add_argument("--downcast", default="fixed8", help="of the frozen weights")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="of A and B")
    parser.add_argument("--scale_learning_rate", type=float, help="default: the package's own")
    parser.add_argument("--scales_only_learning_rate", type=float, default=1e-3)
    parser.add_argument("--distillation_weight", type=float, default=0.5)
    parser.add_argument(
        "--full_rate", type=float, default=0.01, help="of full QAT, in steps of the grid"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="bases worked on at once; small models leave room"
    )
    parser.add_argument("--lora_rate", type=float, default=5e-4, help="of LoRA, unquantised")
    parser.add_argument(
        "--unquantised_rate", type=float, default=2e-5, help="of all weights, unquantised"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", default="quality-benchmark", help="for bases")
    parser.add_argument(
        "--results", default=str(Path(__file__).parent / "results" / "quality"), help="for results"
    )
    parser.add_argument("--adapters", help="a directory in which trained adapters are kept")
    parser.add_argument("--plot", help="a PNG file, with `table`")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    for name, known in (("settings", [*SETTINGS, UNQUANTISED]), ("trainings", list(TRAININGS))):
        if unknown := [value for value in getattr(args, name) if value not in known]:
            parser.error(f"--{name} knows {', '.join(known)}, but not {unknown[0]}")
    if (args.train is None) != (args.heldout is None):
        parser.error("give --train and --heldout together")
    if args.action == "table":
        print_table(args)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
