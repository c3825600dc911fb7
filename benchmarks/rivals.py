"""Other tools on the job of `quality.py`: torchao, ModelOpt and NNCF beside LR-QAT.

    python benchmarks/rivals.py run --rivals modelopt modelopt-learned
    python benchmarks/rivals.py cost --rivals modelopt modelopt-learned
    python benchmarks/rivals.py export --exports modelopt
    python benchmarks/rivals.py table

``run`` trains the demo's model on the same blocks in the same order as `quality.py`, and measures
it twice: as trained, and as what would be deployed (integers and scales). Each rival tries three
rates on seed 0 at 3 bits, and a fourth beyond them where the least or the largest is best. The rate
whose deployed model is best on the tokens of ``chosen_by``, which are not those of the table, is
taken for the other settings and seeds. LR-QAT has one set of rates for all rows, too.

``cost`` compares time and memory of a step with PEFT's LoRA on the unquantised model, in the same
run. ``export`` tries the export that each tool documents. Every run leaves one JSON file, and those
that have theirs are passed over. ``table`` prints what there is, beside the figures of
``results/quality_demo``.

Each tool runs in an environment of its own, which sees the packages of the project's:

    python -m venv ENV
    echo SITE_PACKAGES_OF_THE_PROJECT > ENV/lib/python3.11/site-packages/project.pth
    ENV/bin/pip install --no-deps PACKAGES

torchao: ``torchao==0.18.0``. ModelOpt: ``nvidia-modelopt==0.47.0 ninja nvidia-ml-py omegaconf
antlr4-python3-runtime==4.9.3 pulp==3.3.2``. NNCF: ``nncf==3.4.0 ninja openvino-telemetry
pydot==4.0.1 torchao==0.18.0``, and for its export ``openvino==2026.4.1``. All on torch 2.13.0 for
CPUs, transformers 5.23.0 and peft 0.21.2.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from memory import random_llama
from peft import LoraConfig, get_peft_model
from process import MB, in_own_process, peak_bytes, resident
from quality import (
    SETTINGS,
    UNQUANTISED,
    Place,
    Run,
    data_digest,
    find_place,
    in_cell,
    train_in_full,
)
from quality import make_parser as make_quality_parser
from records import read_results, write_result
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from variants import RANK, VARIANTS

from peft_lrqat import LRQATConfig, export_model, verify_export
from peft_lrqat.demo.run import freeze_factors
from peft_lrqat.demo.text import model_path
from peft_lrqat.quant import Grid


RESULTS = Path(__file__).parent / "results"
# The first and the last are tried only where the one beside is the best of the three.
LORA_RATES = (1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2)  # of A and B
WEIGHT_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of all weights
TRIED = ("W4", "W3", "W2-symmetric")
RANGE_SHARE = 0.1  # of these, for learned ranges
OPTIONS = ("dtype", "window", "steps", "batch_size", "rank")
# The job of `results/quality_demo`.
JOB = ["--model", "tiny", "--dtype", "float32", "--window", "256", "--steps", "150"]
JOB += ["--batch_size", "8", "--epochs", "4", "--calibration_blocks", "384"]


# (model, bits, rank, example tokens (1, T)) -> the model in training, where what has a gradient is
# trained. In place.
Prepare = Callable[[PreTrainedModel, int, int, Tensor], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A way to train that a tool offers."""

    title: str
    package: str
    prepare: Prepare
    # (trained model, bits, example tokens) -> what would be deployed.
    deploy: Callable[[nn.Module, int, Tensor], nn.Module]
    rates: tuple[float, ...] = LORA_RATES
    tried_on: str = "W3"  # the setting that the rate is chosen on
    settings: tuple[str, ...] = TRIED
    why_not: str = "not run"  # of a setting without a figure


def is_target(module: nn.Module, name: str) -> bool:
    """The linear layers of the decoder, as everywhere here."""
    return isinstance(module, nn.Linear) and name.endswith("_proj")


def with_lora(model: nn.Module, rank: int) -> Any:
    """PEFT's LoRA as `quality.py` has it."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=32)
    return get_peft_model(model, config)


# torchao


def torchao_config(bits: int) -> Any:
    """Symmetric, per channel: the only one per channel that its QAT can also convert."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerAxis(0))


