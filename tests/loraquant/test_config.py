"""The configuration: what it refuses, what it derives, and that it survives a file."""

import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from torch import nn

from peft_lrqat import LoRAQuantConfig


FILLED_IN = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "user/base",
    "r": 16,
    "lora_alpha": 32,
    "use_rslora": True,
    "use_dora": True,
    "bias": "lora_only",
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["layers.0.q_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"^layers.1.v_proj": 0.5},
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "method": "paper",
    "bits_high": 3,
    "ratio": 0.8,
    "group_size": 64,
    "scale_dtype": "float16",
    "component_bits": {"layers.0.q_proj": "3311", "layers.1.v_proj": ""},
    "zero_points": True,
    "report": {"relative_error": 0.25, "modules": {"layers.0.q_proj": {"shape": [4, 4]}}},
}


def test_a_recipe_has_nothing_filled_in():
    config = LoRAQuantConfig(bits_high=2, ratio=0.9)
    assert config.peft_type is PeftType.LORAQUANT
    assert (config.component_bits, config.report, config.zero_points) == ({}, {}, False)
    assert config.inference_mode


def test_there_and_back_through_a_file(tmp_path):
    config = LoRAQuantConfig(**FILLED_IN)
    config.save_pretrained(str(tmp_path))
    for loaded in (LoRAQuantConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert loaded == config
    assert not (tmp_path / "README.md").exists()  # there is no adapter beside it


def test_the_order_of_patterns_survives_the_file(tmp_path):
    """The first key that fits counts, and PEFT sorts the keys of a saved dict."""
    pattern = {"v_proj": 2.0, "^layers.1.v_proj": 0.5}
    LoRAQuantConfig(**FILLED_IN | {"alpha_pattern": pattern}).save_pretrained(str(tmp_path))
    loaded = LoRAQuantConfig.from_pretrained(tmp_path).alpha_pattern
    assert list(loaded.items()) == list(pattern.items())


def test_every_field_is_explained():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(LoRAQuantConfig):
        if field.name not in inherited:
            assert field.metadata["help"].endswith("."), field.name


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_that_of_lora(use_rslora):
    fields = {
        "target_modules": ["one", "two", "three"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"one": 16, "^t.*o": 2},
        "alpha_pattern": {"two": 1.5},
        "use_rslora": use_rslora,
    }
    net = nn.ModuleDict({name: nn.Linear(3, 3) for name in fields["target_modules"]})
    lora = get_peft_model(net, LoraConfig(**fields)).base_model.model
    config = LoRAQuantConfig(**fields)
    for name in fields["target_modules"]:
        assert config.rank_of(name) == lora[name].r["default"]
        assert config.scaling_of(name) == lora[name].scaling["default"]
    assert config.scaling_of("one") == 6 / (4 if use_rslora else 16)
    assert config.scaling_of("two") == 1.5 / (math.sqrt(2) if use_rslora else 2)


def test_the_format_of_a_module():
    config = LoRAQuantConfig(**FILLED_IN)
    format = config.packed_format("layers.0.q_proj", 10, 20)
    assert (format.bits, format.rows, format.columns, format.group_size) == ("3311", 10, 20, 64)
    assert (format.scale_dtype, format.zero_points) == (torch.float16, True)


REFUSED = [
    ("method", "svd", "`method` must be one of 'residual', 'paper'"),
    ("method", ["paper"], "`method` must be one of"),
    ("scale_dtype", "float8", "`scale_dtype` must be one of 'float32', 'bfloat16', 'float16'"),
    ("scale_dtype", torch.float16, "`scale_dtype` must be one of"),
    ("bits_high", 1, "`bits_high` must be an integer"),
    ("bits_high", 9, "from 2 to 8"),
    ("bits_high", 2.0, "`bits_high`"),
    ("ratio", 0, "`ratio` must be a number, above 0 and at most 1"),
    ("ratio", 1.1, "`ratio`"),
    ("ratio", "0.9", "`ratio`"),
    ("average_bits", 0, "`average_bits` must be a number, above 0 and at most 8"),
    ("average_bits", math.nan, "`average_bits`"),
    ("group_size", 0, "`group_size` must be an integer of at least 1"),
    ("group_size", -1, "`group_size`"),
    ("r", 0, "`r` must be"),
    ("lora_alpha", math.inf, "`lora_alpha` must be a number, finite"),
    ("rank_pattern", {"q_proj": 0}, r"`rank_pattern\['q_proj'\]`"),
    ("rank_pattern", ["q_proj"], "`rank_pattern` must be a dict"),
    ("rank_pattern", [["q_proj", 4], [4, 4]], "`rank_pattern` must be a dict"),
    ("rank_pattern", [], "`rank_pattern` must be a dict"),
    ("alpha_pattern", {"(": 1}, "not a regular expression"),
    ("alpha_pattern", {"q_proj": "1"}, r"`alpha_pattern\['q_proj'\]`"),
    ("bias", "some", "`bias` must be one of 'none', 'all', 'lora_only'"),
    ("use_dora", 1, "`use_dora` must be True or False"),
    ("modules_to_save", "lm_head", "`modules_to_save` must be a list"),
    ("target_modules", 3, "`target_modules` must be"),
    ("component_bits", {"q_proj": "12"}, "`component_bits` of `q_proj`: .* do not increase"),
    ("component_bits", {"q_proj": 2}, "`component_bits` of `q_proj`"),
    ("component_bits", "22", "`component_bits` must be a dict"),
    (
        "component_bits",
        {"q_proj": "2" * 9},
        "`component_bits` of `q_proj` has 9 components, but its rank is 8",
    ),
    ("lora_alpha", 10**400, "`lora_alpha` must be a number, finite"),
    ("shapes", {"q_proj": [4]}, r"`shapes` of `q_proj` must be \[outputs, inputs\]"),
    ("shapes", {"q_proj": [4, -4]}, "`shapes` of `q_proj` must be"),
    ("report", {"x": object()}, "`report` must fit into a JSON file"),
    ("report", 0.5, "`report` must be a dict"),
    ("format_version", 2, "reads up to 1: the adapter was saved by a newer release"),
    ("format_version", 0, "`format_version` must be"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), REFUSED, ids=[f"{n}={v!r:.20}" for n, v, _ in REFUSED]
)
def test_values_that_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        LoRAQuantConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"component_bits": {"q_proj": ""}, "shapes": {"q_proj": [2**40, 2**40]}},
            "larger than any adapter's",
        ),
        (
            {"component_bits": {"q_proj": ""}, "shapes": {"q_proj": [64, 64]}, "r": 2**40},
            "larger than any adapter's",
        ),
        (
            {
                "component_bits": {"q_proj": ""},
                "shapes": {"q_proj": [64, 64]},
                "rank_pattern": {"q_proj": 10**400},
            },
            "larger than any adapter's",
        ),
    ],
    ids=["shape", "rank", "rank of one module"],
)
def test_sizes_that_cannot_be(fields, message):
    """They are refused before they allocate anything."""
    with pytest.raises(
        ValueError, match=f"`shapes` of `q_proj`: .*{message}; the configuration is damaged"
    ):
        LoRAQuantConfig(**fields)


def test_a_budget_is_for_the_residual_method():
    assert LoRAQuantConfig(average_bits=1.5).average_bits == 1.5
    with pytest.raises(ValueError, match="`average_bits` needs method='residual'"):
        LoRAQuantConfig(method="paper", average_bits=1.5)


def test_a_newer_file_is_refused(tmp_path):
    LoRAQuantConfig(**FILLED_IN).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(
        ValueError, match="saved by a newer release; run `pip install -U peft-lrqat`"
    ):
        PeftConfig.from_pretrained(tmp_path)
