"""LoRA adapters become LORAQUANT and back.

The function stays the same, the report is honest, files are written whole or not at all, and
refusals are clear.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import StandInHub, run_client
from killing import check_whole_or_not_there
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load, load_file, save_file

from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, quantize_adapter
from peft_lrqat.quant.factors import groups, paper, residual
from peft_lrqat.quant.factors.allocation import relative_errors
from peft_lrqat.quant.factors.storage import expand
from peft_lrqat.shared import adapter_files
from peft_lrqat.shared.card import BEGIN


ROOT = Path(__file__).parents[2]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RECIPE = {"group_size": 7, "ratio": 0.8}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"v_proj": 7, ".*mlp.up_proj": 3},
        },
    ),
    "dora": ("llama", {"use_dora": True}),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "rank-1": ("llama", {"r": 1}),
    "rank-above-both": ("llama", {"r": 20, "target_modules": ["k_proj"]}),
    "bias-all": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "bias-lora-only": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}),
    "conv1d-embedding": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "dora-conv1d-embedding": ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    "classifier": ("classifier", {}),
    "modules-to-save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    ),
    "seq2seq": ("t5", {"target_modules": ["q", "v", "wo"]}),
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Makes conversions quick; what is computed once for all tests is computed in full."""
    for group_size in (7, 16):
        relative_errors(group_size)
    monkeypatch.setattr(groups, "CANDIDATES", 3)
    monkeypatch.setattr(residual, "MAX_SWEEPS", 1)
    monkeypatch.setattr(paper, "STEPS", 10)


def train(model, seed=7):
    """Changes all trained tensors; the singular values of the factors' products fall."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if ".lora_A" in name or ".lora_embedding_A" in name:
                parameter.copy_(noise * 0.6 ** torch.arange(len(noise))[:, None])
            elif ".lora_B" in name or ".lora_embedding_B" in name:
                parameter.copy_(noise)
            elif parameter.requires_grad:
                parameter += noise * 0.1
    return model


@pytest.fixture(scope="session")
def make_lora(make_base):
    """Makes a model with a LoRA adapter that looks trained.

    ``make_lora(architecture, dtype, adapter_name, **fields)``
    """

    def make(architecture="llama", dtype=torch.float32, adapter_name="default", **fields):
        defaults = {
            "r": 4,
            "target_modules": TARGETS,
            "task_type": TASKS.get(architecture, "CAUSAL_LM"),
        }
        config = LoraConfig(**{**defaults, **fields})
        return train(
            get_peft_model(make_base(architecture, dtype), config, adapter_name=adapter_name)
        ).eval()

    return make


@pytest.fixture(scope="module")
def lora(tmp_path_factory, make_lora):
    """Makes a directory with a plain LoRA adapter; tests must not change it."""
    folder = tmp_path_factory.mktemp("lora")
    make_lora().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(lora, tmp_path):
    """Copies that directory with other tensors or fields; a tensor of None is removed.

    ``changed(tensors, **fields)``
    """

    def make(tensors=None, **fields):
        folder = tmp_path / "changed"
        shutil.copytree(lora, folder)
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **fields}))
        merged = {**load_file(folder / WEIGHTS), **(tensors or {})}
        save_file({k: t for k, t in merged.items() if t is not None}, folder / WEIGHTS)
        return folder

    return make


def quantize(source, target, config=None, **options):
    return quantize_adapter(
        source, target, config or LoRAQuantConfig(**RECIPE), progress=False, **options
    )


def key_of(state, end):
    return min(key for key in state if key.endswith(end))


def stored_factors(folder):
    """Returns B (m, K) and A (K, n) of each module, in float64, from the format alone."""
    config, state = LoRAQuantConfig.from_pretrained(folder), load_file(folder / WEIGHTS)
    factors = {}
    for name in config.component_bits:
        kinds = ("codes", "scales", "zero_points")
        keys = {kind: f"base_model.model.{name}.loraquant_{kind}" for kind in kinds}
        tensors = {kind: state[key] for kind, key in keys.items() if key in state}
        factors[name] = expand(
            config.packed_format(name, *config.shapes[name]), tensors, torch.float64
        )
    return factors


def as_twin(state, factors):
    """Returns LoRA's state with these factors in place of its own, of the same rank."""
    state = dict(state)
    for name, (B, A) in factors.items():
        keys = [f"base_model.model.{name}.{end}" for end in ("lora_B.weight", "lora_A.weight")]
        if keys[0] not in state:
            keys = [
                f"base_model.model.{name}.{end}" for end in ("lora_embedding_B", "lora_embedding_A")
            ]
        padded = [torch.zeros_like(state[key], dtype=torch.float32) for key in keys]
        padded[0][:, : len(A)], padded[1][: len(A)] = B, A
        state |= dict(zip(keys, padded))
    return state


