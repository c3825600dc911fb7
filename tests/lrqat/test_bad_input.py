"""Targets that cannot be quantised, and files that are broken or for another base, are refused.

A refusal has no effect.
"""

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_lrqat import LRQATLinear, sign_adapter


TARGET = "model.layers.1.self_attn.v_proj"


def refused(model, config, error, match):
    """Checks that ``get_peft_model`` raises and changes nothing in ``model``.

    That is: its modules, parameters and flags.
    """
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    tensors = {
        name: (id(p), p.requires_grad, None if p.is_meta else p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    with pytest.raises(error, match=match):
        get_peft_model(model, config)
    assert not hasattr(model, "peft_config")
    assert [(name, id(module), type(module)) for name, module in model.named_modules()] == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == tensors.keys()
    for name, (identity, requires_grad, values) in tensors.items():
        assert id(after[name]) == identity
        assert after[name].requires_grad == requires_grad
        assert values is None or torch.equal(after[name].nan_to_num(), values.nan_to_num())


@pytest.mark.parametrize(
    "target_modules", ["all-linear", r".*_proj", ["q_proj", "v_proj"], None], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite(value, target_modules, dtype, make_base, make_config):
    model, config = make_base(dtype=dtype), make_config(target_modules=target_modules)
    model.get_submodule(TARGET).weight.data[1, 2] = value
    refused(
        model, config, ValueError, f"`{TARGET}` has NaN or infinite entries; repair the base model"
    )
    model.get_submodule(TARGET).weight.data[1, 2] = 0
    get_peft_model(model, config)


def test_group_size_that_does_not_divide(make_base, make_config):
    config = make_config(group_size_pattern={TARGET: 24})
    refused(
        make_base(),
        config,
        ValueError,
        f"`{TARGET}`: `group_size` must divide `in_features`, but 24 does not divide 32",
    )


def test_target_that_matches_nothing(make_base, make_config):
    refused(
        make_base(),
        make_config(target_modules=["no_such_proj"]),
        ValueError,
        "no_such_proj.* not found",
    )


class _Int8Linear(nn.Linear):
    """A layer as quantisers make it: an nn.Linear to isinstance, with integers in its weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(
            torch.zeros(self.weight.shape, dtype=torch.int8), requires_grad=False
        )


class _OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _SubclassedWeight(nn.Linear):
    """A weight that is a tensor subclass, like torchao's."""

    class Weight(nn.Parameter):
        pass

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = self.Weight(self.weight.data)


class _Float64(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, dtype=torch.float64)


class _NoLinear(nn.Identity):
    pass


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_Int8Linear, "unquantised"),
        (_OwnForward, "`forward` does not compute"),
        (_SubclassedWeight, "unquantised"),
        (_Float64, "unquantised"),
        (_NoLinear, "unquantised"),
    ],
)
def test_module_of_another_kind(kind, reason, make_base, make_config):
    model = make_base()
    model.set_submodule(TARGET, kind(32, 16, bias=False))
    target_modules = ["q_proj", "v_proj"]  # "all-linear" may not see it
    refused(
        model,
        make_config(target_modules=target_modules),
        TypeError,
        f"`{TARGET}` .*{kind.__name__}.*{reason}",
    )


def test_embedding_as_target(make_base, make_config):
    refused(
        make_base(),
        make_config(target_modules=["q_proj", "embed_tokens"]),
        TypeError,
        "`model.embed_tokens` is a torch",
    )


def test_plain_subclass_is_accepted(make_base, make_config):
    """A subclass that only adds to the constructor computes as its parent does."""

    class Named(nn.Linear):
        pass

    model = make_base()
    named = Named(32, 16, bias=False)
    model.set_submodule(TARGET, named)
    assert isinstance(
        get_peft_model(model, make_config()).get_submodule(f"base_model.model.{TARGET}"),
        LRQATLinear,
    )


def test_model_that_carries_a_lora_already(make_base, make_config):
    model = make_base()
    model.add_adapter(LoraConfig(target_modules=["v_proj"]))
    names = set(model.state_dict())
    with pytest.raises(
        TypeError,
        match=r"`model\.layers\.0\.self_attn\.v_proj` is a peft\.tuners\.lora.*an adapter already",
    ):
        get_peft_model(model, make_config(target_modules=["q_proj", "v_proj"]))
    assert set(model.state_dict()) == names
    with pytest.raises(ValueError, match="different peft types"):
        get_peft_model(make_base(), LoraConfig(target_modules=["v_proj"])).add_adapter(
            "second", make_config()
        )


def test_weight_on_the_meta_device(make_base, make_config):
    model = make_base()
    model.get_submodule(TARGET).to("meta")
    refused(model, make_config(), ValueError, f"the weight of `{TARGET}` is not in memory")


