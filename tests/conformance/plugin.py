"""A pytest plug-in that runs PEFT's tests on LR-QAT: the tests are PEFT's, the cases are ours.

PEFT's test modules have their cases in lists that `parametrize` refers to. The lists are replaced
by those below, tests that get no case of ours are deselected, and the tests named in
`deviations.yaml` are expected to fail, each for its reason. A test that fails without being named
there is an error, and so is a named one that passes.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import make_models

from peft_lrqat import LRQATConfig
from peft_lrqat.base import downcast
from peft_lrqat.quant import Grid, estimate_range, low_rank


MODEL_FOLDER = "models"  # beside PEFT's `tests`, where pytest runs
CUSTOM_CASES = [
    ("MLP, one name", "MLP", {"target_modules": "lin0"}),
    ("MLP, list", "MLP", {"target_modules": ["lin0"]}),
    ("MLP, last layer", "MLP", {"target_modules": ["lin1"], "r": 2}),
    ("MLP, both layers in groups", "MLP", {"target_modules": ["lin0", "lin1"], "group_size": 5}),
    ("MLP, module to save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP, asymmetric", "MLP", {"target_modules": ["lin0"], "symmetric": False, "group_size": 2}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
]
TWO_ADAPTERS = [
    (
        "Same",
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False},
    ),
    (
        "Different",
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
]


def _models(*names: str) -> list[str]:
    return [f"{MODEL_FOLDER}/tiny-{name}" for name in names]


def _task(task_type: str) -> list[tuple[type, dict[str, Any]]]:
    return [(LRQATConfig, {"task_type": task_type, "r": 8})]


# Test module: {name of a list in it: our cases}.
CASES: dict[str, dict[str, list]] = {
    "test_custom_models": {
        "TEST_CASES": [
            (name, model, LRQATConfig, settings) for name, model, settings in CUSTOM_CASES
        ],
        "ALL_PEFT_CONFIG_CLASSES": [LRQATConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            (name, "lrqat", LRQATConfig, *pair) for name, *pair in TWO_ADAPTERS
        ],
    },
    "test_decoder_models": {
        "ALL_CONFIGS": _task("CAUSAL_LM"),
        "PEFT_DECODER_MODELS_TO_TEST": _models("opt", "conv1d", "llama", "qwen2"),
    },
    "test_target_parameters": {
        "ALL_CONFIGS": [
            (
                model,
                LRQATConfig,
                {"task_type": "CAUSAL_LM", "target_modules": [], "target_parameters": names},
            )
            for model, names in zip(
                _models("mixtral", "gpt-oss"),
                ("all-experts", ["mlp.experts.down_proj"]),
                strict=True,
            )
        ],
    },
    "test_encoder_decoder_models": {
        "ALL_CONFIGS": _task("SEQ_2_SEQ_LM"),
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST": _models("t5", "bart"),
    },
    "test_feature_extraction_models": {
        "ALL_CONFIGS": _task("FEATURE_EXTRACTION"),
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": _models("bert", "deberta-v2"),
    },
    "test_seq_classifier": {
        "ALL_CONFIGS": _task("SEQ_CLS"),
        "PEFT_SEQ_CLS_MODELS_TO_TEST": _models("bert-classifier", "llama-classifier"),
    },
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": _task("TOKEN_CLS"),
        "QA_CONFIGS": _task("QUESTION_ANS"),
        "PEFT_TOKEN_CLS_MODELS_TO_TEST": _models("bert-classifier"),
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(LRQATConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(LRQATConfig, {})],
    },
}
# Tests of a few named types that hold for every type.
OF_A_FEW_TYPES = (
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_default_target_modules_not_set_raises",
    "test_default_target_modules_not_set_model_type_set_raises",
    "test_default_target_modules_list_of_str",
    "test_default_target_modules_str",
)

STORAGE: dict[str, dict[str, str]] = {
    "lossless": {"downcast": "fp32", "scale_dtype": "float32"},
    "int": {"downcast": "int"},
    "fixed8": {"downcast": "fixed8"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storage",
        choices=sorted(STORAGE),
        default="int",
        help="how LR-QAT keeps its frozen weights",
    )


def pytest_configure(config: pytest.Config) -> None:
    # PEFT's tests make such warnings of transformers errors, but these are about what PEFT and its
    # tests call.
    config.addinivalue_line("filterwarnings", "ignore:.*gradient_checkpointing.*:FutureWarning")
    storage = config.getoption("storage")
    _set_defaults(LRQATConfig, STORAGE[storage])
    if storage == "lossless":
        low_rank.tile = _tile_without_rounding
        downcast.estimate_range = _range_of_a_power_of_two
    if importlib.util.find_spec("diffusers") is None:
        stub = types.ModuleType("diffusers")
        stub.__getattr__ = lambda name: type(name, (), {})
        sys.modules["diffusers"] = stub
    if not hasattr(config, "workerinput"):  # once, not in every process of pytest-xdist
        make_models(config.rootpath / MODEL_FOLDER)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.suffix == ".py" and collection_path.stem not in CASES else None


def _set_defaults(cls: type, values: dict[str, Any]) -> None:
    """Other defaults for a dataclass: many tests make a config without arguments."""
    init = inspect.unwrap(cls.__init__)
    names = inspect.getfullargspec(init).args[-len(init.__defaults__) :]
    init.__defaults__ = tuple(
        values.get(name, old) for name, old in zip(names, init.__defaults__, strict=True)
    )


def _range_of_a_power_of_two(
    weight: torch.Tensor, grid: Grid, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of ``estimate_range``: steps by which a weight is divided and multiplied without
    rounding.
    """
    scale, zero_point = estimate_range(weight, grid, **options)
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent), zero_point