# What the packed adapter does


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, "residual") for case in CASES),
        *((case, "paper") for case in ("patterns", "dora-conv1d-embedding")),
    ],
)
def test_it_acts_as_lora_with_the_stored_factors_and_so_does_what_is_dequantised(
    case, method, make_lora, make_base, logits_of, tmp_path
):
    architecture, fields = CASES[case]
    model = make_lora(architecture, **fields)
    model.save_pretrained(tmp_path / "lora")
    quantize(tmp_path / "lora", tmp_path / "packed", LoRAQuantConfig(method=method, **RECIPE))
    twin = make_lora(architecture, **fields)
    state = as_twin(load_file(tmp_path / "lora" / WEIGHTS), stored_factors(tmp_path / "packed"))
    assert not set_peft_model_state_dict(twin, state).unexpected_keys
    expected = logits_of(twin, architecture)
    assert not torch.allclose(expected, logits_of(make_base(architecture), architecture), atol=1e-3)

    packed = PeftModel.from_pretrained(make_base(architecture), tmp_path / "packed").eval()
    # Both in float32: a few roundings, carried through two blocks of random weights.
    torch.testing.assert_close(logits_of(packed, architecture), expected, rtol=1e-4, atol=1e-4)

    back = dequantize_adapter(tmp_path / "packed", tmp_path / "back", dtype=torch.float32)
    again = PeftModel.from_pretrained(make_base(architecture), tmp_path / "back").eval()
    torch.testing.assert_close(logits_of(again, architecture), expected, rtol=1e-4, atol=1e-4)
    # Ranks, and all tensors that are not factors, are those of the first adapter.
    source, result = load_file(tmp_path / "lora" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert {k: t.shape for k, t in source.items()} == {k: t.shape for k, t in result.items()}
    others = [
        k
        for k in source
        if not k.endswith(("_A.weight", "_B.weight", "_embedding_A", "_embedding_B"))
    ]
    assert all(torch.equal(source[k], result[k]) for k in others)
    kept = (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "use_dora",
        "task_type",
    )
    kept += (
        "modules_to_save",
        "target_modules",
        "base_model_name_or_path",
        "trainable_token_indices",
    )
    before = LoraConfig.from_pretrained(tmp_path / "lora")
    assert {n: getattr(before, n) for n in kept} == {n: getattr(back, n) for n in kept}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
def test_files_in_any_dtype(dtype, lora, changed, tmp_path):
    tensors = {k: t.to(dtype) for k, t in load_file(lora / WEIGHTS).items()}
    of_dtype, of_float = changed(tensors), tmp_path / "float"
    shutil.copytree(of_dtype, of_float)
    save_file({k: t.float() for k, t in tensors.items()}, of_float / WEIGHTS)
    first, second = (quantize(f, tmp_path / f"{f.name}-packed") for f in (of_dtype, of_float))
    files = [
        (tmp_path / name / WEIGHTS).read_bytes() for name in ("changed-packed", "float-packed")
    ]
    assert len(files[0]) == len(files[1])
    # The digests differ by the report, which names the bytes before.
    one, other = (load(data) for data in files)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first.report["bytes_before"] * 4 == second.report["bytes_before"] * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantised_values_are_rounded_once(dtype, lora, tmp_path):
    quantize(lora, tmp_path / "packed")
    dequantize_adapter(tmp_path / "packed", tmp_path / "back", dtype=dtype)
    state = load_file(tmp_path / "back" / WEIGHTS)
    expected = as_twin(load_file(lora / WEIGHTS), stored_factors(tmp_path / "packed"))
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key].to(dtype)) for key, tensor in state.items())