def torchao_weights(
    model: PreTrainedModel, bits: int, rank: int, example: Tensor, *, learned: bool = False
) -> nn.Module:
    """All weights; ``learned``: and their scales, which is a prototype there."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import (
        IntxFakeQuantizeConfig,
        QATConfig,
        initialize_fake_quantizers,
    )

    config = QATConfig(torchao_config(bits), step="prepare")
    if learned:
        grid = IntxFakeQuantizeConfig(
            getattr(torch, f"int{bits}"), "per_channel", is_dynamic=False, range_learning=True
        )
        config = QATConfig(weight_config=grid, step="prepare")
    quantize_(model, config, filter_fn=is_target)
    if learned:
        initialize_fake_quantizers(model, (example,))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj." in name)
    return model


def torchao_lora(model: PreTrainedModel, bits: int, rank: int, example: Tensor) -> nn.Module:
    """Frozen weights, rounded on the fly, and LoRA beside them, in full precision."""
    return with_lora(torchao_weights(model, bits, rank, example), rank)


def torchao_deploy(model: nn.Module, bits: int, example: Tensor) -> nn.Module:
    """LoRA merged into the weights, which are then rounded, by its own conversion."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    whole: Any = model
    merged = whole.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    quantize_(merged, QATConfig(torchao_config(bits), step="convert"))
    return merged


# ModelOpt


def modelopt_lora(
    model: PreTrainedModel, bits: int, rank: int, example: Tensor, *, learned: bool = False
) -> nn.Module:
    """LoRA inside the quantiser, symmetric, per channel; ranges of the least squared error.

    ``learned``: the ranges are trained. Its documentation says that this is for NVFP4; blocks as
    wide as a row make it work for integers.
    """
    import modelopt.torch.quantization as mtq

    inputs = {n.rpartition(".")[2]: m.in_features for n, m in targets(model).items()}
    algorithm: dict[str, Any] = {
        "method": "mse",
        "step_size": 0.02,
        "start_multiplier": 0.2,
        "stop_multiplier": 1.2,
    }
    if learned:
        lsq = {"method": "lsq", "learnable_amax": ["pre", "post"], "tied_amax": True}
        algorithm = {**lsq, "scale_algorithm": algorithm}
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, width in inputs.items():
        shape: dict[str, Any] = {"block_sizes": {-1: width}} if learned else {"axis": 0}
        rules.append(
            {
                "quantizer_name": f"*{name}.weight_quantizer",
                "cfg": {"num_bits": bits, **shape},
                "enable": True,
            }
        )
    config = {"quant_cfg": rules, "algorithm": algorithm}
    adapted = mtq.quantize(with_lora(model, rank), config)
    return adapted


def modelopt_deploy(model: nn.Module, bits: int, example: Tensor) -> nn.Module:
    """LoRA merged; the quantiser, with the ranges it has, then rounds the merged weight."""
    whole: Any = model
    return whole.merge_and_unload()


# NNCF


def nncf_lora(model: PreTrainedModel, bits: int, rank: int, example: Tensor) -> nn.Module:
    """LoRA inside the quantiser, with learned ranges; its format FQ_LORA knows 4 and 8 bits."""
    import nncf

    compressed: Any = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode(f"int{bits}_sym"),
        ratio=1.0,
        group_size=-1,
        dataset=nncf.Dataset([{"input_ids": example}]),
        backup_mode=nncf.BackupMode.NONE,  # embeddings and head stay, as everywhere here
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=rank),
    )
    for parameter in compressed.parameters():
        if parameter.requires_grad and model.dtype == torch.float32:
            parameter.data = parameter.data.float()  # A and B are made in bfloat16
    return compressed


def nncf_deploy(model: nn.Module, bits: int, example: Tensor) -> nn.Module:
    """Integers, and scales in float16."""
    import nncf

    return nncf.strip(
        model,
        do_copy=True,
        strip_format=nncf.StripFormat.DQ,
        example_input={"input_ids": example},
    )


# This package


def lrqat(model: PreTrainedModel, bits: int, rank: int, example: Tensor) -> nn.Module:
    """LR-QAT from rounding to nearest, on the grid that the tools can do at all widths."""
    config = LRQATConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=rank,
        bits=bits,
        symmetric=True,
        downcast="fixed8",
    )
    adapted: Any = get_peft_model(model, config)
    return adapted


def lrqat_deploy(model: nn.Module, bits: int, example: Tensor) -> nn.Module:
    """Nothing is to be done: training sees the integers and scales that are deployed."""
    return model


