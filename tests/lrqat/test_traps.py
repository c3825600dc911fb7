"""Traps of writing a PEFT tuner, one regression test each.

T1   PEFT casts a fresh scale to the base's dtype and back: it is no longer the frozen one.
T2   `low_cpu_mem_usage=True` puts new parameters on the meta device, also the frozen weight's.
T3   An offloaded weight is read as garbage: test_bad_input.py, `test_offloaded_weight`.
T4   PEFT holds every replaced module until the end: test_downcast.py,
     `test_original_weights_are_freed_one_by_one`.
T5   Plain autograd keeps three weight-sized tensors per layer for the backward pass.
T6   Autocast computes B @ A in bfloat16: other integers are merged than were trained.
T7   A base in another dtype than in training gives other integers: test_bad_input.py,
     `test_base_in_a_shorter_dtype_is_refused`.
T8   The frozen weight is rebuilt from the base before the adapter's own scale arrives.
T9   A quantised Linear is still an nn.Linear: test_bad_input.py, `test_module_of_another_kind`.
T10  `.half()` and `.to(dtype)` shorten scales: test_downcast.py, `test_casts_leave_...`.
T11  `prepare_model_for_kbit_training` upcasts the base, or freezes the adapter.
T12  `is_quantized=True` on the model breaks the Trainer.
T13  "all-linear" also selects Conv1D, and does not select the experts of a mixture.
T14  The gradient of the scales dwarfs that of the factors; clipped by one norm, it shortens
     their steps.
T15  One weight has one set of integers: test_model.py,
     `test_two_active_adapters_are_refused_...`.
"""

import logging

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers.pytorch_utils import Conv1D

from peft_lrqat.quant import quantized_codes
from peft_lrqat.trainer import clip_by_group, parameter_groups


