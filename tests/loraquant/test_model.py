"""Packed adapters in whole models: all loaders, several adapters, generation, refused files."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from hub_server import StandInHub, run_client
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from peft_lrqat import LoRAQuantConfig, LoRAQuantModel, sign_adapter
from peft_lrqat.loraquant import LoRAQuantLayer
from peft_lrqat.shared.card import BEGIN


MIXTURE = ["4321", "", "11", "3311"]
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "wte"),
    "t5": ("q", "v", "wo"),
    "classifier": ("q_proj", "v_proj"),
    "opt": ("q_proj", "fc1", "embed_tokens"),
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_base, write_adapter):
    """Saves a base model, two packed adapters ("packed", "other/packed") and their LoRA twins."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    base = make_base()
    base.save_pretrained(folder / "base")
    fields = {"base_model_name_or_path": str(folder / "base"), "r": 8, "lora_alpha": 16}
    write_adapter(folder, base, MIXTURE, **fields)
    write_adapter(folder / "other", base, "22", targets=["q_proj", "o_proj"], **fields)
    return folder


@pytest.fixture
def load(saved, make_base):
    """Loads a fresh base model with these adapters, named like their folders.

    ``load("packed", ...)``
    """

    def make(*names, dtype=torch.float32, **options):
        model = PeftModel.from_pretrained(
            make_base(dtype=dtype), saved / names[0], adapter_name=names[0], **options
        )
        for name in names[1:]:
            model.load_adapter(saved / name, adapter_name=name.replace("/", "-"), **options)
        return model.eval()

    return make


def close(x, y, dtype=torch.float32):
    # A few roundings of the layers' outputs, carried through two blocks.
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}[dtype]
    torch.testing.assert_close(x, y, rtol=bound, atol=bound)


def stored(model):
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if ".loraquant_" in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_acts_as_lora_with_the_expanded_factors(dtype, load, make_base, logits_of):
    packed, lora = load("packed", dtype=dtype), load("lora", dtype=dtype)
    close(logits_of(packed), logits_of(lora), dtype)
    assert not torch.equal(logits_of(packed), logits_of(make_base(dtype=dtype)))


LOADERS = {
    "low_cpu_mem_usage": lambda f, dtype: PeftModel.from_pretrained(
        base_of(f, dtype), f / "packed", low_cpu_mem_usage=True
    ),
    "no autocast": lambda f, dtype: PeftModel.from_pretrained(
        base_of(f, dtype), f / "packed", autocast_adapter_dtype=False
    ),
    "AutoPeftModel": lambda f, dtype: AutoPeftModelForCausalLM.from_pretrained(
        f / "packed", dtype=dtype
    ),
    "AutoModel": lambda f, dtype: transformers.AutoModelForCausalLM.from_pretrained(
        f / "packed", dtype=dtype
    ),
    "load_adapter": lambda f, dtype: with_adapter(base_of(f, dtype), f / "packed"),
    "inject": lambda f, dtype: injected(base_of(f, dtype), f / "packed"),
}


