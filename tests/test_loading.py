"""A refused or failed `load_adapter` leaves the model as it was, in every way it can fail."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_lrqat import LRQATConfig, sign_adapter
from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def state_of(model):
    """Everything that loading might change."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "adapters": copy.deepcopy(getattr(model, "peft_config", None)),
        "active": getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None,
        "attention": model.config._attn_implementation,
    }


def assert_same(one, two):
    assert one["tensors"].keys() == two["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert torch.equal(tensor, two["tensors"][name]), name
    assert {k: v for k, v in one.items() if k != "tensors"} == {
        k: v for k, v in two.items() if k != "tensors"
    }


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    sign_adapter(folder)


def drop_last(tensors):
    del tensors[max(tensors)]


def poison(tensors):
    name = max(n for n in tensors if n.endswith(("lrqat_B", "loraquant_scales")))
    tensors[name][0] = float("nan")


def reshape_head(tensors):
    name = next(n for n in tensors if "score" in n)
    tensors[name] = tensors[name].new_zeros(7, tensors[name].shape[1])


def other_base(tensors):
    name = max(n for n in tensors if n.endswith("lrqat_fingerprint"))
    tensors[name] += 1


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))
    sign_adapter(folder)


FAILURES = {
    "a tensor is missing": lambda f: edit(f, drop_last),
    "a tensor is not finite": lambda f: edit(f, poison),
    "a head of another shape": lambda f: edit(f, reshape_head),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "half of the weights": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
    "no targets": lambda f: edit_config(f, target_modules=["nothing"]),
    "damaged": lambda f: (f / CONFIG).write_bytes(b"\xff" + (f / CONFIG).read_bytes()),
}


@pytest.fixture(scope="module")
def folders(make_base, make_config, disturb, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    config = make_config("classifier", kv_cache_bits=4, activation_bits=8)
    disturb(get_peft_model(make_base("classifier"), config)).save_pretrained(path / "lrqat")
    lora = LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", r=4, init_lora_weights=False
    )
    get_peft_model(make_base("classifier"), lora).save_pretrained(path / "lora")
    quantize_adapter(
        path / "lora", path / "loraquant", LoRAQuantConfig(group_size=16), progress=False
    )
    return path


# The config of an adapter that is there is not read again.
WAYS = [
    (place, name)
    for place in ("beside another", "over itself", "natively")
    for name in FAILURES
    if (place, name) != ("over itself", "no targets")
]


@pytest.mark.parametrize(("place", "name"), WAYS, ids="-".join)
@pytest.mark.parametrize("kind", ["lrqat", "loraquant"])
def test_the_model_is_as_it_was(kind, place, name, folders, make_base, tmp_path):
    failure = FAILURES[name]
    folder = shutil.copytree(folders / kind, tmp_path / "adapter")
    failure(folder)
    if place == "natively":
        model = make_base("classifier").train()
    else:
        model = PeftModel.from_pretrained(make_base("classifier"), folders / kind)
        model.train(kind == "lrqat")
    before = state_of(model)
    arguments = {
        "natively": (str(folder),),
        "over itself": (folder, "default"),
        "beside another": (folder, "second"),
    }[place]
    with pytest.raises((ValueError, RuntimeError, OSError, KeyError)):
        model.load_adapter(*arguments)
    assert_same(state_of(model), before)
    # And what is whole still loads.
    if place == "natively":
        model.load_adapter(str(folders / kind))
    else:
        model.load_adapter(folders / kind, "second")


@pytest.mark.parametrize("place", ["beside another", "natively"])
def test_another_base_in_the_last_layer(place, folders, make_base, tmp_path):
    folder = shutil.copytree(folders / "lrqat", tmp_path / "adapter")
    edit(folder, other_base)
    model = make_base("classifier")
    if place == "beside another":
        config = LRQATConfig(
            target_modules=["q_proj"], range_estimator="minmax", r=2, task_type="SEQ_CLS"
        )
        model = get_peft_model(model, config)
    before = state_of(model)
    arguments = (str(folder),) if place == "natively" else (str(folder), "second")
    with pytest.raises(ValueError, match=r"another base model|not the base model"):
        model.load_adapter(*arguments)
    assert_same(state_of(model), before)


def test_adapters_of_other_types_go_where_they_went(make_base, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(make_base(), config).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_base(), tmp_path)
    model.load_adapter(tmp_path, "second")
    with pytest.raises(ValueError, match="nowhere"):
        model.load_adapter(tmp_path / "nowhere", "third")