RIVALS: dict[str, Rival] = {
    "torchao-lora": Rival(
        title="torchao: QAT, LoRA beside it",
        package="torchao",
        prepare=torchao_lora,
        deploy=torchao_deploy,
    ),
    "torchao-weights": Rival(
        title="torchao: QAT of all weights",
        package="torchao",
        prepare=torchao_weights,
        deploy=torchao_deploy,
        rates=WEIGHT_RATES,
    ),
    "torchao-learned": Rival(
        title="torchao: QAT of all weights, learned ranges",
        package="torchao",
        prepare=partial(torchao_weights, learned=True),
        deploy=torchao_deploy,
        rates=WEIGHT_RATES,
    ),
    "modelopt": Rival(
        title="ModelOpt: LoRA inside the quantiser",
        package="nvidia-modelopt",
        prepare=modelopt_lora,
        deploy=modelopt_deploy,
    ),
    "modelopt-learned": Rival(
        title="ModelOpt: the same, learned ranges",
        package="nvidia-modelopt",
        prepare=partial(modelopt_lora, learned=True),
        deploy=modelopt_deploy,
    ),
    "nncf": Rival(
        title="NNCF: FQ_LORA, learned ranges",
        package="nncf",
        prepare=nncf_lora,
        deploy=nncf_deploy,
        tried_on="W4",
        settings=("W4",),
        why_not="not run: 4 and 8 bits only",
    ),
    "lrqat": Rival(
        title="**LR-QAT, from nearest, its rate chosen in the same way**",
        package="peft-lrqat",
        prepare=lrqat,
        deploy=lrqat_deploy,
    ),
}


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_target(m, n)}


# Quality