def base_of(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


def with_adapter(model, folder):
    model.load_adapter(str(folder))
    return model


def injected(model, folder):
    model = inject_adapter_in_model(LoRAQuantConfig.from_pretrained(folder), model)
    model.peft_config = {"default": LoRAQuantConfig.from_pretrained(folder)}
    assert not set_peft_model_state_dict(model, load_file(folder / WEIGHTS)).unexpected_keys
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_same_bits(loader, dtype, saved, load, logits_of):
    expected = load("packed", dtype=dtype)
    model = LOADERS[loader](saved, dtype).eval()
    assert torch.equal(logits_of(model), logits_of(expected))
    tensors = {
        name.removeprefix("base_model.model.").rsplit(".", 1)[0]: t
        for name, t in stored(model).items()
    }
    file = {
        name.removeprefix("base_model.model."): t
        for name, t in load_file(saved / "packed" / WEIGHTS).items()
    }
    assert tensors.keys() == file.keys()
    assert all(torch.equal(tensors[k], file[k]) and tensors[k].dtype == file[k].dtype for k in file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_gives_the_same_file(dtype, saved, load, tmp_path):
    load("packed", dtype=dtype).half().save_pretrained(tmp_path)
    # PEFT puts every adapter that is not "default" into a folder of its own.
    first, second = load_file(saved / "packed" / WEIGHTS), load_file(tmp_path / "packed" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(
        torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first
    )
    configs = [
        LoRAQuantConfig.from_pretrained(folder)
        for folder in (saved / "packed", tmp_path / "packed")
    ]
    assert configs[0] == configs[1]
    assert BEGIN in (tmp_path / "packed" / "README.md").read_text()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("architecture", TARGETS)
def test_architectures(architecture, use_dora, make_base, write_adapter, logits_of, tmp_path):
    base = make_base(architecture)
    task = {"t5": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}.get(architecture, "CAUSAL_LM")
    # The head of a classifier is new: it is trained in full and stored.
    extra = (
        {"base_model.model.score.weight": torch.randn(3, 32)}
        if architecture == "classifier"
        else {}
    )
    fields = {
        "use_dora": use_dora,
        "task_type": task,
        "modules_to_save": ["score"] if extra else None,
    }
    folders = write_adapter(
        tmp_path, base, MIXTURE, targets=TARGETS[architecture], extra=extra, **fields
    )
    packed, lora = (
        PeftModel.from_pretrained(make_base(architecture), folder).eval() for folder in folders
    )
    assert isinstance(packed.base_model, LoRAQuantModel)
    close(logits_of(packed, architecture), logits_of(lora, architecture))
    close(
        logits_of(packed.merge_and_unload(), architecture),
        logits_of(lora.merge_and_unload(), architecture),
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias, make_base, write_adapter, logits_of, tmp_path):
    base = make_base("gpt2")
    trained = get_peft_model(make_base("gpt2"), LoraConfig(target_modules=["c_attn"], bias=bias))
    trained.base_model.model.transformer.h[0].attn.c_attn.base_layer.bias.data += 1
    trained.save_pretrained(tmp_path / "trained")
    saved_biases = {
        k: v for k, v in load_file(tmp_path / "trained" / WEIGHTS).items() if k.endswith("bias")
    }
    folders = write_adapter(tmp_path, base, "22", targets=["c_attn"], extra=saved_biases, bias=bias)
    packed, lora = (
        PeftModel.from_pretrained(make_base("gpt2"), folder).eval() for folder in folders
    )
    close(logits_of(packed, "gpt2"), logits_of(lora, "gpt2"))
    assert not any(p.requires_grad for p in packed.parameters())
    packed.save_pretrained(tmp_path / "again")
    first, second = load_file(folders[0] / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    save_file({k: v for k, v in first.items() if not k.endswith("bias")}, folders[0] / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"has no bias for `transformer\.h\.0\.attn\.c_attn`, but `bias` is"
    ):
        PeftModel.from_pretrained(make_base("gpt2"), folders[0])


def test_modules_and_tokens_that_were_trained_in_full(
    make_base, write_adapter, logits_of, tmp_path
):
    extra = {
        "base_model.model.lm_head.weight": torch.randn(96, 32),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(
            2, 32
        ),
    }
    fields = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 5]}}
    folders = write_adapter(tmp_path, make_base(), MIXTURE, extra=extra, **fields)
    packed, lora = (PeftModel.from_pretrained(make_base(), folder).eval() for folder in folders)
    close(logits_of(packed), logits_of(lora))
    assert not any(p.requires_grad for p in packed.parameters())
    packed.save_pretrained(tmp_path / "again")
    first, second = load_file(folders[0] / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"], ids=["untied", "tied"])
def test_what_was_trained_in_full_stays_after_merging(
    architecture, make_base, write_adapter, logits_of, tmp_path
):
    tokens = torch.randn(2, 32)
    extra = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": tokens}
    fields = {"trainable_token_indices": {"embed_tokens": [3, 5]}}
    if architecture == "llama":  # PEFT has no such pair where the two are tied
        extra["base_model.model.lm_head.weight"] = torch.randn(96, 32)
        fields["modules_to_save"] = ["lm_head"]
    folders = write_adapter(tmp_path, make_base(architecture), MIXTURE, extra=extra, **fields)
    packed, lora = (
        PeftModel.from_pretrained(make_base(architecture), folder).eval() for folder in folders
    )
    before, merged = logits_of(packed, architecture), packed.merge_and_unload()
    close(logits_of(merged, architecture), before)
    close(logits_of(merged, architecture), logits_of(lora.merge_and_unload(), architecture))
    assert torch.equal(merged.model.embed_tokens.weight[[3, 5]], tokens)


def test_layers_and_patterns(make_base, write_adapter, logits_of, tmp_path):
    fields = {
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "exclude_modules": ["layers.1.self_attn.v_proj"],
    }
    folder, _ = write_adapter(tmp_path, make_base(), "2")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    bits = {"model.layers.1.self_attn.q_proj": "2", "model.layers.1.mlp.down_proj": "2"}
    path.write_text(json.dumps({**config, **fields, "component_bits": bits}))
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {k: v for k, v in tensors.items() if any(name + "." in k for name in bits)},
        folder / WEIGHTS,
    )
    model = PeftModel.from_pretrained(make_base(), folder)
    assert {m.name for m in model.modules() if isinstance(m, LoRAQuantLayer)} == bits.keys()
    logits_of(model)


def test_disabling_and_unloading_give_the_base_back(load, make_base, logits_of):
    model, expected = load("packed"), logits_of(make_base())
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    base = model.unload()
    assert torch.equal(logits_of(base), expected)
    assert {n: type(m) for n, m in base.named_modules()} == {
        n: type(m) for n, m in make_base().named_modules()
    }


def test_merging(load, logits_of):
    model = load("packed")
    before = logits_of(model)
    model.merge_adapter()
    close(logits_of(model), before)
    model.unmerge_adapter()
    close(logits_of(model), before)
    merged = model.merge_and_unload(safe_merge=True)
    close(logits_of(merged), before)
    assert not any(isinstance(m, LoRAQuantLayer) for m in merged.modules())


def test_several_adapters(load, logits_of, batch_for):
    packed, lora = load("packed", "other/packed"), load("lora", "other/lora")
    alone = logits_of(packed)
    outputs = []
    for model, names in ((packed, ("packed", "other-packed")), (lora, ("lora", "other-lora"))):
        model.set_adapter(names[1])
        second = logits_of(model)
        model.base_model.set_adapter(list(names))
        both = logits_of(model)
        model.set_adapter(names[0])
        outputs.append((second, both))
    for x, y in zip(*outputs):
        close(x, y)
    assert torch.equal(logits_of(packed), alone)
    packed.delete_adapter("packed")
    assert packed.active_adapters == ["other-packed"]
    assert torch.equal(logits_of(packed), outputs[0][0])
    assert not any(".packed" in name for name in stored(packed))


def test_an_adapter_is_read_again_under_its_name(load, saved, logits_of):
    model = load("packed", "other/packed")
    expected = logits_of(model)
    model.load_adapter(saved / "packed", adapter_name="third")
    model.set_adapter("third")
    assert torch.equal(logits_of(model), expected)
    model.delete_adapter("third")
    model.load_adapter(saved / "other" / "packed", adapter_name="third")
    model.set_adapter("third")
    third = logits_of(model)
    model.set_adapter("other-packed")
    assert torch.equal(logits_of(model), third)


def test_status(load):
    status = get_model_status(load("packed"))
    assert status.peft_types == {"packed": "LORAQUANT"}
    assert status.available_adapters == ["packed"]
    assert status.devices == {"packed": ["cpu"]}
    assert status.trainable_params == 0
    assert status.num_adapter_layers == 6


NAMES = {
    "packed": ["packed", "other-packed", "__base__"],
    "lora": ["lora", "other-lora", "__base__"],
}


def test_mixed_batches(load, batch_for):
    batch = {k: v[:1].repeat(3, 1) for k, v in batch_for().items() if k != "labels"}
    outputs = []
    for kind, names in NAMES.items():
        model = load(kind, f"other/{kind}")
        with torch.no_grad():
            outputs.append(model(**batch, adapter_names=names).logits)
            outputs.append(
                model.generate(**batch, adapter_names=names, max_new_tokens=6, do_sample=False)
            )
            outputs.append(
                model.generate(
                    **batch, adapter_names=names, max_new_tokens=6, do_sample=False, num_beams=2
                )
            )
        if kind == "packed":
            for row, name in enumerate(names[:2]):
                model.set_adapter(name)
                with torch.no_grad():
                    close(model(**batch).logits[row], outputs[0][row])
            with model.disable_adapter(), torch.no_grad():
                close(model(**batch).logits[2], outputs[0][2])
    close(outputs[0], outputs[3])
    assert torch.equal(outputs[1], outputs[4])
    assert torch.equal(outputs[2], outputs[5])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_mixed_batches_of_an_encoder_and_a_decoder(make_base, write_adapter, batch_for, tmp_path):
    """With beams, the decoder has more rows than the encoder."""
    batch = {k: v for k, v in batch_for("t5").items() if k != "labels"}
    outputs = []
    fields = {"targets": TARGETS["t5"], "task_type": "SEQ_2_SEQ_LM"}
    folders = write_adapter(tmp_path, make_base("t5"), MIXTURE, **fields)
    for folder in folders:
        model = PeftModel.from_pretrained(make_base("t5"), folder).eval()
        outputs.append(
            model.generate(
                **batch,
                adapter_names=["default", "__base__"],
                max_new_tokens=6,
                do_sample=False,
                num_beams=3,
            )
        )
    assert torch.equal(*outputs)


def test_mixed_batches_that_are_refused(load, batch_for):
    model = load("packed")
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent, nobody"):
        model(**batch_for(), adapter_names=["nobody", "absent"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(**batch_for(), adapter_names=["packed"])
    # The refusal leaves nothing behind.
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(**batch_for(), adapter_names=["packed", "packed"])


def test_one_cache_for_the_whole_model(load, saved, logits_of):
    model = load("packed", "other/packed")
    layers = [module for module in model.modules() if isinstance(module, LoRAQuantLayer)]
    assert len({id(layer._cache) for layer in layers}) == 1
    first = logits_of(model)
    held = layers[0]._cache.bytes
    assert held > 0
    assert torch.equal(logits_of(model), first)
    assert layers[0]._cache.bytes == held
    model.set_cache_limit(held // 2)
    assert torch.equal(logits_of(model), first)
    assert 0 < layers[0]._cache.bytes <= held // 2
    model.set_adapter("other-packed")
    logits_of(model)
    assert 0 < layers[0]._cache.bytes <= held // 2
    # Without a PeftModel, transformers makes a tuner object for each adapter.
    native = base_of(saved, torch.float32)
    native.load_adapter(str(saved / "packed"), "one")
    native.load_adapter(str(saved / "other" / "packed"), "two")
    assert len({id(m._cache) for m in native.modules() if isinstance(m, LoRAQuantLayer)}) == 1


def test_copies_and_pickles(load, logits_of):
    model = load("packed")
    expected = logits_of(model)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), expected)


def test_nothing_can_be_trained(saved, make_base):
    with pytest.raises(
        ValueError,
        match="cannot be trained, its factors are integers: load it with is_trainable=False",
    ):
        PeftModel.from_pretrained(make_base(), saved / "packed", is_trainable=True)


@pytest.mark.parametrize(
    "make", [get_peft_model, lambda base, config: base.add_adapter(config)], ids=["PEFT", "native"]
)
def test_an_adapter_is_not_made_on_a_model(make, make_base):
    base = make_base()
    with pytest.raises(
        ValueError,
        match=r"made from a trained LoRA adapter\. Use `peft_lrqat\.loraquant\.quantize_adapter",
    ):
        make(base, LoRAQuantConfig(target_modules=["q_proj"]))
    assert not any(isinstance(module, LoRAQuantLayer) for module in base.modules())


def edit_config(folder, **fields):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        config[name] = value(config[name]) if callable(value) else value
    path.write_text(json.dumps(config))
    sign_adapter(folder)


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)


# Of bits 4321, rows and columns 32, groups of 7
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
CODES, SCALES = f"{Q_PROJ}.loraquant_codes", f"{Q_PROJ}.loraquant_scales"


def replace(key, value):
    return lambda folder: edit_weights(folder, lambda t: t.update({key: value(t[key])}))


def with_first(value):
    return lambda t: torch.cat([torch.full_like(t[:1], value), t[1:]])


TAMPERED = {
    "codes missing": (
        lambda f: edit_weights(f, lambda t: t.pop(CODES)),
        r"`model.layers.0.self_attn.q_proj`: the codes are missing",
    ),
    "scales missing": (
        lambda f: edit_weights(f, lambda t: t.pop(SCALES)),
        "q_proj`: the scales are missing",
    ),
    "codes cut": (
        replace(CODES, lambda t: t[:-1]),
        r"the codes must be 80 of torch.uint8 .* but are \(79,\)",
    ),
    "scales cut": (replace(SCALES, lambda t: t[1:]), r"the scales must be 40 .* but are \(39,\)"),
    "scales in another dtype": (
        replace(SCALES, torch.Tensor.half),
        "must be 40 of torch.bfloat16 .* of torch.float16",
    ),
    "codes in another dtype": (replace(CODES, torch.Tensor.char), "of torch.int8"),
    "NaN": (replace(SCALES, with_first(torch.nan)), "but 1 of 40 are NaN"),
    "infinite": (replace(SCALES, with_first(torch.inf)), "but 1 of 40 are infinite"),
    "negative": (replace(SCALES, with_first(-1)), "but 1 of 40 are negative"),
    "zero points": (
        lambda f: edit_weights(
            f, lambda t: t.update({f"{Q_PROJ}.loraquant_zero_points": t[CODES].clone()})
        ),
        "q_proj.loraquant_zero_points`, but its configuration puts nothing",
    ),
    "zero points in the config only": (
        lambda f: edit_config(f, zero_points=True),
        "the zero_points are missing",
    ),
    "other bits": (
        lambda f: edit_config(f, component_bits=lambda bits: {**bits, Q_PROJ[17:]: "4322"}),
        "q_proj`: the codes must be 88",
    ),
    "other groups": (lambda f: edit_config(f, group_size=8), "the scales must be 32"),
    "more components than the rank": (
        lambda f: edit_config(f, r=2),
        "has 4 components, but its rank is 2",
    ),
    "a module more": (
        lambda f: edit_config(
            f, component_bits=lambda bits: {**bits, "model.layers.7.self_attn.q_proj": "2"}
        ),
        r"`component_bits` has `model.layers.7.self_attn.q_proj`, but this model has no such "
        r"target \(1 such",
    ),
    "a module less": (
        lambda f: edit_config(
            f, component_bits=lambda bits: {k: v for k, v in bits.items() if "q_proj" not in k}
        ),
        r"`target_modules` of this model has `model.layers.0.self_attn.q_proj`, but "
        r"`component_bits` has nothing .*\(2 such",
    ),
    "tensors of another module": (
        lambda f: edit_weights(
            f, lambda t: t.update({CODES.replace("q_proj", "o_proj"): t[CODES].clone()})
        ),
        "o_proj.loraquant_codes`, but its configuration puts nothing",
    ),
    "magnitudes": (
        lambda f: edit_weights(
            f, lambda t: t.update({f"{Q_PROJ}.loraquant_magnitude": torch.ones(32)})
        ),
        "q_proj.loraquant_magnitude`, but its configuration puts nothing",
    ),
    "DoRA in the config only": (
        lambda f: edit_config(f, use_dora=True),
        "the magnitude is missing",
    ),
    "newer": (lambda f: edit_config(f, format_version=99), "saved by a newer release"),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("tampering", TAMPERED)
def test_tampered_adapters_are_refused(
    tampering, low_cpu_mem_usage, make_base, write_adapter, tmp_path
):
    folder, _ = write_adapter(tmp_path, make_base(), MIXTURE)
    apply, message = TAMPERED[tampering]
    apply(folder)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(make_base(), folder, low_cpu_mem_usage=low_cpu_mem_usage)


# transformers casts what it reads to the dtype that the model has, and reports, without raising,
# what is missing or unknown.
REPORTED = {
    "codes missing",
    "zero points in the config only",
    "zero points",
    "magnitudes",
    "tensors of another module",
}
CAST = {"scales in another dtype", "codes in another dtype"}


@pytest.mark.parametrize("tampering", sorted(TAMPERED.keys() - REPORTED - CAST))
def test_transformers_refuses_them_too(tampering, make_base, write_adapter, logits_of, tmp_path):
    """The first forward pass refuses them: transformers has no place for an earlier check."""
    folder, _ = write_adapter(tmp_path, make_base(), MIXTURE)
    apply, _ = TAMPERED[tampering]
    apply(folder)
    model = make_base()
    with pytest.raises((ValueError, RuntimeError)):
        logits_of(with_adapter(model, folder))


def test_padding_bits_are_refused(make_base, write_adapter, tmp_path):
    folder, _ = write_adapter(
        tmp_path, make_base("classifier"), "3", targets=["score"], task_type="FEATURE_EXTRACTION"
    )
    key = "base_model.model.score.loraquant_codes"
    assert PeftModel.from_pretrained(make_base("classifier"), folder)
    edit_weights(
        folder, lambda t: t[key].__setitem__(1, 0xFF)
    )  # 3 values of 3 bits leave 7 bits of the second byte
    with pytest.raises(
        ValueError, match="`score`: the bits after the last value of a row must be zero"
    ):
        PeftModel.from_pretrained(make_base("classifier"), folder)


def test_a_truncated_file_is_refused(make_base, write_adapter, tmp_path):
    folder, _ = write_adapter(tmp_path, make_base(), MIXTURE)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-10])
    with pytest.raises(ValueError, match="is not whole"):
        PeftModel.from_pretrained(make_base(), folder)


