"""The tuner on whole models: training, saving and loading, several adapters, PEFT's features."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LRQATConfig, LRQATModel


FACTORS = ("lrqat_A", "lrqat_B", "lrqat_scale")


def snapshot(model):
    return {
        name: tensor.detach().clone()
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }


def train(model, batch, steps=2):
    """Trains a few steps, large enough to show in every tensor that may move."""
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def integers(model, lrqat_layers, adapter="default"):
    return {name: layer.quantized_codes(adapter) for name, layer in lrqat_layers(model).items()}


def equal(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(tensor, two[name]) for name, tensor in one.items()
    )


def test_only_the_adapter_moves(architecture, dtype, make_peft, batch_for):
    model = make_peft(architecture, dtype)
    may_move = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    assert {
        name for name in may_move if not any(f".{kind}.default" in name for kind in FACTORS)
    } == (
        {"base_model.model.score.modules_to_save.default.weight"}
        if architecture == "classifier"
        else set()
    )
    output = (
        model.base_model.model.get_output_embeddings() if architecture != "classifier" else None
    )
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    assert tied == (architecture in ("qwen2", "gemma", "gpt2", "opt", "t5"))
    before = snapshot(model)
    train(model, batch_for(architecture))
    after = snapshot(model)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == may_move
    if tied:
        assert output.weight is model.get_input_embeddings().weight
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_factors_are_float32_and_start_where_the_paper_says(architecture, dtype, make_peft):
    model = make_peft(architecture, dtype)
    factors = {name: p for name, p in model.named_parameters() if ".lrqat_" in name}
    assert {p.dtype for p in factors.values()} == {torch.float32}
    assert not any(p.any() for name, p in factors.items() if ".lrqat_B." in name)
    assert all(p.any() for name, p in factors.items() if ".lrqat_A." in name)
    base_dtypes = {
        p.dtype
        for name, p in model.named_parameters()
        if ".lrqat_" not in name and "base_layer" not in name
    }
    assert base_dtypes == {dtype}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "low-cpu-mem"])
def test_saved_and_loaded_is_the_same(
    architecture,
    dtype,
    low_cpu_mem_usage,
    make_base,
    make_peft,
    disturb,
    lrqat_layers,
    logits_of,
    tmp_path,
):
    model = disturb(make_peft(architecture, dtype, downcast="int", group_size=8))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {name.rsplit(".", 1)[1] for name in saved if "score" not in name}
    assert kinds == {*FACTORS, "lrqat_fingerprint"}
    loaded = PeftModel.from_pretrained(
        make_base(architecture, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert equal(integers(model, lrqat_layers), integers(loaded, lrqat_layers))
    assert equal(snapshot(model), snapshot(loaded))
    assert torch.equal(logits_of(loaded, architecture), logits_of(model, architecture))
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].base_dtype == str(dtype).removeprefix("torch.")


def test_training_goes_on_from_a_saved_adapter(make_base, make_peft, batch_for, tmp_path):
    model = train(make_peft(), batch_for())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    assert equal(snapshot(train(loaded, batch_for())), snapshot(train(model, batch_for())))


def test_all_loaders_give_the_same_model(make_base, make_config, disturb, logits_of, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = disturb(get_peft_model(base, make_config()).eval())
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits_of(model)
    adapter = tmp_path / "adapter"
    assert isinstance(PeftConfig.from_pretrained(adapter), LRQATConfig)
    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(adapter)), wanted)
    native = transformers.AutoModelForCausalLM.from_pretrained(adapter)
    assert torch.equal(logits_of(native), wanted)
    native = make_base()
    native.load_adapter(str(adapter))
    assert torch.equal(logits_of(native), wanted)
    native.disable_adapters()
    with model.disable_adapter():
        assert torch.equal(logits_of(native), logits_of(model))
    native.enable_adapters()
    assert torch.equal(logits_of(native), wanted)
    assert {name.rsplit(".", 1)[1] for name in native.get_adapter_state_dict()} == {
        *FACTORS,
        "lrqat_fingerprint",
    }
    native.delete_adapter("default")


def test_native_add_adapter_trains(make_base, make_config, batch_for):
    model = make_base()
    model.add_adapter(make_config())
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == set(
        FACTORS
    )
    train(model, batch_for())


def test_adapters_share_one_phi(
    make_base, make_peft, make_config, disturb, logits_of, lrqat_layers, tmp_path
):
    model = make_peft()
    phi = {name: layer.base_layer.phi.data_ptr() for name, layer in lrqat_layers(model).items()}
    first = logits_of(disturb(model))
    model.add_adapter("second", make_config(r=2, lora_alpha=3))
    assert torch.equal(logits_of(model), first)
    model.set_adapter("second")
    fresh = logits_of(model)
    assert not torch.equal(fresh, first)
    second = logits_of(disturb(model, "second", seed=5))
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "second",
    ]
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert torch.equal(logits_of(model), second)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    assert {
        name: layer.base_layer.phi.data_ptr() for name, layer in lrqat_layers(model).items()
    } == phi

    with model.disable_adapter():
        stored = logits_of(model)
    plain = make_base()
    with torch.no_grad():
        for name, layer in lrqat_layers(model).items():
            plain.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(
                layer.base_layer.stored_weight()
            )
    assert torch.equal(stored, logits_of(plain))

    model.delete_adapter("default")
    assert "default" not in model.peft_config
    assert not any(".default" in name for name in model.state_dict())
    model.set_adapter("second")
    assert torch.equal(logits_of(model), second)
    assert torch.equal(logits_of(model.merge_and_unload()), second)

    alone = PeftModel.from_pretrained(make_base(), tmp_path / "second").eval()
    assert torch.equal(logits_of(alone), second)


def test_one_of_several_adapters_is_merged_by_name(make_peft, make_config, disturb, logits_of):
    model = disturb(make_peft())
    model.add_adapter("second", make_config())
    model.set_adapter("second")
    second = logits_of(disturb(model, "second", seed=5))
    model.set_adapter("default")
    with pytest.raises(ValueError, match="one set of integers"):
        copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    assert torch.equal(
        logits_of(copy.deepcopy(model).merge_and_unload(adapter_names=["second"])), second
    )


def test_two_active_adapters_on_one_weight_are_refused_and_can_be_switched_back(
    make_peft, make_config, logits_of
):
    model = make_peft()
    model.add_adapter("second", make_config())
    before = logits_of(model)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(
        ValueError, match=r"\['default', 'second'\] cannot be active on it together"
    ):
        logits_of(model)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3},
        {"group_size": 8},
        {"symmetric": False},
        {"downcast": "int"},
        {"scale_dtype": "float32"},
        {"range_estimator": "lp"},
        {"base_dtype": "bfloat16"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_second_adapter_on_another_grid_is_refused(fields, make_peft, make_config, logits_of):
    model = make_peft()
    before, names = logits_of(model), set(model.state_dict())
    with pytest.raises(
        ValueError, match=r"`model\.layers\.0\.self_attn\.q_proj` already holds a weight in"
    ):
        model.add_adapter("second", make_config(**fields))
    assert list(model.peft_config) == ["default"]
    assert set(model.state_dict()) == names
    assert torch.equal(logits_of(model), before)
    model.add_adapter("second", make_config(r=7, lora_alpha=1, init_weights=False))


@pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "bin"])
def test_every_saved_adapter_has_a_card(
    safe_serialization, make_base, make_peft, make_config, logits_of, tmp_path
):
    model = make_peft(bits=3)
    model.add_adapter("second", make_config(bits=3))
    for _ in range(2):  # saving again keeps one section
        model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    for folder in (tmp_path, tmp_path / "second"):
        card = (folder / "README.md").read_text()
        assert card.count("import peft_lrqat") == card.count("## LR-QAT adapter") == 1
        header = card.split("---")[1]
        assert "library_name: peft" in header
        assert all(f"- {tag}\n" in header for tag in ("peft_lrqat", "lr-qat", "3-bit"))
        loaded = PeftModel.from_pretrained(make_base(), folder).eval()
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_adapters_on_different_targets_are_announced(make_peft, make_config, logits_of, caplog):
    model = make_peft(target_modules=["q_proj"])
    with caplog.at_level("WARNING"):
        model.add_adapter("second", make_config(target_modules=["v_proj"]))
    assert (
        "different targets (4 layers differ, for example `model.layers.0.self_attn.q_proj`)"
        in caplog.text
    )
    model.set_adapter("second")
    logits_of(model)


def test_adapters_on_the_same_targets_are_not_announced(make_peft, make_config, caplog):
    """Modules inside a layer, such as `q_proj.base_layer`, are not targets themselves."""
    fields = {"target_modules": ".*q_proj.*", "modules_to_save": ["lm_head"]}
    model = make_peft(**fields)
    names = {name for name, _ in model.named_modules()}
    with caplog.at_level("WARNING"):
        model.add_adapter("second", make_config(**fields))
    assert "different targets" not in caplog.text
    assert {name for name, _ in model.named_modules() if not name.endswith(".second")} == names


def test_unload_is_refused_with_the_way_out(make_peft, logits_of):
    model = make_peft()
    before = logits_of(model)
    with pytest.raises(
        ValueError, match=r"unload\(\) cannot give the original weights back.*merge_and_unload\(\)"
    ):
        model.unload()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generate_is_the_same_merged(architecture, make_peft, disturb, batch_for):
    model = disturb(make_peft(architecture))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    inputs = {key: value for key, value in batch_for(architecture).items() if key != "labels"}
    trained = model.generate(**inputs, **options)
    assert torch.equal(model.merge_and_unload().generate(**inputs, **options), trained)


def gradients(model, batch):
    model.train()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing_changes_no_gradient(
    architecture, use_reentrant, dtype, make_peft, disturb, batch_for
):
    model = disturb(make_peft(architecture, dtype))
    wanted = gradients(model, batch_for(architecture))
    assert all(grad.any() for grad in wanted.values())
    # Reentrant checkpoints need an input that requires gradients.
    model.enable_input_require_grads()
    assert equal(gradients(model, batch_for(architecture)), wanted)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients(model, batch_for(architecture))
    if architecture != "llama":
        # On some CPUs, sums outside the targets change their order with checkpointing; LoRA's
        # gradients differ there, too.
        bound = 1e-4 if dtype == torch.float32 else 0.25
        assert all(
            (found[name] - grad).norm() <= bound * grad.norm() for name, grad in wanted.items()
        )
    else:
        assert equal(found, wanted)


def test_status_and_counts(make_peft, make_config, lrqat_layers, capsys):
    model = make_peft(r=4)
    layers = lrqat_layers(model)
    wanted = sum(4 * (m.in_features + m.out_features) + m.out_features for m in layers.values())
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == wanted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {wanted:,}" in capsys.readouterr().out
    model.add_adapter("second", make_config())
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == (
        "LRQATModel",
        {"default": "LRQAT", "second": "LRQAT"},
    )
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (
        True,
        ["default"],
        [],
    )
    assert status.num_adapter_layers == len(layers)
    assert status.requires_grad == {"default": True, "second": False}
    layer = model.get_layer_status()[0]
    assert (layer.module_type, layer.available_adapters) == (
        "lrqat.LRQATLinear",
        ["default", "second"],
    )
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def targets_of(model):
    return {
        name.removeprefix("base_model.model.model.")
        for name, m in model.named_modules()
        if hasattr(m, "lrqat_A")
    }


SELECTIONS = {
    "ending": (
        {"target_modules": ["q_proj"]},
        {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"},
    ),
    "full-name": ({"target_modules": ["model.layers.1.mlp.up_proj"]}, {"layers.1.mlp.up_proj"}),
    "regex": (
        {"target_modules": r".*layers\.0\..*(q|v)_proj"},
        {"layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"},
    ),
    "open-regex": ({"target_modules": r".*layers\.0\..*q_proj.*"}, {"layers.0.self_attn.q_proj"}),
    "layers": (
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"},
    ),
    "layer-0": (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers.0.self_attn.q_proj"},
    ),
    "exclude": (
        {
            "target_modules": ["q_proj", "k_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"],
        },
        {"layers.1.self_attn.q_proj"},
    ),
    "exclude-regex": (
        {"target_modules": "all-linear", "exclude_modules": r".*(layers\.0|self_attn)\..*"},
        {"layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"},
    ),
    "default": (
        {"target_modules": None},
        {f"layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")},
    ),
}


@pytest.mark.parametrize(("fields", "wanted"), SELECTIONS.values(), ids=SELECTIONS)
def test_targets_are_those_that_were_asked_for(fields, wanted, make_peft, make_base, tmp_path):
    model = make_peft(**fields)
    assert targets_of(model) == wanted
    assert model.peft_config["default"].base_dtype == "float32"
    model.save_pretrained(tmp_path)
    assert targets_of(PeftModel.from_pretrained(make_base(), tmp_path)) == wanted


def test_all_linear_is_every_linear_but_the_output_layer(
    architecture, make_base, make_peft, lrqat_layers
):
    linears = {
        n for n, m in make_base(architecture).named_modules() if isinstance(m, nn.Linear | Conv1D)
    }
    targets = {
        name.removeprefix("base_model.model.") for name in lrqat_layers(make_peft(architecture))
    }
    assert targets == linears - {"lm_head", "score"}


def test_patterns_reach_the_layers_and_survive_the_file(
    make_base, make_peft, disturb, logits_of, tmp_path
):
    model = disturb(
        make_peft(
            bits=3,
            group_size=8,
            downcast="int",
            bits_pattern={"down_proj": 8, r"layers\.0\.self_attn\..*": 2},
            group_size_pattern={"o_proj": -1, "layers.1.mlp.up_proj": 16},
        )
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    for each in (model, loaded):
        grids = {
            name: each.get_submodule(f"base_model.model.model.{name}").base_layer.format.grid
            for name in targets_of(each)
        }
        assert {name for name, grid in grids.items() if grid.bits == 8} == {
            "layers.0.mlp.down_proj",
            "layers.1.mlp.down_proj",
        }
        assert {name for name, grid in grids.items() if grid.bits == 2} == {
            n for n in grids if n.startswith("layers.0.self_attn")
        }
        assert {name for name, grid in grids.items() if grid.group_size == -1} == {
            n for n in grids if n.endswith("o_proj")
        }
        assert {name for name, grid in grids.items() if grid.group_size == 16} == {
            "layers.1.mlp.up_proj"
        }
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (
        f"- by module: bits {model.peft_config['default'].bits_pattern}"
        in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize("special_first", [True, False])
def test_the_order_of_patterns_survives_the_file(
    special_first, make_base, make_peft, disturb, logits_of, tmp_path
):
    """The first key that fits counts, and PEFT sorts the keys of a saved dict."""
    of_all, special = {"q_proj": 2}, {r"layers\.1\..*q_proj": 8}
    pattern = special | of_all if special_first else of_all | special
    model = disturb(make_peft(bits_pattern=pattern))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert list(loaded.peft_config["default"].bits_pattern) == list(pattern)
    for each in (model, loaded):
        layer = each.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
        assert layer.base_layer.format.grid.bits == (8 if special_first else 2)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_modules_to_save_are_trained_and_saved(
    make_base, make_peft, batch_for, logits_of, tmp_path
):
    model = make_peft(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    original = head.original_module.weight.clone()
    train(model, batch_for())
    assert torch.equal(head.original_module.weight, original)
    assert not torch.equal(head.modules_to_save["default"].weight, original)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(make_base(), tmp_path).eval()), logits_of(model)
    )
    trained = logits_of(model)
    assert torch.equal(logits_of(model.merge_and_unload()), trained)


def test_copies_are_independent(make_base, make_config, disturb, logits_of):
    """A deepcopy of a base can be wrapped, and a wrapped model can be copied."""
    base = make_base()
    plain = logits_of(base)
    model = get_peft_model(copy.deepcopy(base), make_config()).eval()
    assert torch.equal(logits_of(base), plain)
    fresh = logits_of(model)
    other = disturb(copy.deepcopy(model))
    assert torch.equal(logits_of(model), fresh)
    trained = logits_of(other)
    assert not torch.equal(trained, fresh)
    assert torch.equal(logits_of(other.merge_and_unload()), trained)
    assert torch.equal(logits_of(model), fresh)


def test_whole_model_through_torch_save(make_peft, disturb, logits_of, tmp_path):
    model = disturb(make_peft())
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_state_dict_into_a_second_wrapped_model(make_peft, disturb, logits_of):
    """This includes a model on another base, whose frozen weights are replaced."""
    model, other = disturb(make_peft()), make_peft(seed=1)
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(logits_of(other), logits_of(model))


def test_config_object_serves_several_models(make_base, make_config):
    """What one model fills in does not count as the user's choice for the next."""
    config = make_config(target_modules=None)
    for dtype in (torch.bfloat16, torch.float32):
        assert (
            get_peft_model(make_base(dtype=dtype), config).peft_config["default"].base_dtype
            == str(dtype)[6:]
        )