def _tile_without_rounding(
    w: low_rank.LowRankWeight, rows: slice | torch.Tensor, columns: slice | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replaces ``low_rank.tile``: Q = Z, and Z counts as inside the grid, wherever it lies."""
    grid = w.format.grid
    columns = slice(0, w.format.in_features) if columns is None else columns
    groups, width = low_rank.groups_of(w, columns), columns.stop - columns.start
    dtype = torch.promote_types(torch.float32, torch.promote_types(w.A.dtype, w.scale.dtype))
    phi = w.format.decode(w.phi[rows], columns).to(dtype)
    z = torch.addmm(phi, w.B[rows].to(dtype), w.A[:, columns].to(dtype), alpha=w.gamma)
    inside = z.clamp(grid.qmin, grid.qmax)
    if w.zero_point is not None:
        z = z - grid.expand(w.zero_point[rows, groups].to(dtype), width)
    return inside, z, grid.expand(w.scale[rows, groups].to(dtype), width)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> None:
    """Called for every name in a test module or class, before its tests are made."""
    module = inspect.getmodule(collector.obj)
    cases = CASES.get(module.__name__.rpartition(".")[2], {})
    lists = {id(getattr(module, list_name)): ours for list_name, ours in cases.items()}
    marks = getattr(obj, "pytestmark", []) if inspect.isfunction(obj) else []
    for i, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, values = mark.args[:2]
        ours = (
            [LRQATConfig]
            if name in OF_A_FEW_TYPES and names == "config_cls"
            else lists.get(id(values))
        )
        if ours is not None:
            marks[i] = pytest.mark.parametrize(names, ours, **mark.kwargs).mark


class UnusedDeviation(pytest.Item):
    """A name in `deviations.yaml` that fits no test; fails."""

    def runtest(self) -> None:
        pytest.fail("deviations.yaml names this test, but there is no such test", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    ours = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    unused = _expect_deviations(ours, config.getoption("storage"))
    whole_suite = not config.getoption("file_or_dir")
    if whole_suite:
        ours += [UnusedDeviation.from_parent(session, name=pattern) for pattern in unused]
    items[:] = ours


def _is_ours(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and LRQATConfig in item.callspec.params.values()


def _expect_deviations(items: list[pytest.Item], storage: str) -> list[str]:
    """Marks the tests that are to fail; returns the patterns that fit no test."""
    unused = []
    for deviation in yaml.safe_load(Path(__file__).with_name("deviations.yaml").read_text()):
        if storage not in deviation.get("storage", STORAGE):
            continue
        for pattern in deviation["tests"]:
            matching = [item for item in items if _matches(item, pattern)]
            for item in matching:
                item.add_marker(pytest.mark.xfail(reason=deviation["reason"], strict=True))
            if not matching:
                unused.append(pattern)
    return unused


def _matches(item: pytest.Item, pattern: str) -> bool:
    """``Class::test`` stands for all its cases, ``Class::test[case]`` for some; ``*`` only works in
    the brackets.
    """
    test, _, case = pattern.partition("[")
    name, _, parameters = item.nodeid.partition("::")[2].partition("[")
    return name == test and (not case or fnmatchcase(parameters, case))