def test_a_refused_file_leaves_the_other_adapters(
    load, saved, make_base, write_adapter, logits_of, tmp_path
):
    folder, _ = write_adapter(tmp_path, make_base(), MIXTURE)
    edit_weights(folder, lambda t: t.pop(CODES))
    model = load("packed")
    expected = logits_of(model)
    with pytest.raises(ValueError, match="the codes are missing"):
        model.load_adapter(folder, adapter_name="broken")
    assert torch.equal(logits_of(model), expected)
    assert list(model.peft_config) == ["packed"]


def test_another_base_is_refused_before_it_is_touched(saved, make_base):
    for architecture in ("gpt2", "qwen2"):
        base = make_base(architecture)
        names = [name for name, _ in base.named_modules()]
        if architecture == "qwen2":
            base.model.layers.append(copy.deepcopy(base.model.layers[0]))
            names = [name for name, _ in base.named_modules()]
        with pytest.raises(ValueError, match="the adapter is for another base model"):
            PeftModel.from_pretrained(base, saved / "packed")
        assert [name for name, _ in base.named_modules()] == names


def test_another_shape_is_refused(saved, make_base):
    base = make_base()
    base.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 40)
    with pytest.raises(
        ValueError, match=r"q_proj`: the codes must be .* on a module of shape \(40, 32\)"
    ):
        PeftModel.from_pretrained(base, saved / "packed")