def test_whole_model_on_the_meta_device(make_config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
            )
        )
    refused(model, make_config(), ValueError, "is not in memory")


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu"}], ids=["disk", "cpu"])
def test_offloaded_weight(device_map, make_base, make_config, tmp_path):
    from accelerate import cpu_offload, disk_offload

    model = make_base()
    if device_map[""] == "disk":
        disk_offload(model, str(tmp_path))
    else:
        cpu_offload(model, torch.device("cpu"))
    with pytest.raises(
        ValueError,
        match=r"the weight of `model\.layers\.0\.self_attn\.q_proj` is not in memory .*offloading",
    ):
        get_peft_model(model, make_config())
    assert not any(isinstance(module, LRQATLinear) for module in model.modules())


def test_tied_output_layer(make_base, make_config):
    refused(
        make_base("qwen2"),
        make_config(target_modules=["q_proj", "lm_head"]),
        ValueError,
        "`lm_head` is tied to another",
    )


def test_untied_output_layer_is_accepted(make_base, make_config, logits_of, disturb):
    model = disturb(
        get_peft_model(make_base(), make_config(target_modules=["q_proj", "lm_head"])).eval()
    )
    trained = logits_of(model)
    assert torch.equal(logits_of(model.merge_and_unload()), trained)


def test_empty_weight(make_config):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    refused(
        model,
        make_config(target_modules=["0", "1"], task_type=None),
        ValueError,
        "`1` is empty, of shape",
    )


def test_dequantised_base_that_still_carries_its_quantization_config(
    make_base, make_config, logits_of
):
    """transformers makes this of a GGUF file: plain weights, and a config with their origin."""
    model = make_base(dtype=torch.float16)
    model.config.quantization_config = {"quant_method": "gguf"}
    model = get_peft_model(model, make_config()).eval()
    assert torch.isfinite(logits_of(model)).all()


# Files.


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, make_peft, disturb):
    """Saves an adapter of the tiny Llama."""
    folder = tmp_path_factory.mktemp("adapter")
    disturb(make_peft()).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(adapter, tmp_path):
    """Copies the saved adapter and applies ``change`` to its tensors by name.

    ``broken(change)``
    """

    def make(change=None):
        shutil.copytree(adapter, tmp_path / "broken")
        if change:
            path = tmp_path / "broken" / "adapter_model.safetensors"
            tensors = load_file(path)
            change(tensors)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                path,
                metadata={"format": "pt"},
            )
        return tmp_path / "broken"

    return make


def not_loaded(folder, base, match, **kwargs):
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base, folder, **kwargs)


KEY = f"base_model.model.{TARGET}"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "low-cpu-mem"])
@pytest.mark.parametrize("kind", ["lrqat_A", "lrqat_B", "lrqat_scale", "lrqat_fingerprint"])
def test_missing_tensor(kind, low_cpu_mem_usage, broken, make_base):
    folder = broken(lambda tensors: tensors.pop(f"{KEY}.{kind}"))
    match = f"the saved adapter has no `{kind}` for `.*{TARGET}`"
    not_loaded(folder, make_base(), match, low_cpu_mem_usage=low_cpu_mem_usage)


def test_all_tensors_missing(broken, make_base):
    not_loaded(
        broken(lambda tensors: tensors.clear()), make_base(), "the saved adapter has no `lrqat_A`"
    )


@pytest.mark.parametrize("kind", ["lrqat_A", "lrqat_B", "lrqat_scale"])
def test_wrong_shape(kind, broken, make_base):
    def change(tensors):
        tensors[f"{KEY}.{kind}"] = tensors[f"{KEY}.{kind}"][:-1]

    not_loaded(
        broken(change),
        make_base(),
        rf"`{kind}` of `.*{TARGET}` has shape \(.*\) in the saved adapter, but \(",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lrqat_A", "lrqat_B", "lrqat_scale"])
def test_entry_that_is_not_finite(kind, value, broken, make_base):
    def change(tensors):
        tensors[f"{KEY}.{kind}"].view(-1)[1] = value

    not_loaded(
        broken(change),
        make_base(),
        f"`{kind}` of `.*{TARGET}` has NaN or infinite entries in the saved adapter",
    )


def test_tensors_for_a_layer_that_is_not_there(broken, make_base):
    extra = KEY.replace("layers.1", "layers.7") + ".lrqat_A"
    folder = broken(lambda tensors: tensors.update({extra: torch.zeros(4, 32)}))
    not_loaded(folder, make_base(), r"has `.*layers\.7.*`, but this model has no such layer")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_file(keep, adapter, broken, make_base):
    folder = broken()
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors in .* is not whole"):
        PeftModel.from_pretrained(make_base(), folder)


def test_config_of_another_rank(broken, make_base):
    folder = broken()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    sign_adapter(folder)
    not_loaded(
        folder,
        make_base(),
        r"`lrqat_A` of .* has shape \(4, 32\) in the saved adapter, but \(8, 32\)",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"downcast": "int"},
        {"scale_dtype": "float16"},
        {"symmetric": False},
        {"range_estimator": "lp"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_config_of_another_grid(change, broken, make_base):
    folder = broken()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    sign_adapter(folder)
    not_loaded(
        folder, make_base(), "not the base model that the adapter was trained on: 14 of 14 layers"
    )


# Another base.


@pytest.fixture(scope="module")
def changed_base(make_base):
    """Makes the tiny Llama with one weight of one layer changed."""

    def make():
        model = make_base()
        model.get_submodule(TARGET).weight.data[0, 0] += 0.05
        return model

    return make


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "low-cpu-mem"])
def test_other_base_is_refused(low_cpu_mem_usage, adapter, changed_base, make_base):
    match = (
        rf"not the base model.*: 1 of 14 layers .* first is `.*{TARGET}`.*in float32 or wider.*"
        "verify_base = False"
    )
    not_loaded(adapter, changed_base(), match, low_cpu_mem_usage=low_cpu_mem_usage)
    not_loaded(adapter, make_base(seed=1), "14 of 14 layers", low_cpu_mem_usage=low_cpu_mem_usage)


