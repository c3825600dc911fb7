"""LRQATConfig: its documentation, what it refuses and saves, and older and newer files."""

import dataclasses
import json
import re
import warnings

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model

from peft_lrqat import LowBitConfig, LRQATConfig
from peft_lrqat.lrqat.config import FORMAT_VERSION
from peft_lrqat.quant import DOWNCASTS, RANGES, Grid


FIELDS = {field.name: field for field in dataclasses.fields(LRQATConfig)}
OWN = [
    name for name in FIELDS if name not in {field.name for field in dataclasses.fields(PeftConfig)}
]
OTHER_VALUES = {
    "r": 3,
    "experts_share_a": True,
    "lora_alpha": 1.5,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "modules_to_save": ["score"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "blocks",
    "bits": 2,
    "group_size": 16,
    "symmetric": False,
    "downcast": "int",
    "scale_dtype": "float16",
    "activation_bits": 8,
    "kv_cache_bits": 4,
    "activation_symmetric": True,
    "range_estimator": "minmax",
    "range_p": 2.4,
    "clipped_gradient": "pass_through",
    "bits_pattern": {"down_proj": 8},
    "group_size_pattern": {r"layers\.[0-3]\..*": 32},
    "embedding_bits": 6,
    "train_embeddings": True,
    "init_weights": False,
    "base_dtype": "float16",
    "base_made_from": "org/model",
    "base_dtype_pattern": {"layers.0.q_proj": "float32"},
    "packed_factors": {"group_size": 128, "component_bits": {"q_proj": "21"}},
    "training_record": {
        "steps": 9,
        "settings": {"lr": 0.1, "name": None},
        "metrics": {"loss": 2.5},
    },
}


def test_every_field_is_explained():
    assert all(field.metadata.get("help") for field in FIELDS.values())
    assert all(len(FIELDS[name].metadata["help"]) > 40 for name in OWN)


def test_defaults_hold_and_help_tells_them():
    config = LRQATConfig()
    assert config.peft_type is PeftType.LRQAT
    assert "target_modules" in FIELDS
    for name in ("r", "lora_alpha", "bits", "range_p"):
        assert f"Default {FIELDS[name].default:g}" in FIELDS[name].metadata["help"]
    for name in ("downcast", "scale_dtype", "range_estimator"):
        help, default = FIELDS[name].metadata["help"], FIELDS[name].default
        assert f"{default} (default)" in help or f"Default {default}" in help


BAD = [
    *[("r", value, "integer of at least 1") for value in (0, -1, 1.0, "8", None, True)],
    *[
        ("lora_alpha", value, "positive number")
        for value in (0, -2, float("nan"), float("inf"), "1", None, True)
    ],
    *[("embedding_bits", value, "integer from 4 to 8, or None") for value in (3, 9, "8", True)],
    *[("bits", value, "integer from 2 to 8") for value in (1, 9, 0, -4, 3.0, "4", None, True)],
    *[("group_size", value, "integer of at least 1") for value in (0, -2, 64.0, "64", None, True)],
    *[("range_p", value, "1 to 8") for value in (0.99, 8.01, float("nan"), "4", None, True)],
    *[
        ("downcast", value, "'fp32', 'bf16', 'fp16', 'fixed8', 'int'")
        for value in ("int8", "", None, 8)
    ],
    *[
        ("scale_dtype", value, "'float32', 'bfloat16', 'float16'")
        for value in ("float64", "fp32", None, torch.float32)
    ],
    *[("range_estimator", value, "'minmax', 'lp'") for value in ("mse", "LP", None)],
    *[("clipped_gradient", value, "'zero', 'pass_through'") for value in ("exact", True, None)],
    *[
        ("base_dtype", value, "'float32', 'bfloat16', 'float16', None")
        for value in ("int8", "float64", "auto", "")
    ],
    *[
        (name, value, "True or False")
        for name in ("symmetric", "init_weights", "train_embeddings", "verify_base")
        for value in (1, 0, None, "True", "gaussian")
    ],
    *[
        ("format_version", value, "integer of at least 1")
        for value in (0, -1, 1.0, "1", None, True)
    ],
    *[
        (name, value, "one string or a list of module names")
        for name in ("target_modules", "exclude_modules", "layers_pattern")
        for value in (5, (1,), {"q_proj": 1})
    ],
    # Read letter by letter, the string would match half of the model.
    *[("modules_to_save", value, "a list of module names") for value in ("lm_head", [0])],
    *[
        ("bits_pattern", value, "dict from names to integers")
        for value in (None, [], "down_proj", 4)
    ],
    *[("group_size_pattern", value, "dict from names to integers") for value in (None, [64], -1)],
    *[
        ("training_record", value, "None or a dict")
        for value in ("steps", 3, [], {"settings": 3}, {"metrics": None})
    ],
    *[
        ("training_record", value, "fit into a JSON file")
        for value in ({"steps": torch.tensor(3)}, {"x": {1, 2}})
    ],
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=lambda value: str(value)[:24])
def test_bad_value_is_refused_with_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"`{name}`")) as caught:
        LRQATConfig(**{name: value})
    assert repr(value) in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize("value", [1, 9, 3.0, "4", None, True])