def test_a_live_model_and_its_files_give_the_same(lora, make_lora, tmp_path):
    model = make_lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    quantize(lora, tmp_path / "files")
    quantize(model, tmp_path / "live")
    assert (tmp_path / "files" / WEIGHTS).read_bytes() == (tmp_path / "live" / WEIGHTS).read_bytes()
    quantize(train(model, seed=1), tmp_path / "other", adapter_name="other")
    assert {len(A) for _, A in stored_factors(tmp_path / "other").values()} <= {1, 2}
    assert model.peft_config["default"].inference_mode is False
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name in before if ".lora_" in name and ".default" in name
    ]
    with pytest.raises(
        ValueError, match=r"no adapter `none`, but \['default', 'other'\]; give `adapter_name`"
    ):
        quantize(model, tmp_path / "none", adapter_name="none")


def test_zero_products_act_as_the_base_model(make_base, logits_of, tmp_path):
    fresh = get_peft_model(
        make_base(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    made = quantize(fresh, tmp_path / "packed")
    assert set(made.component_bits.values()) == {""}
    assert (made.report["relative_error"], made.report["nominal_bits_per_parameter"]) == (0, 0)
    packed = PeftModel.from_pretrained(make_base(), tmp_path / "packed").eval()
    assert torch.equal(logits_of(packed), logits_of(make_base()))
    dequantize_adapter(tmp_path / "packed", tmp_path / "back")
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(make_base(), tmp_path / "back").eval()),
        logits_of(make_base()),
    )


def test_ratio_1_gives_every_component_the_high_bits(lora, tmp_path):
    made = quantize(
        lora,
        tmp_path / "packed",
        LoRAQuantConfig(method="paper", ratio=1.0, bits_high=3, group_size=7),
    )
    assert set(made.component_bits.values()) == {"3333"}
    assert made.report["nominal_bits_per_parameter"] == 3


# What it reports


@pytest.mark.parametrize("case", ["lora", "dora-conv1d-embedding", "classifier"])
@pytest.mark.parametrize("method", ["residual", "paper"])
def test_the_report_is_what_can_be_measured(case, method, make_lora, tmp_path):
    architecture, fields = CASES[case]
    make_lora(architecture, **fields).save_pretrained(tmp_path / "lora")
    made = quantize(
        tmp_path / "lora", tmp_path / "packed", LoRAQuantConfig(method=method, **RECIPE)
    )
    report = LoRAQuantConfig.from_pretrained(tmp_path / "packed").report
    assert report == made.report
    source, result = (load_file(tmp_path / name / WEIGHTS) for name in ("lora", "packed"))
    error = norm = parameters = codes = 0
    for name, (q_B, q_A) in stored_factors(tmp_path / "packed").items():
        A, B = (
            t.double()
            for k, t in sorted(source.items())
            if k.startswith(f"base_model.model.{name}.lora_") and t.ndim == 2
        )
        one_error, one_norm = ((B @ A) - (q_B @ q_A)).norm(), (B @ A).norm()
        assert report["relative_error_of_modules"][name] == pytest.approx(
            float(one_error / one_norm), abs=1e-4
        )
        error, norm = error + one_error**2, norm + one_norm**2
        parameters += B.numel() + A.numel()
        codes += sum(map(int, made.component_bits[name])) * (len(B) + A.shape[1])
    assert report["relative_error"] == pytest.approx(float((error / norm) ** 0.5), abs=1e-5)
    other = sum(
        t.numel() * t.element_size()
        for k, t in result.items()
        if not k.endswith(("codes", "scales", "points"))
    )
    assert report["bytes"] == (tmp_path / "packed" / WEIGHTS).stat().st_size - other
    assert report["bits_per_parameter"] == pytest.approx(8 * report["bytes"] / parameters, abs=1e-4)
    assert report["nominal_bits_per_parameter"] == pytest.approx(codes / parameters, abs=1e-4)
    assert report["bytes_before"] == 4 * parameters
    assert BEGIN in (tmp_path / "packed" / "README.md").read_text()


