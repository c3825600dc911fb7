"""While an adapter is merged, its weights are parameters under their own names."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitConfig, LRQATConfig


def synced(model):
    """What TRL's `VLLMGeneration._iter_named_params` sends to vLLM, by its rules."""
    found = {}
    model.merge_adapter()
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in name or "original_module" in name:
            continue
        found[name.replace("modules_to_save.default.", "")] = parameter.data.clone()
    model.unmerge_adapter()
    return found


FIELDS = {
    "symmetric": {},
    "asymmetric": {"symmetric": False, "group_size": 16, "downcast": "int"},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_weight_sync_gets_the_plain_model(architecture, fields, make_peft, make_base, disturb):
    if architecture != "llama" and "modules_to_save" in fields:
        pytest.skip("the head is tied")
    model = disturb(make_peft(architecture, **fields)).eval()
    before = [name for name, _ in model.named_parameters()]
    state = model.state_dict()
    found = synced(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert model.state_dict().keys() == state.keys()
    plain = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert found.keys() == dict(make_base(architecture).named_parameters()).keys()
    for name, weight in found.items():
        assert torch.equal(weight, plain[name.replace("modules_to_save.default.", "")]), name


def test_the_list_is_that_of_lora(make_peft, make_base):
    lora = get_peft_model(make_base(), LoraConfig(target_modules="all-linear"))
    assert synced(make_peft()).keys() == synced(lora).keys()


def test_while_merged_the_state_is_the_same(make_peft, disturb, logits_of):
    model = disturb(make_peft(symmetric=False)).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = logits_of(model)
    model.merge_adapter()
    merged = model.state_dict()
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
    assert model.load_state_dict(state).missing_keys == []
    copied = copy.deepcopy(model)
    assert torch.equal(logits_of(copied), logits_of(model))
    copied.unmerge_adapter()
    assert torch.equal(logits_of(copied), wanted)
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("q_proj"))
    assert model.get_parameter(f"{name}.base_layer.weight").shape == (32, 32)
    model.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    model.unmerge_adapter()
    for kind in ("phi", "scale0", "zero_point"):
        assert torch.equal(getattr(layer.base_layer, kind), state[f"{name}.base_layer.{kind}"])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # tied or not
def test_low_bit_embeddings_are_sent_as_plain_ones(
    architecture, make_base, disturb, logits_of, tmp_path
):
    make_base(architecture).save_pretrained(tmp_path)
    settings = LowBitConfig(bits=4, embedding_bits=4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    config = LRQATConfig(target_modules="all-linear", train_embeddings=True, r=2)
    model = disturb(get_peft_model(base, config)).eval()
    before, wanted = [name for name, _ in model.named_parameters()], logits_of(model)
    found = synced(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert torch.equal(logits_of(model), wanted)
    model.merge_adapter()
    assert model.load_state_dict(model.state_dict()).missing_keys == []
    model.unmerge_adapter()
    assert found.keys() == dict(make_base(architecture).named_parameters()).keys()
