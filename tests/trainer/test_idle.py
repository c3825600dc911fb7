"""Target layers that training never reaches are named after the first step."""

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_lrqat import LRQATConfig
from peft_lrqat.trainer import LRQATCallback
from peft_lrqat.trainer.idle import idle_layers


class Idle(nn.Module):
    """Three layers: one is called, one is read, one is there."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.idle = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, labels=None):
        y = self.called(x) + x @ self.read.weight.T
        return {"loss": (y - labels).square().mean(), "logits": y}


def wrapped():
    config = LRQATConfig(target_modules=["called", "read", "idle"], r=2, range_estimator="minmax")
    return get_peft_model(Idle(), config)


def test_layers_without_a_gradient_are_found():
    model = wrapped()
    assert idle_layers(model) == []  # before the first backward pass nobody has one
    model(torch.randn(3, 8), labels=torch.zeros(3, 8))["loss"].backward()
    assert idle_layers(model) == ["idle"]
    model.requires_grad_(False)
    assert idle_layers(model) == []


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_trainer_names_them_once(accumulated, args_in, tmp_path, caplog):
    rows = [{"x": torch.randn(8), "labels": torch.zeros(8)} for _ in range(8)]
    args = args_in(
        tmp_path, transformers.TrainingArguments, gradient_accumulation_steps=accumulated
    )
    trainer = transformers.Trainer(model=wrapped(), args=args, train_dataset=rows)
    LRQATCallback.attach(trainer)
    trainer.train()
    assert caplog.text.count("no gradient reached `idle` in the first step") == 1


def test_a_model_that_uses_all_its_layers_gets_no_word(lrqat_trainer, caplog):
    lrqat_trainer().train()
    assert "no gradient reached" not in caplog.text