@pytest.mark.parametrize("average_bits", [0.5, 1.5, 3.0])
def test_average_bits_hold_codes_and_scales(average_bits, lora, tmp_path):
    made = quantize(
        lora, tmp_path / "packed", LoRAQuantConfig(average_bits=average_bits, group_size=16)
    )
    parameters = made.report["bytes_before"] / 4
    stored = 8 * sum(
        t.numel() * t.element_size() for t in load_file(tmp_path / "packed" / WEIGHTS).values()
    )
    assert 0.95 * average_bits < stored / parameters <= average_bits


# What lies on the disk


def run_python(code, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_conversions_give_equal_bytes(lora, tmp_path):
    """One runs in another process, where sets have another order: see `test_the_hub`."""
    quantize(lora, tmp_path / "one")
    quantize(lora, tmp_path / "two")
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert files_in(tmp_path / "one").keys() == {WEIGHTS, CONFIG, "README.md"}


def test_files_can_be_read_by_whom_the_umask_lets(lora, tmp_path):
    quantize(lora, tmp_path / "packed")
    (tmp_path / "other").mkdir()
    assert (tmp_path / "packed").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "file").touch()
    assert (tmp_path / "packed" / CONFIG).stat().st_mode == (tmp_path / "file").stat().st_mode


LOAD = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
logits = []
for name in json.loads(sys.argv[2]):
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base-" + name)
    model = PeftModel.from_pretrained(base, sys.argv[1] + "/back-" + name).eval()
    with torch.no_grad():
        logits.append(model(torch.arange(3, 15)[None]).logits)
assert not any(name.startswith("peft_lrqat") for name in sys.modules)
torch.save(logits, sys.argv[1] + "/logits.pt")
"""


def test_patterns_whose_order_counts_are_dequantised_as_peft_reads_them(make_base, tmp_path):
    """PEFT sorts the keys of a LoRA file, and the first key that fits counts."""
    names = {"q_proj": 3, r"layers\.1\..*q_proj": 2, "k_proj": 1}
    alphas = {name: 5.0 * rank for name, rank in names.items()}
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj"],
        rank_pattern=names,
        alpha_pattern=alphas,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    quantize_adapter(get_peft_model(make_base(), lora), tmp_path / "packed", progress=False)
    dequantize_adapter(tmp_path / "packed", tmp_path / "back", dtype=torch.float32)
    packed, back = (
        PeftModel.from_pretrained(make_base(), tmp_path / name).eval()
        for name in ("packed", "back")
    )
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(back(input_ids=ids).logits, packed(input_ids=ids).logits)
    with packed.disable_adapter():
        assert not torch.allclose(packed(input_ids=ids).logits, back(input_ids=ids).logits)


def test_peft_alone_loads_what_is_dequantised(make_lora, make_base, tmp_path):
    cases = ["patterns", "dora", "bias-all", "conv1d-embedding", "modules-to-save"]
    expected = []
    for case in cases:
        architecture, fields = CASES[case]
        make_base(architecture).save_pretrained(tmp_path / f"base-{case}")
        quantize(make_lora(architecture, **fields), tmp_path / f"packed-{case}")
        dequantize_adapter(tmp_path / f"packed-{case}", tmp_path / f"back-{case}")
        packed = PeftModel.from_pretrained(
            make_base(architecture), tmp_path / f"packed-{case}"
        ).eval()
        with torch.no_grad():
            expected.append(packed(torch.arange(3, 15)[None]).logits)
    run_python(LOAD, tmp_path, json.dumps(cases), PYTHONPATH="")
    for got, wanted in zip(torch.load(tmp_path / "logits.pt"), expected):
        # Factors in float16, of 11 bits, carried through two blocks.
        assert (got - wanted).norm() < 5e-3 * wanted.norm()


FROM_HUB = """
import json
from huggingface_hub import HfApi
from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, quantize_adapter
api, results = HfApi(), []
for name in ("lora", "pickle", "empty"):
    api.create_repo(f"user/{name}")
    api.upload_folder(folder_path=name, repo_id=f"user/{name}")