def test_shapes_whose_files_have_equal_sizes_are_told_apart():
    """(48, 32) and (32, 48) take the same number of bytes."""
    shapes = {"of": [48, 32], "other": [32, 48]}
    config = LoRAQuantConfig(
        target_modules=["up"], component_bits={"up": "22"}, shapes={"up": shapes["of"]}
    )
    net = torch.nn.ModuleDict({"up": torch.nn.Linear(*shapes["of"])})  # (inputs, outputs)
    with pytest.raises(
        ValueError, match=r"made for a `up` of shape \(48, 32\), but this model's is \(32, 48\)"
    ):
        get_peft_model(net, config)
    assert type(net["up"]) is torch.nn.Linear


def test_more_components_than_fit_in_memory_are_refused_before_room_is_made():
    config = LoRAQuantConfig(target_modules=["up"], component_bits={"up": "1" * 10**5}, r=10**5)
    net = torch.nn.ModuleDict({"up": torch.nn.Linear(2**16, 2**15, device="meta")})
    with pytest.raises(
        ValueError, match=r"does not fit `up`: factors of rank 100000 .* larger than any adapter's"
    ):
        get_peft_model(net, config)
    assert type(net["up"]) is torch.nn.Linear


@pytest.mark.parametrize(
    "module", [torch.nn.Conv2d(3, 3, 1), torch.nn.Embedding(5, 3, max_norm=1.0)]
)
def test_other_layers_are_refused(module):
    net = torch.nn.ModuleDict({"first": torch.nn.Linear(3, 3), "second": module})
    config = LoRAQuantConfig(
        target_modules=["first", "second"], component_bits={"first": "2", "second": "2"}
    )
    with pytest.raises(
        TypeError, match=r"`second` is a torch\.nn\.modules.* LORAQUANT works on torch\.nn\.Linear"
    ):
        get_peft_model(net, config)
    assert type(net["first"]) is torch.nn.Linear


