"""Two learning rates in an unmodified Trainer, and in TRL's."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_lrqat.trainer import LRQATOptimizerFactory, parameter_groups


RATES = {"lr": 1e-3, "scale_lr": 1e-5}


def dataset(rows=8, length=10):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **fields):
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 7.0,  # not used by the factory: it would be seen
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return {"output_dir": str(folder), **defaults, **fields}


def run(model, folder, rates, **fields):
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments(folder, **fields)),
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, rates),
    )
    trainer.train()
    return trainer


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lrqat_" in name}


def largest_move(before, after, kind):
    return max((after[name] - tensor).abs().max() for name, tensor in before.items() if f".{kind}." in name)


def test_groups_hold_every_trainable_parameter_once(make_peft):
    model = make_peft("classifier")
    others, scales = parameter_groups(model, **RATES, weight_decay=0.1, scale_weight_decay=0.2)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(".lrqat_scale." in names[id(p)] for p in scales["params"])
    assert not any(".lrqat_scale." in names[id(p)] for p in others["params"])
    assert any("score" in names[id(p)] for p in others["params"])
    listed = [id(p) for p in others["params"] + scales["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.1)
    assert (scales["lr"], scales["weight_decay"]) == (1e-5, 0.2)


def test_groups_without_scales_or_without_factors(make_base, make_peft):
    (group,) = parameter_groups(get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])), **RATES)
    assert group["lr"] == 1e-3
    model = make_peft()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lrqat_scale." in name)
    (group,) = parameter_groups(model, **RATES)
    assert group["lr"] == 1e-5


def test_plain_trainer_uses_two_groups(make_peft, tmp_path):
    model, rates = make_peft(), {**RATES, "betas": (0.8, 0.9), "eps": 1e-12}
    before = adapter(model)
    trainer = run(model, tmp_path, rates)
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate wraps it
        optimizer = optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-12 for group in optimizer.param_groups)
    assert rates == {**RATES, "betas": (0.8, 0.9), "eps": 1e-12}
    after = adapter(trainer.model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainer.state.global_step == 3


def test_first_step_is_as_long_as_the_rate(make_peft, tmp_path):
    """Adam's first step has the length of the learning rate wherever the gradient is not zero."""
    model = make_peft()
    before = adapter(model)
    after = adapter(run(model, tmp_path, {**RATES, "eps": 1e-12}, max_steps=1).model)
    assert largest_move(before, after, "lrqat_B") == pytest.approx(1e-3, rel=1e-4)
    # Scales of 1e-2 resolve a step of 1e-5 to their own rounding.
    assert largest_move(before, after, "lrqat_scale") == pytest.approx(1e-5, rel=1e-3)
    assert largest_move(before, after, "lrqat_A") == 0  # B is zero still


@pytest.mark.parametrize("still", ["lr", "scale_lr"])
def test_rate_of_zero_stands_still(still, make_peft, tmp_path):
    model = make_peft()
    before = adapter(model)
    after = adapter(run(model, tmp_path, {**RATES, still: 0.0}).model)
    kinds = {"lr": ["lrqat_A", "lrqat_B"], "scale_lr": ["lrqat_scale"]}
    for name, moves in ((name, name != still) for name in kinds):
        assert all((largest_move(before, after, kind) > 0) == moves for kind in kinds[name])


def test_schedule_keeps_the_ratio(make_peft, tmp_path):
    trainer = run(make_peft(), tmp_path, RATES, lr_scheduler_type="linear", warmup_steps=1, max_steps=4)
    factors, scales = trainer.lr_scheduler.get_last_lr()
    assert scales == pytest.approx(factors / 100)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(logged) == pytest.approx(1e-3)


def test_resumed_is_uninterrupted(make_peft, tmp_path):
    """Bit for bit, with both groups' state."""
    whole = adapter(run(make_peft(), tmp_path / "whole", RATES, max_steps=4).model)
    torch.manual_seed(0)
    run(make_peft(), tmp_path / "parts", RATES, max_steps=4, save_strategy="steps", save_steps=2)
    model = make_peft()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments(tmp_path / "rest", max_steps=4)),
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, RATES),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    rest = adapter(trainer.model)
    assert all(torch.equal(rest[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("value", [-1e-3, float("nan"), -float("inf")])
@pytest.mark.parametrize("name", ["lr", "scale_lr"])
def test_bad_rate_is_refused(name, value, make_peft):
    with pytest.raises(ValueError, match=f"`{name}` must be a learning rate of at least 0, but is {value}"):
        LRQATOptimizerFactory()(make_peft(), **{**RATES, name: value})


def test_both_rates_must_be_given(make_peft):
    with pytest.raises(TypeError, match="scale_lr"):
        LRQATOptimizerFactory()(make_peft(), lr=1e-3)
    with pytest.raises(TypeError, match="momentum"):
        LRQATOptimizerFactory()(make_peft(), **RATES, momentum=0.9)


def test_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"no trainable parameters; wrap it with get_peft_model\(model, LRQATConfig"):
        LRQATOptimizerFactory()(nn.Linear(2, 2).requires_grad_(False), **RATES)


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_of_trl(make_base, make_config, tmp_path):
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    processing_class = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    from datasets import Dataset

    rows = [" ".join(f"w{3 + (7 * i + j) % 93}" for j in range(12)) for i in range(8)]
    trainer = trl.SFTTrainer(
        model=make_base(),
        args=trl.SFTConfig(**arguments(tmp_path, max_steps=2), max_length=16, bf16=False, dataset_num_proc=None),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=processing_class,
        peft_config=make_config(),
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, RATES),
    )
    before = adapter(trainer.model)
    trainer.train()
    after = adapter(trainer.model)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-5]
    assert largest_move(before, after, "lrqat_B") > 0
    assert 0 < largest_move(before, after, "lrqat_scale") < 1e-4
    trainer.save_model(str(tmp_path / "adapter"))
    assert "import peft_lrqat" in (tmp_path / "adapter" / "README.md").read_text()