def perform(place: Place, name: str, setting: str, seed: int, rate: float) -> dict[str, Any]:
    """One run: what is written into its file."""
    args, rival, bits = place.args, RIVALS[name], SETTINGS[setting]["bits"]
    run = Run(
        model="tiny", text=place.text, setting=setting, start="nearest", training=name, seed=seed
    )
    set_seed(seed)
    example = torch.tensor(place.blocks(seed, 1)[0]["input_ids"])[None]
    model = rival.prepare(place.load(place.model), bits, args.rank, example)
    ranges, others = [], []
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_range = any(word in parameter_name for word in ("scale", "amax"))
            (ranges if is_range else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": others, "lr": rate}]
    if ranges:
        groups.append({"params": ranges, "lr": RANGE_SHARE * rate})
    begin = time.perf_counter()
    train_in_full(place, run, model, groups, args.steps)
    seconds = time.perf_counter() - begin
    trained = place.perplexity(model.eval(), place.heldout)
    deployed = rival.deploy(model, bits, example).eval()
    return {
        "kind": "quality",
        "rival": name,
        "package": f"{rival.package} {version(rival.package)}",
        "setting": setting,
        "seed": seed,
        "rate": rate,
        "range_rate": RANGE_SHARE * rate if ranges else None,
        "trained": trained,
        "deployed": place.perplexity(deployed, place.heldout),
        "chosen_by": place.perplexity(deployed, place.chosen_by),
        "tokens": args.steps * args.batch_size * args.window,
        "training_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "data": data_digest(place),
        "options": {name: getattr(args, name) for name in OPTIONS},
    }


def run_all(args: argparse.Namespace) -> None:
    place = find_place(make_quality_parser().parse_args(["run", *JOB, "--work", args.work]))
    results = Path(args.results)

    def once(name: str, setting: str, seed: int, rate: float) -> None:
        file = results / f"{name}-{setting}-{seed}-{rate:g}.json"
        if not file.exists():
            write_result(file, perform(place, name, setting, seed, rate))

    for seed in args.seeds:
        for rival, name in [(RIVALS[name], name) for name in args.rivals if name in RIVALS]:
            wanted = [setting for setting in args.settings if setting in rival.settings]
            # The rate is chosen first.
            for setting in sorted(wanted, key=lambda s: s != rival.tried_on):
                if setting == rival.tried_on and seed == 0:
                    below, *three, above = rival.rates
                    for rate in three:
                        once(name, setting, seed, rate)
                    best = chosen_rate(name, read_results(results))
                    for edge, beyond in ((three[0], below), (three[-1], above)):
                        if best == edge:
                            once(name, setting, seed, beyond)
                else:
                    once(name, setting, seed, chosen_rate(name, read_results(results)))


def chosen_rate(name: str, rows: list[dict[str, Any]]) -> float:
    """The rate of a rival with the least ``chosen_by``, where it was tried, on seed 0."""
    where = {"kind": "quality", "rival": name, "setting": RIVALS[name].tried_on, "seed": 0}
    tried = [row for row in rows if where.items() <= row.items()]
    rate: float = min(tried, key=lambda row: row["chosen_by"])["rate"]
    return rate


# Time and memory


def ours(variant: str, *, scales_only: bool = False) -> Prepare:
    """A way to train of `variants.py`, for the same arguments."""

    def prepare(model: PreTrainedModel, bits: int, rank: int, example: Tensor) -> nn.Module:
        adapted: Any = VARIANTS[variant](model, Grid(bits=bits))
        if scales_only:
            freeze_factors(adapted)
        return adapted

    return prepare


OURS: dict[str, tuple[str, Prepare]] = {
    "lrqat-fixed8": ("LR-QAT, fixed8", ours("LR-QAT, fixed8")),
    "lrqat-int": ("LR-QAT, int", ours("LR-QAT, int")),
    "scales": (
        "EfficientQAT's recipe, the phase of the scales",
        ours("LR-QAT, int", scales_only=True),
    ),
}
LORA = "lora"


def make_step(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """A whole training step, of a random Llama in bfloat16."""
    torch.manual_seed(0)
    model = random_llama(args.hidden, args.layers)
    ids = torch.randint(0, model.config.vocab_size, (1, args.tokens))
    prepare = {
        LORA: ours("LoRA"),
        **{key: prepare for key, (_, prepare) in OURS.items()},
        **{key: rival.prepare for key, rival in RIVALS.items()},
    }[name]
    trained = prepare(model, args.bits, RANK, ids).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_peak(name: str, args: argparse.Namespace) -> int:
    """Bytes of the peak of a step above the imports, in this process."""
    small = argparse.Namespace(**{**vars(args), "hidden": 64, "layers": 1, "tokens": 16})
    make_step(name, small)()  # imports what the tool needs, which a peak should count none of
    gc.collect()
    start = resident()
    step = make_step(name, args)
    step()  # optimizer state, workspaces
    return peak_bytes(step) - start


def measure_costs(names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and peak of a step, and those of LoRA on the unquantised model in the same run."""
    shape = [f"--{key}={getattr(args, key)}" for key in ("hidden", "layers", "tokens", "bits")]
    every = [LORA, *names]
    peaks = {key: in_own_process(__file__, "cost", *shape, "--peak_of", key) for key in every}
    steps = {key: make_step(key, args) for key in every}
    seconds: dict[str, list[float]] = {key: [] for key in every}
    for round_ in range(args.rounds + 1):
        for key, step in steps.items():
            # Processor time, on one thread: others may work on this machine.
            begin = time.process_time()
            step()
            if round_:  # the first one warms up
                seconds[key].append(time.process_time() - begin)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    packages = {key: RIVALS[key].package if key in RIVALS else "peft-lrqat" for key in names}
    return [
        {
            "kind": "cost",
            "rival": name,
            "package": f"{packages[name]} {version(packages[name])}",
            "time_to_lora": round(median[name] / median[LORA], 3),
            "peak": peaks[name],
            "peak_of_lora": peaks[LORA],
            "tokens": args.tokens,
            "options": {key: getattr(args, key) for key in ("hidden", "layers", "bits", "rounds")},
            "dtype": "bfloat16",
            "rank": RANK,
            "threads": torch.get_num_threads(),
        }
        for name in names
    ]


def cost_all(args: argparse.Namespace) -> None:
    if args.peak_of:
        print(measure_peak(args.peak_of, args))
        return
    files = {name: Path(args.results) / f"cost-{name}.json" for name in args.rivals}
    left = [name for name, file in files.items() if not file.exists()]
    for row in measure_costs(left, args) if left else []:
        write_result(files[row["rival"]], row)


# Exports


def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def logits(model: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=example).logits
    return found


def furthest(found: Tensor, wanted: Tensor) -> str:
    """How the logits of what was read back compare with those of what was deployed."""
    if torch.equal(found, wanted):
        return "the same logits"
    return f"logits within {(found - wanted).abs().max():.3f}"


def torchao_export(bits: int, folder: Path, example: Tensor) -> str:
    """transformers rounds the trained weights while it loads them, and saves that."""
    from transformers import TorchAoConfig

    tiny().save_pretrained(folder / "trained")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "trained",
        dtype=torch.float32,
        quantization_config=TorchAoConfig(torchao_config(bits)),
    )
    deployed = torchao_deploy(torchao_weights(tiny(), bits, 0, example), bits, example)
    model.save_pretrained(folder / "exported")
    again = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    return furthest(logits(again, example), logits(deployed, example))


def modelopt_export(bits: int, folder: Path, example: Tensor, *, groups: bool = False) -> str:
    """What it writes is read by runtimes for GPUs. ``groups``: of 64 weights, without LoRA."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    if groups:
        rules = [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*_proj.weight_quantizer",
                "cfg": {"num_bits": bits, "block_sizes": {-1: 64}},
                "enable": True,
            },
        ]
        model = mtq.quantize(tiny(), {"quant_cfg": rules, "algorithm": "max"})
    else:
        model = modelopt_deploy(modelopt_lora(tiny(), bits, RANK, example), bits, example)
    export_hf_checkpoint(model, export_dir=folder / "exported")
    return "not read back: for GPUs"


class Logits(nn.Module):
    """A model from token ids to logits, as a tracer wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False
        ).logits
        return found


def nncf_export(bits: int, folder: Path, example: Tensor) -> str:
    import openvino

    deployed = nncf_deploy(nncf_lora(tiny(), bits, RANK, example), bits, example)
    converted = openvino.convert_model(Logits(deployed).eval(), example_input=example)
    (folder / "exported").mkdir()
    openvino.save_model(converted, folder / "exported" / "model.xml", compress_to_fp16=False)
    precision = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.compile_model(folder / "exported" / "model.xml", "CPU", precision)
    found = torch.from_numpy(compiled([example.numpy()])[0])
    return furthest(found, logits(deployed, example))


def ours_export(bits: int, folder: Path, example: Tensor, *, format: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = get_peft_model(
        tiny(), LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", bits=bits)
    )
    export_model(model, folder / "exported", format=format, tokenizer=tokenizer)
    exact = verify_export(model, folder / "exported", format=format).exact
    return "the same weights, bit for bit" if exact else "other weights"


# By rival: its package, the file that it writes, and the function. The same grids for all:
# symmetric, one scale for each row.
EXPORTS: dict[str, tuple[str, str, Callable[[int, Path, Tensor], str]]] = {
    "torchao": ("torchao", "transformers' checkpoint for torchao", torchao_export),
    "modelopt": ("nvidia-modelopt", "its checkpoint for GPU runtimes", modelopt_export),
    "modelopt-g64": (
        "nvidia-modelopt",
        "the same, groups of 64",
        partial(modelopt_export, groups=True),
    ),
    "nncf": ("nncf", "OpenVINO", nncf_export),
    **{
        f"ours-{format}": ("peft-lrqat", format, partial(ours_export, format=format))
        for format in ("compressed-tensors", "gguf", "gptq", "packed")
    },
}
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


def measure_export(name: str, setting: str) -> dict[str, Any]:
    package, format, export = EXPORTS[name]
    torch.manual_seed(0)
    example = torch.randint(0, 512, (1, 32))
    row: dict[str, Any] = {
        "kind": "export",
        "rival": name,
        "package": f"{package} {version(package)}",
        "format": format,
        "setting": setting,
        "read_back": None,
        "file_bytes": None,
        "error": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            row["read_back"] = export(SETTINGS[setting]["bits"], Path(folder), example)
        except Exception as error:  # what it says is the result
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            return row
        files = [f for kind in WEIGHT_FILES for f in (Path(folder) / "exported").rglob(kind)]
        row["file_bytes"] = sum(file.stat().st_size for file in files)
    return row


def export_all(args: argparse.Namespace) -> None:
    for name in args.exports:
        for setting in args.settings:
            file = Path(args.results) / f"export-{name}-{setting}.json"
            if not file.exists():
                write_result(file, measure_export(name, setting))


# The tables


SHOWN = {"W4": "W4", "W3": "W3", "W2-symmetric": "W2", "W2": "W2, asymmetric"}
# Rows of `results/quality_demo`, by start and training.
REFERENCES = {
    ("none", "none"): "unquantised, not trained",
    ("none", "lora"): "unquantised, LoRA",
    ("nearest", "none"): "rounded to nearest, not trained",
}
PACKAGE = {
    ("blocks", "none"): "calibrated blocks, not trained",
    ("blocks", "scales"): "EfficientQAT's recipe: calibrated blocks, then scales",
    ("nearest", "full"): "all weights, from nearest",
    ("nearest", "lrqat"): "**LR-QAT, from nearest**",
    ("blocks", "lrqat"): "**LR-QAT, from calibrated blocks**",
    ("blocks", "predictions"): "**the same, with cached predictions**",
}


def table_lines(rows: list[dict[str, Any]], ours: list[dict[str, Any]] | None = None) -> list[str]:
    """The tables in Markdown, of this benchmark's rows and those of `quality.py`."""
    if ours is None:
        ours = read_results(RESULTS / "quality_demo")
    ours = ours + [row for row in rows if "kind" not in row]
    return [
        *quality_lines([row for row in rows if row.get("kind") == "quality"], ours),
        "",
        *cost_lines([row for row in rows if row.get("kind") == "cost"]),
        "",
        *export_lines([row for row in rows if row.get("kind") == "export"]),
    ]


def quality_lines(rows: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[str]:
    """Perplexity of what is deployed, and in brackets as trained, where that is another figure."""
    lines = ["| | rate | " + " | ".join(SHOWN.values()) + " |", "|---|" + "---|" * (1 + len(SHOWN))]

    def line_of(key: tuple[str, str], title: str) -> str:
        found = [row for row in ours if (row["start"], row["training"]) == key]
        by: dict[str, list[float]] = {}
        for row in found:
            by.setdefault(row["setting"], []).append(row["perplexity"])
        every = by.get(UNQUANTISED)  # the same whatever the grid
        cells = " | ".join(in_cell(every or by.get(setting)) for setting in SHOWN)
        return f"| {title} | | {cells} |"

    lines += [line_of(key, title) for key, title in REFERENCES.items()]
    for name, rival in RIVALS.items():
        its = [row for row in rows if row["rival"] == name]
        rate = chosen_rate(name, its) if its else None
        cells = []
        for setting in SHOWN:
            at = [r for r in its if r["setting"] == setting and r["rate"] == rate]
            deployed, trained = (in_cell([r[k] for r in at]) for k in ("deployed", "trained"))
            if at:
                cells.append(deployed if deployed == trained else f"{deployed} ({trained})")
            else:
                cells.append(rival.why_not if setting in TRIED else "-")
        lines.append(f"| {rival.title} | {rate or ''} | {' | '.join(cells)} |")
    lines += [line_of(key, title) for key, title in PACKAGE.items()]
    return lines


def cost_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A step, relative to LoRA's in the same run."""
    titles = {key: rival.title for key, rival in RIVALS.items()}
    titles |= {key: f"**{title}**" for key, (title, _) in OURS.items()}
    lines = ["| | time of a step | peak of a step, MB | relative to LoRA |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: list(titles).index(row["rival"])):
        share = row["peak"] / row["peak_of_lora"]
        lines.append(
            f"| {titles[row['rival']]} | {row['time_to_lora']:.2f} | {row['peak'] / MB:.0f} "
            f"| {share:.2f} |"
        )
    return lines


def export_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What each tool writes, and what it says where it does not."""
    settings = [setting for setting in SHOWN if setting in {row["setting"] for row in rows}]
    lines = ["| | file | " + " | ".join(SHOWN[s] for s in settings) + " |"]
    lines.append("|---|---|" + "---|" * len(settings))
    for name in EXPORTS:
        its = {row["setting"]: row for row in rows if row["rival"] == name}
        cells = []
        for row in (its.get(setting) for setting in settings):
            if row is None:
                cells.append("-")
            elif row["error"]:
                cells.append(f"refused: `{row['error']}`".replace("|", "/"))
            else:
                cells.append(f"{row['file_bytes'] / 1000:.0f} kB, {row['read_back']}")
        if its:
            first = next(iter(its.values()))
            lines.append(f"| {first['package']} | {first['format']} | {' | '.join(cells)} |")
    return lines


def print_tables(args: argparse.Namespace) -> None:
    print("\n".join(table_lines(read_results(Path(args.results)))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "cost", "export", "table"])
    parser.add_argument(
        "--rivals", nargs="+", default=list(RIVALS), choices=[*RIVALS, *OURS], help="of run, cost"
    )
    parser.add_argument("--exports", nargs="+", default=list(EXPORTS), choices=EXPORTS)
    parser.add_argument("--settings", nargs="+", default=TRIED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", default="quality-benchmark", help="for bases")
    parser.add_argument("--results", default=str(RESULTS / "rivals"))
    parser.add_argument("--hidden", type=int, default=1024, help="of the model of cost")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peak_of", help="only this peak, and print it")
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    {"run": run_all, "cost": cost_all, "export": export_all, "table": print_tables}[args.action](
        args
    )


if __name__ == "__main__":
    main()
