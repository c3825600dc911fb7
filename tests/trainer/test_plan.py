"""A plan, made from a configuration alone, has the bytes of the real model."""

import json

import pytest
import torch
from commands_at_work import refusal
from mixtures import MIXTURES, experts_of, make_mixture, tokens
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BertConfig

from peft_lrqat import LRQATConfig, LRQATLayer, deployed_weight_bytes, target_weight_bytes
from peft_lrqat.cli import main
from peft_lrqat.trainer import plan as planning
from peft_lrqat.trainer.plan import make_plan


ARCHITECTURES = ["llama", "mistral", "qwen2", "gemma", "gpt2", "opt"]
SETTINGS = [
    {"bits": 4},
    {"bits": 3, "downcast": "int"},
    {"bits": 2, "symmetric": False, "group_size": 16, "downcast": "int"},
    {"bits": 4, "group_size": 16, "r": 8, "downcast": "bf16", "scale_dtype": "float32"},
]


@pytest.fixture
def stored(make_base, tmp_path):
    """``stored(architecture)``: a model, saved."""

    def make(architecture="llama"):
        folder = tmp_path / architecture
        make_base(architecture, torch.bfloat16).save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "fields", SETTINGS, ids=lambda f: "-".join(f"{k}{v}" for k, v in f.items())
)
def test_bytes_are_those_of_the_model(architecture, fields, stored, make_config):
    folder = stored(architecture)
    plan = make_plan(folder, make_config(architecture, **fields), tokens=16)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert plan.plain == sum(p.numel() * p.element_size() for p in base.parameters())
    model = get_peft_model(base, make_config(architecture, **fields))
    layers = [m for m in model.modules() if isinstance(m, LRQATLayer)]
    assert plan.weights == sum(m.in_features * m.out_features for m in layers)
    assert plan.frozen == target_weight_bytes(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert plan.trainable == sum(p.numel() for p in trainable)
    assert plan.adapter == sum(p.numel() * p.element_size() for p in trainable)
    low_bit = {id(p) for m in layers for p in m.base_layer.parameters(recurse=False)}
    biases = {id(m.base_layer.bias) for m in layers if m.base_layer.bias is not None}
    others = [
        p
        for p in model.parameters()
        if not p.requires_grad and (id(p) not in low_bit or id(p) in biases)
    ]
    assert plan.others == sum(p.numel() * p.element_size() for p in others)
    if "float32" not in fields.values():
        assert plan.shipped["packed"] == deployed_weight_bytes(model) + plan.others


@pytest.mark.parametrize("fields", [{}, {"group_size": 16}], ids=["per row", "groups"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma"])
def test_what_is_kept_is_what_a_real_step_keeps(architecture, fields, stored, make_config):
    folder = stored(architecture)
    config = make_config(architecture, bits=4, **fields)
    ids = torch.randint(3, 96, (4, 32))
    plan = make_plan(folder, config, tokens=32, batch=4)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model = get_peft_model(base, config).train()
    kept = planning._Kept(model)
    with saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    assert plan.kept == pytest.approx(kept.bytes, rel=0.05)


def test_parts_of_what_is_kept(stored, make_config):
    found = make_plan(stored(), make_config(bits=4), tokens=32, batch=2)
    assert found.block_inputs == 2 * (2 * 32 * 32 * 2)  # blocks x (rows, tokens, bfloat16)
    # The first block keeps a little less: nothing before it is trained.
    assert found.kept_outside + 1.5 * found.kept_block < found.kept
    assert found.kept <= found.kept_outside + 2 * found.kept_block
    assert found.activations(checkpointing=False) == found.kept + found.loss
    assert found.activations(checkpointing=True) == found.block_inputs + max(
        found.kept_outside + found.loss, found.kept_block
    )
    assert found.loss == 2 * 4 * 2 * 32 * 96  # gradients, float32, rows, tokens, vocabulary
    longer = make_plan(stored(), make_config(bits=4), tokens=64, batch=2)
    assert longer.kept == pytest.approx(2 * found.kept, rel=0.01)
    assert longer.held == found.held


def test_the_command(stored, capsys):
    folder = stored()
    command = ["plan", "--model", folder, "--bits", "3", "--group_size", "16", "--tokens", "32"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak"] > found["peak_checkpointed"] > found["frozen"]
    assert "must be a multiple of 32 for gguf" in found["shipped"]["gguf"]
    assert main([*command, "--memory", "24"]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM, 15,360 weights at 3 bits, symmetric, groups of 16" in shown
    assert [line.split()[-2:] for line in shown.splitlines() if line.startswith("fits 24 GB")] == [
        ["yes", "yes"]
    ]
    assert main([*command, "--memory", "0.001"]) == 0
    assert "fits 0.001 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--devices", "0"], "--devices must be at least 1"),
        (["--group_size", "7"], "group_size"),
        (["--bits", "1"], "bits"),
    ],
)
def test_what_plan_refuses(options, message, stored, capsys):
    assert message in refusal(capsys, ["plan", "--model", stored(), *options])


def test_a_model_that_predicts_no_next_token(tmp_path, capsys):
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "plan: error" in refusal(capsys, ["plan", "--model", tmp_path])


def experts_config(**fields):
    settings = {"target_modules": "all-linear", "target_parameters": "all-experts", "r": 4}
    return LRQATConfig(task_type="CAUSAL_LM", **{**settings, **fields})


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    "fields", [{}, {"group_size": 8, "downcast": "int", "experts_share_a": True}], ids=str
)
def test_experts_are_counted(name, fields, tmp_path):
    make_mixture(name, torch.bfloat16).save_pretrained(tmp_path)
    plan = make_plan(str(tmp_path), experts_config(**fields), tokens=24, batch=2)
    fused = name in ("mixtral", "qwen3_moe", "olmoe")  # the attention of the others is another one
    way = {"attn_implementation": "sdpa"} if fused else {}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **way)
    model = get_peft_model(base, experts_config(**fields)).train()
    assert plan.frozen == target_weight_bytes(model)
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.plain_experts == 0
    if not fused:
        return
    kept, ids = planning._Kept(model), tokens(2, 24)
    with saved_tensors_hooks(kept.keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    assert plan.kept == pytest.approx(kept.bytes, rel=0.1)


def test_experts_that_stay_plain_are_named_with_their_size(tmp_path, capsys):
    model = make_mixture("qwen3_moe", torch.bfloat16)
    model.save_pretrained(tmp_path)
    plain = 2 * sum(p.numel() for e in experts_of(model) for p in e.parameters())
    command = ["plan", "--model", str(tmp_path), "--tokens", "16"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plain_experts"] == plain
    assert main(command) == 0
    assert "those of experts: --target_parameters all-experts" in capsys.readouterr().out
    assert main([*command, "--target_parameters", "all-experts"]) == 0
    assert "those of experts" not in capsys.readouterr().out


def test_several_devices_share_all_but_the_activations(stored, make_config, capsys):
    plan = make_plan(stored(), make_config(bits=4), tokens=32)
    shared = plan.frozen + plan.others + plan.training_state
    assert plan.peak_of_each(1, False) == plan.peak(False)
    for devices in (2, 4):
        alone = plan.peak_of_each(devices, True) - plan.activations(True) - planning.WORKSPACE
        assert alone == -(-shared // devices) + min(2 * plan.unit, shared)
    assert main(["plan", "--model", stored(), "--devices", "4", "--tokens", "32"]) == 0
    assert "peak of each of 4, FSDP2" in capsys.readouterr().out


def test_the_largest_unit(stored, make_config):
    config = make_config(bits=4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stored()), config)
    blocks = model.base_model.model.model.layers
    inside = {id(p) for p in blocks.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    sizes = [sum(p.numel() * p.element_size() for p in b.parameters()) for b in blocks]
    sizes += [sum(p.numel() * p.element_size() for p in outside)]
    assert make_plan(stored(), config, tokens=16).unit == max(sizes)


def test_formats_that_do_not_hold_a_mixture_say_so(tmp_path):
    found = {}
    different = {"qwen3_moe": {"norm_topk_prob": True}, "gpt_oss": {"intermediate_size": 64}}
    for name in ("mixtral", "qwen3_moe", "gpt_oss"):
        fields = different.get(name, {})
        make_mixture(name, torch.bfloat16, **fields).save_pretrained(tmp_path / name)
        found[name] = make_plan(str(tmp_path / name), experts_config(), tokens=8).shipped
        assert isinstance(found[name]["packed"], int)
    for name in ("mixtral", "qwen3_moe"):
        assert isinstance(found[name]["compressed-tensors"], int)
    assert isinstance(found["qwen3_moe"]["gguf"], int)
    assert "not as one linear layer for each" in found["gpt_oss"]["compressed-tensors"]
    assert "GGUF is written for" in found["gpt_oss"]["gguf"]


def test_formats_that_need_one_width_for_all_say_so(tmp_path):
    make_mixture("mixtral", torch.bfloat16).save_pretrained(tmp_path)
    config = experts_config(group_size=8, bits_pattern={"experts.down_proj": 3})
    found = make_plan(str(tmp_path), config, tokens=8).shipped
    assert "with one group size and the width of all layers" in found["compressed-tensors"]
    some = experts_config(group_size=8, target_parameters=["experts.down_proj"])
    found = make_plan(str(tmp_path), some, tokens=8).shipped
    assert "experts.0.gate_up_proj` stays plain" in found["compressed-tensors"]