def test_t1_fresh_scale_is_the_frozen_scale(make_base, make_config, dtype, lrqat_layers, tmp_path):
    config = make_config(scale_dtype="float32", range_estimator="lp")
    model = get_peft_model(make_base(dtype=dtype), config)
    model.add_adapter("second", make_config(scale_dtype="float32", range_estimator="lp"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(dtype=dtype), tmp_path)
    for layer in [*lrqat_layers(model).values(), *lrqat_layers(loaded).values()]:
        assert layer.base_layer.scale0.dtype == torch.float32
        assert all(
            torch.equal(scale, layer.base_layer.scale0) for scale in layer.lrqat_scale.values()
        )


def test_t2_frozen_weight_is_real_with_low_cpu_mem_usage(make_base, make_config, lrqat_layers):
    model = get_peft_model(make_base(), make_config(symmetric=False), low_cpu_mem_usage=True)
    reference = lrqat_layers(get_peft_model(make_base(), make_config(symmetric=False)))
    for name, layer in lrqat_layers(model).items():
        assert all(
            torch.equal(p, q)
            for p, q in zip(layer.base_layer.parameters(), reference[name].base_layer.parameters())
        )
        assert layer.lrqat_A["default"].is_meta


def test_t5_nothing_of_the_weights_size_is_kept_for_the_backward_pass(
    make_peft, batch_for, lrqat_layers
):
    model = make_peft()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(**batch_for()).loss
    frozen = {p.data_ptr() for p in model.parameters()}
    shapes = {(layer.out_features, layer.in_features) for layer in lrqat_layers(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    assert any(t.dtype == torch.int8 for t in kept)
    assert not [t for t in kept if tuple(t.shape) in shapes and t.data_ptr() not in frozen]
    loss.backward()


def test_t6_autocast_gives_the_same_integers(make_peft, disturb, lrqat_layers):
    layer = next(iter(lrqat_layers(disturb(make_peft())).values()))
    weight = layer.low_rank_weight("default")
    codes = quantized_codes(weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized_codes(weight), codes)
        product = weight.B @ weight.A
    assert product.dtype == torch.bfloat16  # what would have been rounded


def test_t8_trained_scale_does_not_touch_the_frozen_weight(
    make_base, make_peft, disturb, lrqat_layers, tmp_path
):
    model = disturb(make_peft())
    model.save_pretrained(tmp_path)
    loaded = lrqat_layers(PeftModel.from_pretrained(make_base(), tmp_path))
    for name, layer in lrqat_layers(model).items():
        assert not torch.equal(layer.lrqat_scale["default"], layer.base_layer.scale0)
        assert torch.equal(loaded[name].lrqat_scale["default"], layer.lrqat_scale["default"])
        assert torch.equal(loaded[name].base_layer.phi, layer.base_layer.phi)
        assert torch.equal(loaded[name].base_layer.scale0, layer.base_layer.scale0)


def test_t11_prepare_model_for_kbit_training_is_not_for_this(make_base, make_peft, lrqat_layers):
    """Documents what PEFT does.

    Called before, it makes the base float32; called after, it leaves nothing to train.
    """
    base = prepare_model_for_kbit_training(
        make_base(dtype=torch.bfloat16), use_gradient_checkpointing=False
    )
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    model = make_peft(dtype=torch.bfloat16)
    codes = {name: layer.quantized_codes() for name, layer in lrqat_layers(model).items()}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(layer.quantized_codes(), codes[name])
        for name, layer in lrqat_layers(model).items()
    )


def test_t12_is_quantized_is_not_for_this(make_peft, tmp_path):
    """Documents what transformers does.

    The flag promises an `hf_quantizer`; without one, no Trainer starts.
    """
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    model = make_peft()
    assert not getattr(model, "is_quantized", False)
    transformers.Trainer(model=model, args=args)
    model.base_model.model.is_quantized = True
    with pytest.raises(AttributeError, match="hf_quantizer"):
        transformers.Trainer(model=model, args=args)


def test_t13_conv1d_is_trained_and_experts_are_reported(
    make_peft, make_config, lrqat_layers, caplog
):
    layers = lrqat_layers(make_peft("gpt2"))
    assert len(layers) == 8
    assert all(layer.base_layer.is_conv1d for layer in layers.values())
    assert isinstance(make_peft("gpt2").merge_and_unload().transformer.h[0].attn.c_attn, Conv1D)
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = transformers.MixtralForCausalLM(config)
    experts = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    assert len(experts) == 2
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(model, make_config())
    assert (
        "2 expert weights stay as they are, for example `model.layers.0.mlp.experts." in caplog.text
    )
    assert all(p is model.base_model.model.get_parameter(name) for name, p in experts.items())


def test_t14_the_step_of_the_factors_does_not_depend_on_the_scales(make_peft, batch_for):
    """The gradient of the scales is far larger.

    One norm for all groups would shorten the steps of the factors.
    """

    def gradients(clip, louder):
        torch.manual_seed(0)
        model = make_peft(init_weights=False)
        model(**batch_for()).loss.backward()
        groups = {group["name"]: group for group in parameter_groups(model, lr=1e-3, scale_lr=1e-5)}
        for parameter in groups["scales"]["params"]:
            parameter.grad *= louder
        norms = clip(groups.values())
        assert [group["lr"] for group in groups.values()] == [1e-3, 1e-3, 1e-5]
        return norms, [p.grad for name in ("A", "B") for p in groups[name]["params"]]

    def by_one_norm(groups):
        return torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 0.1)

    def by_group(groups):
        return clip_by_group(groups, 0.1)

    make_peft()  # the first call draws the weights of the base model
    norms, factors = gradients(by_group, louder=1)
    assert norms["scales"] > 10 * max(norms["A"], norms["B"]) > 0
    _, louder = gradients(by_group, louder=1000)
    assert all(torch.equal(a, b) for a, b in zip(factors, louder))
    shortened = [gradients(by_one_norm, louder)[1] for louder in (1, 1000)]
    assert all(b.norm() < 0.01 * a.norm() for a, b in zip(*shortened))