def test_bad_value_in_bits_pattern_is_refused_with_its_key(value):
    with pytest.raises(
        ValueError, match=re.escape("`bits_pattern['down_proj']` must be an integer from 2 to 8")
    ) as caught:
        LRQATConfig(bits_pattern={"q_proj": 4, "down_proj": value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, -2, 64.0, "64", None, True])
def test_bad_value_in_group_size_pattern_is_refused_with_its_key(value):
    with pytest.raises(
        ValueError, match=re.escape("`group_size_pattern['down_proj']` must be an integer")
    ) as caught:
        LRQATConfig(group_size_pattern={"down_proj": value})
    assert repr(value) in str(caught.value)
    assert "-1 is one group per row" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits_pattern": {"(": 4}},
        {"group_size_pattern": {"[": 4}},
        {"target_modules": "*_proj"},
        {"exclude_modules": "("},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_no_regular_expression_is_refused(fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"`{name}`.* is not a regular expression"):
        LRQATConfig(**fields)


@pytest.mark.parametrize("name", ["bits_pattern", "group_size_pattern"])
def test_pattern_whose_key_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`.*3"):
        LRQATConfig(**{name: {3: 4}})


def test_combinations_that_make_no_sense_are_refused():
    for targets in (".*q_proj", "all-linear"):
        with pytest.raises(
            ValueError, match="`layers_to_transform` needs `target_modules` as a list"
        ) as caught:
            LRQATConfig(target_modules=targets, layers_to_transform=[0])
        assert repr(targets) in str(caught.value)
    with pytest.raises(ValueError, match="`layers_pattern` needs `layers_to_transform`"):
        LRQATConfig(target_modules=["q_proj"], layers_pattern="layers")
    # Layer 0 is a layer, although it is falsy.
    assert (
        LRQATConfig(
            target_modules=["q_proj"], layers_to_transform=0, layers_pattern="h"
        ).layers_to_transform
        == 0
    )


@pytest.mark.parametrize("value", [-1, 0.5, "0", True])
def test_bad_layer_index_is_refused(value):
    for layers in (value, [0, value]):
        with pytest.raises(
            ValueError, match="`layers_to_transform` must be an integer of at least 0"
        ) as caught:
            LRQATConfig(target_modules=["q_proj"], layers_to_transform=layers)
        assert repr(value) in str(caught.value)


def test_bad_task_type_is_refused():
    with pytest.raises(ValueError, match="Invalid task type: 'CHAT'"):
        LRQATConfig(task_type="CHAT")


@pytest.mark.parametrize("value", [1, 9, 4.0, "8", True, 16])
@pytest.mark.parametrize("name", ["activation_bits", "kv_cache_bits"])
def test_bad_bits_of_activations_are_refused(name, value):
    with pytest.raises(
        ValueError, match=f"`{name}` must be an integer from 2 to 8, or None, but is"
    ) as caught:
        LRQATConfig(**{name: value})
    assert repr(value) in str(caught.value)


def test_grids_of_activations():
    config = LRQATConfig(activation_bits=8, kv_cache_bits=4)
    assert (config.activation_grid, config.kv_cache_grid) == (
        Grid(bits=8, symmetric=False),
        Grid(bits=4, symmetric=False),
    )
    assert LRQATConfig(activation_bits=8, activation_symmetric=True).activation_grid == Grid(bits=8)
    assert LRQATConfig().activation_grid is None
    assert LRQATConfig().kv_cache_grid is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_documented_values_are_accepted(bits):
    for downcast in DOWNCASTS:
        for estimator in RANGES:
            for symmetric in (True, False):
                LRQATConfig(
                    bits=bits, downcast=downcast, range_estimator=estimator, symmetric=symmetric
                )


def test_every_field_survives_the_file(tmp_path):
    of_a_run = {"verify_base", "base_dtype_found", "format_version", "library_version"}
    # These exclude some of the other values; tests below have them.
    apart = {"balanced", "k_quant", "trainable_token_indices", "target_parameters"}
    assert {*OTHER_VALUES, *apart} == set(OWN) - of_a_run - {
        "format_version",
        "library_version",
    }
    config = LRQATConfig(task_type="CAUSAL_LM", base_model_name_or_path="some/base", **OTHER_VALUES)
    assert all(getattr(config, name) != FIELDS[name].default for name in OTHER_VALUES)
    config.save_pretrained(tmp_path)
    for loader in (LRQATConfig, PeftConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is LRQATConfig
        assert loaded == config
    # No adapter lies beside it, so no card either.
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("tokens", [[3, 1], {"embed_tokens": [1]}])
def test_trained_tokens_survive_the_file(tokens, tmp_path):
    config = LRQATConfig(trainable_token_indices=tokens)
    config.save_pretrained(tmp_path)
    assert LRQATConfig.from_pretrained(tmp_path) == config


def test_balanced_grids_survive_the_file(tmp_path):
    LRQATConfig(balanced=True).save_pretrained(tmp_path)
    assert LRQATConfig.from_pretrained(tmp_path).weight_grid("q_proj").balanced


@pytest.mark.parametrize("names", ["all-experts", ["experts.down_proj"]])
def test_names_of_experts_survive_the_file(names, tmp_path):
    config = LRQATConfig(target_parameters=names)
    config.save_pretrained(tmp_path)
    assert LRQATConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("config", [LRQATConfig, LowBitConfig])
def test_all_experts_may_stand_in_a_list(config):
    assert config(target_parameters=["all-experts"]).target_parameters == "all-experts"


def test_files_of_adapters_without_experts_are_those_of_before():
    assert not {"target_parameters", "experts_share_a"} & LRQATConfig().to_dict().keys()


def test_cards_say_how_many_weights_share_a_scale():
    words = {
        "symmetric, one scale per output channel": {},
        "balanced, one scale per 32 weights": {"balanced": True, "group_size": 32},
        "asymmetric, one scale per 16 weights, as llama.cpp's K blocks hold it": {
            "k_quant": True,
            "symmetric": False,
            "scale_dtype": "float16",
        },
    }
    for said, fields in words.items():
        assert LRQATConfig(bits=2, **fields).grid_in_words() == said


def test_k_quant_grids_survive_the_file(tmp_path):
    LRQATConfig(bits=2, k_quant=True).save_pretrained(tmp_path)
    loaded = LRQATConfig.from_pretrained(tmp_path)
    assert loaded.weight_grid("q_proj") == Grid(bits=2, group_size=16, k_quant=True)
    assert loaded.scale_dtype == "float16"


def test_saving_again_writes_the_same_fields(tmp_path):
    LRQATConfig(**OTHER_VALUES).save_pretrained(tmp_path / "one")
    LRQATConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("one", "two")
    )
    for fields in (one, two):
        fields["target_modules"].sort()
    assert one == two


def test_verify_base_belongs_to_one_run(tmp_path):
    config = LRQATConfig(verify_base=False)
    assert "verify_base" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert "verify_base" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert LRQATConfig.from_pretrained(tmp_path).verify_base is True
    assert "base_dtype_found" not in config.to_dict()


def rewrite(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_unknown_field_of_another_version_warns(tmp_path):
    LRQATConfig(bits=3).save_pretrained(tmp_path)
    rewrite(tmp_path, field_of_the_future=1)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['field_of_the_future'\]"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config == LRQATConfig(bits=3)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    "extra", [{}, {"field_of_the_future": 1}], ids=["known-fields", "unknown-field"]
)
def test_higher_format_version_is_refused(tmp_path, extra):
    LRQATConfig().save_pretrained(tmp_path)
    rewrite(tmp_path, format_version=FORMAT_VERSION + 1, **extra)
    with pytest.raises(
        ValueError,
        match=f"`format_version` is {FORMAT_VERSION + 1}.*reads up to {FORMAT_VERSION}.*"
        "pip install -U",
    ):
        PeftConfig.from_pretrained(tmp_path)


def test_missing_fields_get_the_defaults(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LRQAT", "bits": 3}))
    assert PeftConfig.from_pretrained(tmp_path) == LRQATConfig(bits=3)


def test_broken_value_in_a_file_is_refused(tmp_path):
    LRQATConfig().save_pretrained(tmp_path)
    rewrite(tmp_path, bits=40)
    with pytest.raises(ValueError, match="`bits` must be an integer from 2 to 8, but is 40"):
        PeftConfig.from_pretrained(tmp_path)


def test_weight_format_follows_the_patterns():
    config = LRQATConfig(
        bits=3,
        group_size=8,
        downcast="int",
        bits_pattern={"down_proj": 8, r"layers\.0\..*q_proj": 2},
        group_size_pattern={"o_proj": -1},
    )

    def bits_and_group(name):
        grid = config.weight_format(name, 32).grid
        return grid.bits, grid.group_size

    assert bits_and_group("model.layers.0.mlp.down_proj") == (8, 8)
    assert bits_and_group("model.layers.0.self_attn.q_proj") == (2, 8)
    assert bits_and_group("model.layers.1.self_attn.q_proj") == (3, 8)
    assert bits_and_group("model.layers.1.self_attn.o_proj") == (3, -1)
    assert bits_and_group("model.layers.1.mlp.not_down_proj") == (3, 8)
    assert bits_and_group("down_proj") == (8, 8)
    assert config.weight_format("up_proj", 32).downcast == "int"


def test_group_size_that_does_not_divide_names_the_module():
    with pytest.raises(
        ValueError,
        match=r"`layers\.0\.q_proj`: `group_size` must divide.* 96 does not divide 256; use 64",
    ):
        LRQATConfig(group_size=96).weight_format("layers.0.q_proj", 256)


def test_base_dtype_is_filled_in_when_an_adapter_is_made(make_base, make_config, dtype):
    model = get_peft_model(make_base(dtype=dtype), make_config())
    assert model.peft_config["default"].base_dtype == str(dtype).removeprefix("torch.")


def test_record_that_was_set_later_is_checked_before_it_is_saved(tmp_path):
    config = LRQATConfig()
    config.training_record = "150 steps"
    with pytest.raises(ValueError, match=r"`training_record` must be None or a dict.*'150 steps'"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_record_has_no_influence_on_a_model(make_base, make_config, disturb, logits_of):
    record = {"steps": 9, "metrics": {"loss": 2.5}}
    plain, recorded = make_config(), make_config(training_record=record)
    models = []
    for config in (plain, recorded):
        torch.manual_seed(0)
        models.append(disturb(get_peft_model(make_base(), config).eval()))
    assert torch.equal(*map(logits_of, models))
    for config in (make_config(), make_config(training_record={"steps": 1})):
        models[1].add_adapter(f"with {config.training_record}".replace(".", ""), config)
    assert [config.training_record for config in models[1].peft_config.values()] == [
        record,
        None,
        {"steps": 1},
    ]
