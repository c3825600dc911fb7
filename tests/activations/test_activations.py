"""Weights and activations quantised together, against rounding by hand.

Every path rounds its inputs, merging is exact, and nothing changes where the setting is off.
"""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat.activations import hooks
from peft_lrqat.activations.hooks import InputQuantization
from peft_lrqat.quant import Grid, quantized_tokens


FIELDS = {
    "A8": {"activation_bits": 8},
    "A4": {"activation_bits": 4},
    "A4-symmetric": {"activation_bits": 4, "activation_symmetric": True},
}


@pytest.fixture(params=FIELDS.values(), ids=FIELDS)
def fields(request):
    return request.param


def rounded_by_hand(model, lrqat_layers, grid):
    """Puts the adapter's weights into a plain model whose hooks round the input of every target."""
    plain = copy.deepcopy(model).merge_and_unload()
    for name in lrqat_layers(model):
        linear = plain.get_submodule(name.removeprefix("base_model.model."))
        linear._forward_pre_hooks.clear()
        linear.register_forward_pre_hook(
            lambda module, inputs: (quantized_tokens(inputs[0], grid),)
        )
    return plain


def test_every_target_sees_rounded_tokens(
    architecture, dtype, fields, make_peft, disturb, lrqat_layers, logits_of
):
    model = disturb(make_peft(architecture, dtype, **fields))
    grid = model.peft_config["default"].activation_grid
    expected = logits_of(rounded_by_hand(model, lrqat_layers, grid), architecture)
    assert torch.equal(logits_of(model, architecture), expected)
    assert not torch.equal(
        expected, logits_of(disturb(make_peft(architecture, dtype)), architecture)
    )


def test_merged_is_trained_bit_for_bit(
    architecture, dtype, fields, make_peft, disturb, logits_of, batch_for
):
    model = disturb(make_peft(architecture, dtype, **fields))
    trained = logits_of(model, architecture)
    with torch.enable_grad():
        assert torch.equal(model(**batch_for(architecture)).logits.detach(), trained)
    model.merge_adapter()
    assert torch.equal(logits_of(model, architecture), trained)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model, architecture), trained)
    plain = model.merge_and_unload()
    assert all(type(m) in (nn.Linear, Conv1D) for m in plain.modules() if m._forward_pre_hooks)
    assert torch.equal(logits_of(plain, architecture), trained)
    assert torch.equal(logits_of(copy.deepcopy(plain), architecture), trained)


def test_without_the_adapter_activations_stay(make_peft, disturb, logits_of):
    model, weights_only = disturb(make_peft(activation_bits=4)), disturb(make_peft())
    with model.disable_adapter(), weights_only.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(weights_only))


def test_autocast_merges_exactly(make_peft, disturb, logits_of):
    model = disturb(make_peft(activation_bits=8))
    with torch.autocast("cpu", torch.bfloat16):
        trained = logits_of(model)
        model.merge_adapter()
        assert torch.equal(logits_of(model), trained)
        assert torch.equal(logits_of(model.merge_and_unload()), trained)


def test_merged_layer_lets_the_gradient_through(make_peft, batch_for):
    model = make_peft(activation_bits=4)
    model.merge_adapter()
    inputs = model.get_input_embeddings()(batch_for()["input_ids"]).detach()
    gradients = []
    for merged in (model, model.merge_and_unload()):
        leaf = inputs.clone().requires_grad_()
        merged(inputs_embeds=leaf, labels=batch_for()["labels"]).loss.backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_merging_says_once_what_saving_leaves_out(make_peft, caplog):
    hooks.logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # cached at run time
    with caplog.at_level("WARNING"):
        make_peft(activation_bits=8).merge_and_unload()
        make_peft(activation_bits=8).merge_and_unload()
    assert caplog.text.count("`save_pretrained` writes its weights alone") == 1


def test_off_is_the_same_model_and_leaves_no_trace(make_peft, lrqat_layers):
    model = make_peft()
    assert all(layer.activations == {"default": None} for layer in lrqat_layers(model).values())
    plain = model.merge_and_unload()
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert not any("key_value_grids" in vars(module) for module in plain.modules())
    assert plain.config._attn_implementation == "sdpa"


def test_each_adapter_has_its_own(make_peft, make_config, disturb, logits_of):
    model = disturb(make_peft(activation_bits=8))
    names = [name for name, _ in model.named_parameters() if ".default" in name]
    factors = [model.get_parameter(name) for name in names]
    alone = {8: logits_of(model)}
    for name, bits in (("four", 4), ("none", None)):
        model.add_adapter(name, make_config(activation_bits=bits))
        for own, other in zip(names, factors, strict=True):
            model.get_parameter(own.replace(".default", f".{name}")).data.copy_(other.data)
        fresh = make_peft(activation_bits=bits)
        for own, other in zip(names, factors, strict=True):
            fresh.get_parameter(own).data.copy_(other.data)
        alone[bits] = logits_of(fresh)
    for name, bits in (("four", 4), ("none", None), ("default", 8)):
        model.set_adapter(name)
        assert torch.equal(logits_of(model), alone[bits])
    model.delete_adapter("default")
    model.set_adapter("four")
    assert torch.equal(logits_of(model), alone[4])


def test_saved_and_loaded(make_peft, make_base, disturb, logits_of, tmp_path):
    model = disturb(make_peft(activation_bits=4, activation_symmetric=True))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert loaded.peft_config["default"].activation_grid == Grid(bits=4)
    assert torch.equal(logits_of(loaded), logits_of(model))
    text = (tmp_path / "README.md").read_text()
    assert "inputs of these layers: 4 bits, symmetric" in text
    native = make_base()
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(native.eval()), logits_of(model))


def test_merged_model_can_be_pickled(make_peft, disturb, logits_of):
    plain = disturb(make_peft(activation_bits=8, kv_cache_bits=4)).merge_and_unload()
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    assert torch.equal(logits_of(torch.load(buffer, weights_only=False)), logits_of(plain))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kv_cache_bits", [None, 4])
def test_gradient_checkpointing_changes_no_gradient(
    use_reentrant, kv_cache_bits, make_peft, disturb, batch_for
):
    model = disturb(make_peft(activation_bits=8, kv_cache_bits=kv_cache_bits)).train()

    def gradients():
        model.zero_grad()
        model(**batch_for()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(g.abs().max() > 0 for g in plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_graph_when_compiled(implementation, make_base, make_config, batch_for):
    base = make_base()
    base.set_attn_implementation(implementation)
    model = get_peft_model(base, make_config(activation_bits=8, kv_cache_bits=4)).train()
    losses = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = run(**batch_for()).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)


def test_training_lowers_the_loss_it_sees(make_peft, batch_for):
    model = make_peft(bits=3, activation_bits=4, kv_cache_bits=4).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(20):
        loss = model(**batch_for()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_hook_is_a_named_class(make_peft):
    plain = make_peft(activation_bits=8).merge_and_unload()
    hooks = [hook for module in plain.modules() for hook in module._forward_pre_hooks.values()]
    assert {type(hook) for hook in hooks} == {InputQuantization}
