"""What is trained is saved with the checkpoint and the adapter, or training is refused."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from peft_lrqat.shared.saved import check_trained_is_saved, unsaved_parameters
from peft_lrqat.trainer import LRQATOptimizerFactory


def unfreeze(model, part):
    """Unfreezes what has ``part`` in its name; the names."""
    names = [name for name, p in model.named_parameters() if part in name and not p.requires_grad]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


@pytest.mark.parametrize(
    ("architecture", "part", "way"),
    [
        ("llama", "layers.1.input_layernorm", r"`modules_to_save=\['input_layernorm'\]`"),
        ("llama", "embed_tokens", r"`modules_to_save=\['embed_tokens'\]`"),
        ("llama", "lm_head", r"`modules_to_save=\['lm_head'\]`"),
        ("gpt2", "h.0.attn.c_attn.base_layer.bias", "leave their layers out of `target_modules`"),
    ],
)
def test_parameters_that_the_user_unfroze_are_refused(
    architecture, part, way, make_peft, lrqat_trainer
):
    model = make_peft(architecture)
    names = unfreeze(model, part)
    assert len(names) == 1
    trainer = lrqat_trainer(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"`{names[0]}` are trained, but neither .*{way}"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    model.get_parameter(names[0]).requires_grad_(False)
    trainer.train()


def test_an_unmodified_trainer_with_the_factory_refuses_them_too(make_peft, lrqat_args, token_rows):
    model = make_peft()
    unfreeze(model, "norm")
    trainer = transformers.Trainer(
        model=model,
        args=lrqat_args(transformers.TrainingArguments),
        train_dataset=token_rows(),
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, {"lr": 1e-3, "scale_lr": 1e-5}),
    )
    with pytest.raises(ValueError, match="and 2 more are trained, but neither"):
        trainer.train()


def test_saving_refuses_them_before_anything_is_written(make_peft, tmp_path):
    """Also outside of a trainer."""
    model = make_peft()
    unfreeze(model, "input_layernorm")
    with pytest.raises(ValueError, match=r"neither a .*`modules_to_save=\['input_layernorm'\]`"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_embeddings_that_are_saved_on_request_are_not_lost(make_peft, tmp_path):
    model = make_peft()
    unfreeze(model, "embed_tokens")
    with pytest.raises(ValueError, match="embed_tokens"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    model.save_pretrained(tmp_path, True, None, True)


def test_a_model_that_transformers_holds_refuses_them_too(make_base, make_config, tmp_path):
    model = make_base()
    model.add_adapter(make_config())
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"`model.norm.weight` are trained"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_to_save_are_resumed_and_loaded(
    make_peft, make_base, lrqat_trainer, trained_tensors, logits_of, tmp_path
):
    """The way out that the message gives."""

    def trainer(folder, **fields):
        model = make_peft(modules_to_save=["input_layernorm"])
        return lrqat_trainer(model, max_steps=4, learning_rate=1e-2, output_dir=folder, **fields)

    whole = trainer(str(tmp_path / "whole"), save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = trained_tensors(whole.model)
    assert sum("norm" in name for name in expected) == 2
    found = trained_tensors(resumed.model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "whole" / "checkpoint-4").eval()
    assert torch.equal(logits_of(loaded), logits_of(whole.model.eval()))


def test_a_head_that_is_partly_frozen_and_further_adapters_are_saved(make_peft, make_config):
    model = make_peft("classifier", modules_to_save=["norm"])
    model.add_adapter("second", make_config("classifier"))
    model.base_model.model.score.modules_to_save["default"].weight.requires_grad_(False)
    model.set_adapter("second")
    assert unsaved_parameters(model) == []


def test_resized_embeddings_are_saved_as_peft_saves_them(make_base, make_config, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path)
    base.name_or_path = str(tmp_path)
    base.resize_token_embeddings(100)
    model = get_peft_model(base, make_config())
    unfreeze(model, "embed_tokens")
    assert unsaved_parameters(model) == []


def test_other_models_are_left_alone(make_base):
    check_trained_is_saved(make_base().requires_grad_(True))
    check_trained_is_saved(get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM")))