def test_base_in_a_shorter_dtype_is_refused(adapter, make_base):
    not_loaded(adapter, make_base().bfloat16(), "not the base model .*in float32 or wider")


def test_load_adapter_into_a_wrapped_model_is_refused_before_anything_is_loaded(
    adapter, changed_base, make_config
):
    model = get_peft_model(changed_base(), make_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="1 of 14 layers"):
        model.load_adapter(adapter, "second")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["plain", "low-cpu-mem"])
def test_verify_base_false_loads_all_the_same(
    low_cpu_mem_usage, adapter, changed_base, make_base, logits_of, caplog, tmp_path
):
    config = PeftConfig.from_pretrained(adapter)
    config.verify_base = False
    with caplog.at_level("WARNING"):
        model = PeftModel.from_pretrained(
            changed_base(), adapter, config=config, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
    assert (
        "trained on other base weights in 1 layers; loaded because of `verify_base=False`"
        in caplog.text
    )
    wanted = logits_of(model)
    right = logits_of(PeftModel.from_pretrained(make_base(), adapter).eval())
    assert not torch.equal(wanted, right)
    torch.testing.assert_close(wanted, right, atol=0.5, rtol=0.5)
    # Saved from that model, it is an adapter of that base.
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits_of(PeftModel.from_pretrained(changed_base(), tmp_path).eval()), wanted
    )
    not_loaded(tmp_path, make_base(), "1 of 14 layers")


def test_native_loader_refuses_too(adapter, changed_base, make_base, logits_of):
    """transformers fills in the tensors itself; they are checked afterwards."""
    model = changed_base()
    with pytest.raises(
        ValueError, match=r"adapter `default` was trained on another base model.*verify_base=False"
    ):
        model.load_adapter(str(adapter))
    assert type(model.get_submodule(TARGET)) is nn.Linear
    good = make_base()
    good.load_adapter(str(adapter))
    assert torch.equal(
        logits_of(good), logits_of(PeftModel.from_pretrained(make_base(), adapter).eval())
    )


def test_native_loader_checks_every_adapter_of_the_same_name(
    adapter, make_base, make_peft, logits_of, tmp_path
):
    make_peft(seed=1).save_pretrained(tmp_path)
    model = make_base()
    model.load_adapter(str(adapter))
    logits_of(model)
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="was trained on another base model"):
        model.load_adapter(str(tmp_path))


def test_native_loader_with_verify_base_false(adapter, changed_base, logits_of):
    config = PeftConfig.from_pretrained(adapter)
    config.verify_base = False
    model = changed_base()
    model.load_adapter(str(adapter), peft_config=config)
    wanted = logits_of(PeftModel.from_pretrained(changed_base(), adapter, config=config).eval())
    assert torch.equal(logits_of(model), wanted)


@pytest.mark.parametrize("field", ["bits_pattern", "group_size_pattern"])
def test_a_pattern_that_fits_no_target_is_refused(field, make_base, make_config):
    base = make_base()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(
        ValueError, match=f"`{field}` has 'down_prj', but no target module has this name"
    ):
        get_peft_model(base, make_config(**{field: {"down_prj": 4}}))
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_output_layer_of_multihead_attention_is_refused(make_config):
    """nn.MultiheadAttention reads its weight and never calls the layer: nothing would train."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    with pytest.raises(TypeError, match=r"`attention\.out_proj`"):
        get_peft_model(model, make_config(target_modules=["out_proj"], task_type=None))
