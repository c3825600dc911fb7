"""Models that accelerate spreads over devices: its hooks, on the one device that there is here."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitConfig, LRQATConfig


# A block of the model, a layer of another one, and everything else.
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1.self_attn": "cpu",
    "model.layers.1.mlp.gate_proj": "cpu",
    "model.layers.1.mlp.up_proj": "cpu",
    "model.layers.1.mlp.down_proj": "cpu",
    "model.layers.1.mlp.act_fn": "cpu",
    "model.layers.1.input_layernorm": "cpu",
    "model.layers.1.post_attention_layernorm": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(params=["plain", "low-bit"])
def load(request, make_base, tmp_path):
    """Loads the model: ``load()``, or ``load(spread=True)`` with hooks around its parts."""
    make_base("llama").save_pretrained(tmp_path / "model")
    config = LowBitConfig(bits=4, downcast="fixed8") if request.param == "low-bit" else None

    def make(spread=False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
        return dispatch_model(model, SPLIT, force_hooks=True) if spread else model

    return make


def adapt(base):
    torch.manual_seed(0)
    fields = {"target_modules": "all-linear", "r": 4, "init_weights": False}
    return get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", **fields))


def gradients(model):
    ids = torch.arange(10)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_spread_model_trains_as_one_on_a_device(load, monkeypatch):
    alone = gradients(adapt(load()))
    model = adapt(load(spread=True))
    called = []
    own = AlignDevicesHook.pre_forward

    def pre_forward(hook, module, *args, **kwargs):
        called.append(module)
        return own(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", pre_forward)
    spread = gradients(model)
    assert alone.keys() == spread.keys()
    assert all(torch.equal(alone[name], spread[name]) for name in alone)
    # A layer with an entry of its own in the device map keeps what accelerate does around it.
    block = model.base_model.model.model.layers[1]
    assert {block.mlp.gate_proj, block.self_attn, model.base_model.model.lm_head} <= set(called)


def test_saved_loaded_and_merged(load, tmp_path):
    model = adapt(load(spread=True)).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        trained = model(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load(spread=True), tmp_path / "adapter").eval()
        assert torch.equal(loaded(ids).logits, trained)
        assert torch.equal(model.merge_and_unload()(ids).logits, trained)


def test_offloaded_layers_are_refused(load):
    base = cpu_offload(load(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offload"):
        adapt(base)