recipe = LoRAQuantConfig(group_size=7, ratio=0.8)
made = quantize_adapter("user/lora", "packed", recipe, progress=False)
api.create_repo("user/packed")
api.upload_folder(folder_path="packed", repo_id="user/packed")
dequantize_adapter("user/packed", "back")
for name in ("user/pickle", "user/empty", "user/none", "no/such/path"):
    try:
        quantize_adapter(name, "refused", progress=False)
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def test_the_hub(lora, tmp_path, monkeypatch):
    monkeypatch.undo()  # the other process searches in full
    # The Hub's check would refuse PEFT's card: this base model has no name.
    shutil.copytree(lora, tmp_path / "lora", ignore=shutil.ignore_patterns("README.md"))
    for name in ("pickle", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.bin").write_bytes(b"anything")
    shutil.copy(lora / CONFIG, tmp_path / "pickle")
    with StandInHub() as hub:
        refused = json.loads(
            run_client(hub, FROM_HUB, tmp_path, PYTHONHASHSEED="12").splitlines()[-1]
        )
    quantize(lora, tmp_path / "local")
    dequantize_adapter(tmp_path / "local", tmp_path / "local-back")
    assert files_in(tmp_path / "packed") == files_in(tmp_path / "local")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (
        tmp_path / "local-back" / WEIGHTS
    ).read_bytes()
    assert f"user/pickle has no {WEIGHTS}; weights in other formats can run code" in refused[0]
    assert (
        f"user/empty has no {CONFIG}; give a directory or repository that holds a saved adapter"
        in refused[1]
    )
    assert "user/none is not a directory, and not a repository that can be reached" in refused[2]
    assert "no/such/path is not a directory, and not a repository that can be reached" in refused[3]
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("function", [quantize, dequantize_adapter])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_nothing_is_written_over(kind, function, lora, tmp_path):
    quantize(lora, tmp_path / "packed")
    source = lora if function is quantize else tmp_path / "packed"
    target = tmp_path / "target"
    if kind == "directory":
        target.mkdir()
    (target / "theirs" if kind == "directory" else target).write_text("kept")
    with pytest.raises(FileExistsError, match="target exists, and nothing is written over it"):
        function(source, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "target"]
    assert (target / "theirs" if kind == "directory" else target).read_text() == "kept"


CRASHES = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, files, quantize_adapter

lora, packed, folder = map(Path, sys.argv[1:])

def run(function):
    target = folder / "target"
    if function == "quantize":
        recipe = LoRAQuantConfig(group_size=7, average_bits=1.0)
        quantize_adapter(lora, target, recipe, progress=False)
    else:
        dequantize_adapter(packed, target)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(call):
    def wrapped(*args, **kwargs):
        call(*args, **kwargs)
        die()
    return wrapped

def fail(*_, **__):
    raise RuntimeError("half-way")

WAYS = {
    "killed before the weights": lambda: setattr(files, "save_file", die),
    "killed after the weights": lambda: setattr(files, "save_file", after(files.save_file)),
    "killed before the rename": lambda: setattr(Path, "rename", die),
    "error before the weights": lambda: setattr(files, "save_file", fail),
    "error in the rename": lambda: setattr(Path, "rename", fail),
    "disk full": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY)),
    "nothing": lambda: None,
}
run("quantize")  # what is computed once and kept
os.system(f"rm -r {folder}; mkdir {folder}")
results = {}
for function in ("quantize", "dequantize"):
    for way, prepare in WAYS.items():
        child = os.fork()
        if child == 0:
            prepare()
            try:
                run(function)
            except (RuntimeError, OSError) as error:
                os.write(2, f"{type(error).__name__}: {error}\\n".encode())
                os._exit(3)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        left = [p for p in folder.iterdir() if not p.name.startswith(".")]
        needed = {"adapter_config.json", "adapter_model.safetensors"}
        whole = [p for p in folder.iterdir() if needed <= set(os.listdir(p))]
        hidden = [p for p in folder.iterdir() if p.name.startswith(".")]
        code = os.waitstatus_to_exitcode(status)
        results[f"{function}, {way}"] = [code, len(left), len(hidden), len(whole)]
        os.system(f"rm -r {folder}; mkdir {folder}")