def test_layers_with_adapters_of_another_type_are_refused(saved, make_base):
    base = make_base()
    base.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    with pytest.raises(TypeError, match="already carries an adapter of another type"):
        base.load_adapter(str(saved / "packed"), "packed")
    model = get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(saved / "packed", adapter_name="packed")


PUSH_AND_LOAD = """
import torch, transformers
from peft import PeftModel
import peft_lrqat
def load(adapter):
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    return PeftModel.from_pretrained(base, adapter).eval()
model = load("packed")
model.push_to_hub("user/packed")
again = load("user/packed")
ids = torch.arange(3, 15)[None]
print(torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits))
"""


def test_published_with_its_card(saved):
    with StandInHub() as hub:
        assert run_client(hub, PUSH_AND_LOAD, saved).splitlines()[-1] == "True"
        files = hub.repos["user/packed"].files
    assert files[WEIGHTS] == (saved / "packed" / WEIGHTS).read_bytes()
    card = files["README.md"].decode()
    assert "library_name: peft" in card
    assert "import peft_lrqat  # registers the type LORAQUANT with PEFT" in card
    assert (
        "components of 4, 3, 2, 1 bits, one scale in bfloat16 per 7 entries, no zero points" in card
    )


def test_packed_adapters_are_not_mixed(load):
    with pytest.raises(NotImplementedError, match=r"peft_lrqat\.dequantize_adapter"):
        load("packed").add_weighted_adapter(["packed"], [1.0], "mixed")