def test_merged_model_is_an_ordinary_checkpoint(make_peft, dtype, disturb, logits_of, tmp_path):
    model = disturb(make_peft(dtype=dtype))
    trained = logits_of(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits_of(plain), trained)


def test_injection_without_peft_model(make_base, make_config, logits_of, make_peft):
    model = inject_adapter_in_model(make_config(), make_base())
    torch.manual_seed(0)
    assert torch.equal(logits_of(model), logits_of(make_peft()))


def test_direct_use_of_the_tuner(make_base, make_config, logits_of, make_peft):
    tuner = LRQATModel(make_base(), make_config(), "default")
    assert torch.equal(logits_of(tuner), logits_of(make_peft()))


def test_compiled_forward_is_the_same(make_peft, disturb, logits_of):
    model = disturb(make_peft())
    wanted = logits_of(model)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(logits_of(compiled), wanted)
    torch._dynamo.reset()


def test_base_in_a_wider_dtype_gives_the_same_integers(
    make_base, make_peft, disturb, lrqat_layers, tmp_path
):
    model = disturb(make_peft(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(dtype=torch.bfloat16).float(), tmp_path)
    assert equal(integers(loaded, lrqat_layers), integers(model, lrqat_layers))
    merged, wide = model.merge_and_unload().state_dict(), loaded.merge_and_unload().state_dict()
    assert all(torch.equal(wide[name].bfloat16(), tensor) for name, tensor in merged.items())


def test_autocast_adapter_dtype_false_is_obeyed(
    make_base, make_config, batch_for, logits_of, disturb
):
    model = get_peft_model(
        make_base(dtype=torch.bfloat16), make_config(), autocast_adapter_dtype=False
    ).eval()
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {torch.bfloat16}
    train(model, batch_for())
    trained = logits_of(model)
    assert torch.equal(logits_of(model.merge_and_unload()), trained)


def test_second_adapter_reloads_alone_in_a_wider_dtype(
    make_base, make_peft, make_config, disturb, lrqat_layers, tmp_path
):
    """A frozen weight keeps the dtype it was made from, whichever adapter came first."""
    model = make_peft(dtype=torch.bfloat16)
    model.add_adapter("second", make_config())
    disturb(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(dtype=torch.bfloat16).float(), tmp_path / "second")
    layers = lrqat_layers(loaded)
    for name, layer in lrqat_layers(model).items():
        assert torch.equal(layers[name].quantized_codes("default"), layer.quantized_codes("second"))
    assert 'dtype="bfloat16"' in (tmp_path / "second" / "README.md").read_text()


def test_base_of_mixed_dtypes_reloads_in_float32(
    make_base, make_config, disturb, lrqat_layers, tmp_path
):
    def make_mixed():
        base = make_base(dtype=torch.float16)
        base.model.layers[0].mlp.down_proj.float()
        return base

    model = disturb(get_peft_model(make_mixed(), make_config()))
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].base_dtype == "float16"
    assert model.peft_config["default"].base_dtype_pattern == {
        "model.layers.0.mlp.down_proj": "float32"
    }
    layers = lrqat_layers(PeftModel.from_pretrained(make_mixed().float(), tmp_path))
    for name, layer in lrqat_layers(model).items():
        assert torch.equal(layers[name].quantized_codes(), layer.quantized_codes())


