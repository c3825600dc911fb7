"""An optimizer that trains scales and factors at one rate gets one warning."""

import gc
import weakref

import pytest
import torch
import transformers

from peft_lrqat.lrqat import model as tuner
from peft_lrqat.lrqat import one_rate
from peft_lrqat.trainer import LRQATOptimizerFactory, LRQATTrainer, parameter_groups


RATES = {"lr": 1e-3, "scale_lr": 1e-5}


@pytest.fixture
def said(monkeypatch):
    """What is said, as if no optimizer had been seen in this process."""
    fresh = one_rate.OneRateWarning()
    monkeypatch.setattr(tuner, "one_rate", fresh)
    lines = []
    monkeypatch.setattr(one_rate.logger, "warning", lines.append)
    yield lines
    if fresh._hook is not None:
        fresh._hook.remove()


@pytest.fixture
def step(batch_for):
    def run(model, optimizer):
        model(**batch_for(model)).loss.backward()
        optimizer.step()

    return run


def test_a_plain_trainer_is_told_once_and_how(said, make_peft, lrqat_args, token_rows):
    for _ in range(2):
        transformers.Trainer(
            model=make_peft(),
            args=lrqat_args(transformers.TrainingArguments, learning_rate=3e-3),
            train_dataset=token_rows(),
        ).train()
    (line,) = said
    assert "trains the scales of LR-QAT at the learning rate of its factors, 0.003" in line
    assert "optimizer_cls_and_kwargs=(LRQATOptimizerFactory" in line
    assert "parameter_groups(model" in line


def test_what_the_warning_recommends_is_silent(said, make_peft, lrqat_args, token_rows, step):
    rows = token_rows()
    LRQATTrainer(model=make_peft(), args=lrqat_args(), train_dataset=rows).train()
    transformers.Trainer(
        model=make_peft(),
        args=lrqat_args(transformers.TrainingArguments, max_grad_norm=0),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, RATES),
    ).train()
    model = make_peft()
    step(model, torch.optim.AdamW(parameter_groups(model, **RATES)))
    assert said == []


def test_frozen_scales_and_other_models_are_no_reason(said, make_peft, step):
    model = make_peft()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        if ".lrqat_scale." in name:
            parameter.requires_grad_(False)
    step(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert said == []


def test_models_and_optimizers_are_not_kept(said, make_peft, step):
    model = make_peft()
    optimizer = torch.optim.AdamW(parameter_groups(model, **RATES))
    step(model, optimizer)
    kept = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [found() for found in kept] == [None, None]