print(json.dumps(results))
"""


def test_what_a_crash_leaves(make_lora, tmp_path):
    make_lora(target_modules=["v_proj"]).save_pretrained(tmp_path / "lora")
    quantize(tmp_path / "lora", tmp_path / "packed")
    (tmp_path / "folder").mkdir()
    results = json.loads(
        run_python(CRASHES, tmp_path / "lora", tmp_path / "packed", tmp_path / "folder")
    )
    killed = -9
    for function in ("quantize", "dequantize"):
        found = {
            way.partition(", ")[2]: result
            for way, result in results.items()
            if way.startswith(function)
        }
        # Exit code; visible directories; hidden ones; all that hold a whole adapter.
        assert found == {
            "killed before the weights": [killed, 0, 1, 0],
            "killed after the weights": [killed, 0, 1, 0],
            "killed before the rename": [killed, 0, 1, 1],
            "error before the weights": [3, 0, 0, 0],
            "error in the rename": [3, 0, 0, 0],
            "disk full": [3, 0, 0, 0],
            "nothing": [0, 1, 0, 1],
        }


@pytest.mark.parametrize("function", [quantize, dequantize_adapter])
def test_killed_at_every_write(function, make_lora, tmp_path):
    make_lora(target_modules=["v_proj"]).save_pretrained(tmp_path / "lora")
    quantize(tmp_path / "lora", tmp_path / "packed")
    source = tmp_path / ("lora" if function is quantize else "packed")
    target = tmp_path / "place" / "target"
    check_whole_or_not_there(
        lambda: function(source, target), target, lambda: check_adapter(target), least=5
    )


def check_adapter(folder):
    """Whole, and with the digests that it was saved with."""
    adapter_files.check_adapter(folder / CONFIG, folder / WEIGHTS)


# What is refused


def refused(error, message, source, tmp_path, function=quantize):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=message):
        function(source, tmp_path / "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"hidden_size": 1}}, "megatron_config"),
        ({"use_bdlora": {}}, "use_bdlora"),
        ({"arrow_config": {}}, "arrow_config"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"monteclora_config": {}}, "monteclora_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_of_lora_that_cannot_be_stored(fields, name, changed, tmp_path):
    refused(
        ValueError,
        rf"the adapter uses `{name}` \(.*\), which LORAQUANT cannot store",
        changed(**fields),
        tmp_path,
    )


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_model(name, changed, tmp_path):
    message = rf"`init_lora_weights='{name}'` takes the first factors out of the base weights"
    refused(ValueError, message, changed(init_lora_weights=name), tmp_path)


@pytest.mark.parametrize("name", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_do_not(name, changed, tmp_path):
    quantize(changed(init_lora_weights=name), tmp_path / "packed")


def test_a_live_model_that_changed_its_base(make_base, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'` takes"):
        quantize(get_peft_model(make_base(), config), tmp_path / "packed")


def test_adapters_of_other_types(lora, make_peft, make_base, tmp_path):
    other = "but must be LORA or LRQAT; only LoRA, DoRA and LR-QAT adapters can be quantised"
    make_peft().save_pretrained(tmp_path / "lrqat")
    refused(
        ValueError,
        "of type LRQAT, but must be LORAQUANT",
        tmp_path / "lrqat",
        tmp_path,
        dequantize_adapter,
    )
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(make_base(), prompt).save_pretrained(tmp_path / "prompt")
    refused(ValueError, f"of type PROMPT_TUNING, {other}", tmp_path / "prompt", tmp_path)
    made = quantize(lora, tmp_path / "packed")
    refused(ValueError, f"of type LORAQUANT, {other}", tmp_path / "packed", tmp_path)
    refused(ValueError, "of type LORA, but must be LORAQUANT", lora, tmp_path, dequantize_adapter)
    with pytest.raises(ValueError, match="quantised already; give a fresh LoRAQuantConfig"):
        quantize(lora, tmp_path / "again", made)


def test_what_is_no_adapter(make_base, lora, tmp_path):
    native = make_base()
    native.add_adapter(LoraConfig(target_modules=["q_proj"]))
    refused(
        TypeError,
        "`source` must be a directory, .* but is a LlamaForCausalLM; save its adapter",
        native,
        tmp_path,
    )
    with pytest.raises(TypeError, match="`config` must be a LoRAQuantConfig, but is a dict"):
        quantize(lora, tmp_path / "packed", {"bits_high": 2})


def test_damaged_factors(lora, changed, tmp_path):
    state = load_file(lora / WEIGHTS)
    A, B = key_of(state, "lora_A.weight"), key_of(state, "lora_B.weight")
    nan, infinite, large = state[A].clone(), state[B].clone(), state[B].clone()
    nan[1, 2], infinite[0, 0], large[0, 0] = torch.nan, torch.inf, 1e5
    cases = [
        (
            {A: None},
            "has only one of lora_B.weight and lora_A.weight; the adapter's file is not whole",
        ),
        ({B: None}, "has only one of lora_B.weight and lora_A.weight"),
        (
            {A: nan},
            "`A` of `model.layers.0.mlp.down_proj` has NaN or infinite entries; nothing was "
            "written",
        ),
        ({B: infinite}, "`B` of `model.layers.0.mlp.down_proj` has NaN or infinite entries"),
        (
            {B: large},
            r"an entry of 1e\+05, but at most 1e\+04 can be stored with scales of bfloat16",
        ),
        (
            {A: state[A][:3].clone()},
            "which do not form a product of rank 4; the weights and adapter_config.json do not "
            "belong",
        ),
        (
            {A: torch.zeros(4, 3, 3, 3), B: torch.zeros(8, 4, 1, 1)},
            "is a convolution, with factors of shapes",
        ),
        ({A: torch.zeros(4), B: torch.zeros(4)}, "do not form a product of rank 4"),
        ({A: torch.zeros(4, 0)}, "do not form a product of rank 4"),
        (
            {A: torch.zeros(4, 48, dtype=torch.int8)},
            "`A` of .* must hold floating-point numbers, but holds torch.int8",
        ),
        (
            {f"{A[:-7]}.bias": torch.zeros(2)},
            r"lora_A\.bias`, which LORAQUANT does not know and cannot store",
        ),
        (
            {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)},
            "must have 0 magnitudes, but has 1",
        ),
        (
            {"base_model.model.lm_head.weight": torch.full((2, 2), torch.nan)},
            r"`.*lm_head\.weight` has NaN",
        ),
        (dict.fromkeys(state), "no pair of factors A and B: there is nothing to quantise"),
    ]
    for tensors, message in cases:
        refused(ValueError, message, changed(tensors), tmp_path)
        shutil.rmtree(tmp_path / "changed")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, "do not form a product of rank 8"),
        (
            {"rank_pattern": {"down_proj": 2}},
            r"`model\.layers\.0\.mlp\.down_proj` .* do not form a product of rank 2",
        ),
        ({"use_dora": True}, "with `use_dora=True` the adapter must have 8 magnitudes, but has 0"),
        ({"r": "four"}, "`r` must be an integer"),
        ({"lora_alpha": None}, "`lora_alpha` must be a number"),
        ({"bias": "some"}, "`bias` must be one of"),
        ({"target_parameters": "x"}, f"{CONFIG} in .* does not describe an adapter"),
    ],
)
def test_configs_that_do_not_fit(fields, message, changed, tmp_path):
    refused(ValueError, message, changed(**fields), tmp_path)


def test_patterns_that_are_not_there(changed, tmp_path):
    assert (
        quantize(changed(rank_pattern=None, alpha_pattern=None), tmp_path / "packed").rank_pattern
        == {}
    )


@pytest.mark.parametrize("function", [quantize, dequantize_adapter])
def test_files_that_are_not_whole(function, lora, tmp_path):
    quantize(lora, tmp_path / "packed")
    whole = lora if function is quantize else tmp_path / "packed"
    weights = (whole / WEIGHTS).read_bytes()
    config = (whole / CONFIG).read_bytes()
    cases = [
        (WEIGHTS, weights[: len(weights) // 2], f"{WEIGHTS} in .* is not whole"),
        (WEIGHTS, weights[:-1], f"{WEIGHTS} in .* is not whole"),
        (WEIGHTS, weights[:5], f"{WEIGHTS} in .* is not whole"),
        (WEIGHTS, b"", f"{WEIGHTS} in .* is not whole"),
        (
            WEIGHTS,
            None,
            f"has no {WEIGHTS}; weights in other formats can run code when they are read",
        ),
        (CONFIG, config[: len(config) // 2], f"{CONFIG} in .* cannot be read"),
        (CONFIG, b"\xff\xfe", f"{CONFIG} in .* cannot be read"),
        (CONFIG, b"[]", "must hold a JSON object, but holds a list"),
        (CONFIG, b"{}", "is of type None, but must be LORA"),
        (CONFIG, None, f"has no {CONFIG}"),
    ]
    for name, content, message in cases:
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        (folder / "adapter_model.bin").write_bytes(b"never read")
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        refused(ValueError, message, folder, tmp_path, function)
        shutil.rmtree(folder)


def test_packed_adapters_that_were_changed(make_lora, tmp_path):
    quantize(make_lora(use_dora=True), tmp_path / "packed")
    config, state = (
        json.loads((tmp_path / "packed" / CONFIG).read_text()),
        load_file(tmp_path / "packed" / WEIGHTS),
    )
    scales, magnitude = key_of(state, "loraquant_scales"), key_of(state, "loraquant_magnitude")
    name = scales.removeprefix("base_model.model.").removesuffix(".loraquant_scales")
    without = {k: v for k, v in config["component_bits"].items() if k != name}
    cases = [
        ({scales: state[scales] * torch.nan}, {}, f"`{name}` in .*: scales must be finite"),
        ({scales: None}, {}, f"`{name}` in .*: the scales are missing"),
        ({magnitude: None}, {}, f"`{name}` in .*: the magnitude is missing"),
        (
            {magnitude: torch.ones(3)},
            {},
            f"`{name}` in .*: the magnitude must be 32 finite numbers",
        ),
        (
            {},
            {"component_bits": without},
            f"{CONFIG} must have the same modules, but differ in `{name}`",
        ),
        ({}, {"shapes": {}}, f"`{name}` in .*: {CONFIG} has no `shapes` for this module"),
        (
            {},
            {"shapes": {**config["shapes"], name: [1, 1]}},
            f"`{name}` in .*: the magnitude must be 1",
        ),
        ({}, {"group_size": 8}, "in .*: the scales must be"),
        ({}, {"use_dora": False}, "in .*: magnitude are stored"),
        (
            {},
            {"r": 2**40},
            f"{CONFIG} in .* does not describe an adapter .*larger than any adapter's",
        ),
        (
            {},
            {"format_version": 99},
            f"{CONFIG} in .* does not describe an adapter .*saved by a newer release",
        ),
    ]
    for tensors, fields, message in cases:
        folder = tmp_path / "changed"
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps({**config, **fields}))
        save_file(
            {k: t for k, t in {**state, **tensors}.items() if t is not None}, folder / WEIGHTS
        )
        refused(ValueError, message, folder, tmp_path, dequantize_adapter)
        shutil.rmtree(folder)


def test_values_too_large_for_the_dtype(lora, changed, tmp_path):
    tensors = {k: t * 3e3 for k, t in load_file(lora / WEIGHTS).items()}
    quantize(changed({k: t.clamp(-9e3, 9e3) for k, t in tensors.items()}), tmp_path / "packed")
    state = load_file(tmp_path / "packed" / WEIGHTS)
    scales = key_of(state, "scales")
    save_file({**state, scales: torch.full_like(state[scales], 1e5)}, tmp_path / "packed" / WEIGHTS)
    refused(
        ValueError, "too large for torch.float16", tmp_path / "packed", tmp_path, dequantize_adapter
    )
    dequantize_adapter(tmp_path / "packed", tmp_path / "wide", dtype=torch.bfloat16)


def test_adapters_in_a_folder_of_the_source(make_lora, tmp_path):
    make_lora(target_modules=["v_proj"]).save_pretrained(tmp_path / "all" / "second")
    quantize(tmp_path / "all", tmp_path / "packed" / "second", subfolder="second")
    dequantize_adapter(tmp_path / "packed", tmp_path / "back", subfolder="second")
    assert (tmp_path / "back" / WEIGHTS).is_file()
    refused(ValueError, f"has no {CONFIG}", tmp_path / "all", tmp_path)