def test_saving_again_keeps_what_others_wrote_in_the_card(make_peft, tmp_path):
    model = make_peft()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(
        card.read_text().replace("# Model Card", "# My Card") + "\n## My evaluation\n\nfine\n"
    )
    model.save_pretrained(tmp_path)
    assert (
        card.read_text().count("## My evaluation")
        == card.read_text().count("## LR-QAT adapter")
        == 1
    )


def test_refused_unload_leaves_modules_to_save_wrapped(make_peft, logits_of):
    model = make_peft(modules_to_save=["embed_tokens"])
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="unload"):
        model.unload()
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_other_frozen_weights_are_noticed_after_the_first_forward_pass(make_peft, logits_of):
    model, other = make_peft(), make_peft(seed=1)
    logits_of(model)
    frozen = {name: tensor for name, tensor in other.state_dict().items() if ".base_layer." in name}
    model.load_state_dict(frozen, strict=False)
    with pytest.raises(ValueError, match="trained on another base model"):
        logits_of(model)


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_other_tasks(task_type, make_config):
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    kind = {"TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}[task_type]
    base = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    model = get_peft_model(base, make_config(task_type=task_type))
    output = model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert torch.isfinite(output[0]).all()
    assert any(p.requires_grad for n, p in model.named_parameters() if "modules_to_save" in n)


def test_adapters_are_not_mixed(make_peft):
    with pytest.raises(NotImplementedError, match="inside the rounding"):
        make_peft().add_weighted_adapter(["default"], [1.0], "mixed")
