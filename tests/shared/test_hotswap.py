"""Hot-swapping: what is left is the new adapter, as if it had been loaded alone."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap

from peft_lrqat import LoRAQuantConfig, hotswap_adapter, quantize_adapter


@pytest.fixture(params=["LRQAT", "LORAQUANT"])
def kind(request):
    return request.param


@pytest.fixture
def save(make_base, make_config, disturb, tmp_path):
    """``save(kind, name, seed, **fields)``: the folder of a saved adapter."""

    def make(kind, name, seed, **fields):
        base = make_base(dtype=torch.bfloat16)
        if kind == "LRQAT":
            model = get_peft_model(base, make_config(bits=4, **fields))
            disturb(model, seed=seed)
            model.save_pretrained(tmp_path / name)
            return str(tmp_path / name)
        settings = {"target_modules": ["q_proj", "up_proj"], "r": 4, **fields}
        model = get_peft_model(base, LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter += torch.randn(parameter.shape, generator=generator)
                if "modules_to_save" in key:
                    parameter += torch.randn(parameter.shape, generator=generator) / 8
        model.save_pretrained(tmp_path / f"{name}-lora")
        bits = LoRAQuantConfig(group_size=16, bits_high=2 + seed % 2)
        quantize_adapter(tmp_path / f"{name}-lora", tmp_path / name, bits, progress=False)
        return str(tmp_path / name)

    return make


def load(make_base, folder, **options):
    return PeftModel.from_pretrained(make_base(dtype=torch.bfloat16), folder, **options)


@pytest.mark.parametrize("function", ["ours", "PEFT's"])
def test_the_new_adapter_is_what_is_left(kind, function, save, make_base, logits_of, tmp_path):
    one, other = save(kind, "one", 1), save(kind, "other", 2)
    model, expected = load(make_base, one), load(make_base, other)
    assert not torch.equal(logits_of(model), logits_of(expected))
    swap = hotswap_adapter if function == "ours" else hotswap.hotswap_adapter
    swap(model, other, "default", torch_device="cpu")
    assert torch.equal(logits_of(model), logits_of(expected))
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert model.peft_config["default"] == expected.peft_config["default"]
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in state)
    model.save_pretrained(tmp_path / "saved")
    again = load(make_base, str(tmp_path / "saved"))
    assert torch.equal(logits_of(again), logits_of(expected))
    swap(model, one, "default", torch_device="cpu")
    assert torch.equal(logits_of(model), logits_of(load(make_base, one)))


def test_generation_goes_on_with_the_new_adapter(kind, save, make_base, batch_for):
    one, other = save(kind, "one", 1), save(kind, "other", 2)
    model, expected = load(make_base, one), load(make_base, other)
    prompt = batch_for()["input_ids"]
    how = {"max_new_tokens": 8, "do_sample": False}
    model.generate(input_ids=prompt, **how)  # layers hold what they made for it
    hotswap_adapter(model, other, "default", torch_device="cpu")
    found = model.generate(input_ids=prompt, **how)
    assert torch.equal(found, expected.generate(input_ids=prompt, **how))


def test_ranks_and_what_is_saved_in_full_may_differ_in_values(kind, save, make_base, logits_of):
    fields = {"modules_to_save": ["lm_head"]}
    one, other = save(kind, "one", 1, r=4, **fields), save(kind, "other", 2, r=2, **fields)
    model, expected = load(make_base, one), load(make_base, other)
    hotswap_adapter(model, other, "default", torch_device="cpu")
    assert torch.equal(logits_of(model), logits_of(expected))


def test_a_trained_adapter_stays_trainable(save, make_base):
    one, other = save("LRQAT", "one", 1), save("LRQAT", "other", 2)
    model = load(make_base, one, is_trainable=True).train()
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hotswap_adapter(model, other, "default", torch_device="cpu")
    assert model.training
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # An optimizer that holds them goes on.
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_a_second_adapter_is_left_alone(kind, save, make_base, logits_of):
    one, other = save(kind, "one", 1), save(kind, "other", 2)
    model = load(make_base, one)
    model.load_adapter(one, "kept")
    hotswap_adapter(model, other, "default", torch_device="cpu")
    assert set(model.peft_config) == {"default", "kept"}
    assert torch.equal(logits_of(model), logits_of(load(make_base, other)))
    model.set_adapter("kept")
    assert torch.equal(logits_of(model), logits_of(load(make_base, one)))


def test_a_compiled_model_is_not_compiled_again(save, make_base, batch_for):
    one, other = save("LRQAT", "one", 1), save("LRQAT", "other", 2)
    model, expected = load(make_base, one), load(make_base, other)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    batch = batch_for()
    with torch.no_grad():
        compiled(**batch)
        hotswap_adapter(compiled, other, "default", torch_device="cpu")
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(**batch).logits
        assert torch.equal(found, expected(**batch).logits)
    torch._dynamo.reset()


def refusals():
    return [
        ("missing", {}, "there is no adapter `missing` to swap; loaded are `default`"),
        ("merged", {}, "the adapter `default` is merged; call unmerge_adapter"),
        ("layers", {"target_modules": ["up_proj"]}, "have different layers: only one of them has"),
        ("damaged", {}, "damaged|not whole|checksum|digest"),
        ("type", {}, "of type LRQAT and the saved one of type LORAQUANT"),
    ]


@pytest.mark.parametrize(("case", "fields", "message"), refusals(), ids=[r[0] for r in refusals()])
def test_a_refused_swap_changes_nothing(case, fields, message, save, make_base, logits_of):
    one = save("LRQAT", "one", 1, target_modules=["q_proj", "up_proj"])
    kind = "LORAQUANT" if case == "type" else "LRQAT"
    other = save(kind, "other", 2, **{"target_modules": ["q_proj", "up_proj"], **fields})
    model = load(make_base, one)
    before = logits_of(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if case == "merged":
        model.merge_adapter()
    if case == "damaged":
        file = f"{other}/adapter_model.safetensors"
        with open(file, "r+b") as opened:
            opened.seek(-5, 2)
            opened.write(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, other, "missing" if case == "missing" else "default")
    if case == "merged":
        model.unmerge_adapter()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)


def test_peft_itself_names_our_function(save, make_base):
    model = load(make_base, save("LRQAT", "one", 1))
    config = model.peft_config["default"]
    with pytest.raises(ValueError, match="from peft_lrqat import hotswap_adapter"):
        hotswap.check_hotswap_configs_compatible(config, config)


def test_adapters_of_others_are_swapped_by_peft(make_base, logits_of, tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
        get_peft_model(make_base(), config).save_pretrained(tmp_path / str(seed))
    model, expected = (PeftModel.from_pretrained(make_base(), tmp_path / str(s)) for s in (1, 2))
    hotswap.hotswap_adapter(model, str(tmp_path / "2"), "default", torch_device="cpu")
    torch.testing.assert_close(logits_of(model), logits_of(expected))
