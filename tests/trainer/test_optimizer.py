"""Groups, rates and clipping, in `LRQATTrainer` and from the factory in an unmodified Trainer."""

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from peft_lrqat import CalibratedStart, LowBitConfig, LRQATLinear, calibrate_low_bit
from peft_lrqat.trainer import (
    LRQATOptimizerFactory,
    LRQATTrainer,
    LRQATTrainingArguments,
    clip_by_group,
    parameter_groups,
)
from peft_lrqat.trainer.arguments import OWN_GROUPS
from peft_lrqat.trainer.rates import setting_name


RATES = {"lr": 1e-3, "scale_lr": 1e-5}
FACTORS_AND_SCALES = ["A", "B", "scales"]


def plain(optimizer):
    while hasattr(optimizer, "optimizer"):  # accelerate wraps it
        optimizer = optimizer.optimizer
    return optimizer


def rates_of(optimizer):
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


@pytest.fixture
def factory_run(make_peft, lrqat_args, token_rows):
    """An unmodified Trainer with the factory, after training."""

    def run(options, model=None, callbacks=(), **fields):
        fields = {
            "learning_rate": 7.0,
            "max_grad_norm": 0.0,
            **fields,
        }  # the factory's rates count: 7.0 would be seen
        trainer = transformers.Trainer(
            model=model or make_peft(init_weights=False),
            args=lrqat_args(transformers.TrainingArguments, **fields),
            train_dataset=token_rows(),
            optimizer_cls_and_kwargs=(LRQATOptimizerFactory, options),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    return run


def largest_move(before, after, kind):
    return max(
        (after[name] - tensor).abs().max() for name, tensor in before.items() if f".{kind}." in name
    )


# Groups


def test_groups_hold_every_trainable_parameter_once(make_peft):
    model = make_peft("classifier")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    options = {"lr_A": 2e-3, "lr_B": 3e-3, "weight_decay": 0.1, "scale_weight_decay": 0.2}
    groups = parameter_groups(model, **RATES, **options)
    settings = [(g["name"], g["lr"], g["weight_decay"]) for g in groups]
    assert settings == [
        ("A", 2e-3, 0.1),
        ("B", 3e-3, 0.1),
        ("scales", 1e-5, 0.2),
        ("other", 1e-3, 0.1),
        ("other_no_decay", 1e-3, 0.0),
    ]
    assert all(group["initial_lr"] == group["lr"] for group in groups)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}
    for group, marker in (("A", ".lrqat_A."), ("B", ".lrqat_B."), ("scales", ".lrqat_scale.")):
        assert found[group] == [name for name in names.values() if marker in name]
    assert found["other"] == ["base_model.model.score.modules_to_save.default.weight"]
    assert found["other_no_decay"] == ["base_model.model.model.norm.weight"]
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}


def test_factors_take_the_common_rate_unless_they_have_their_own(make_peft):
    model = make_peft()
    assert [g["lr"] for g in parameter_groups(model, **RATES)] == [1e-3, 1e-3, 1e-5]
    assert [g["lr"] for g in parameter_groups(model, **RATES, lr_B=4e-3)] == [1e-3, 4e-3, 1e-5]


def test_empty_groups_are_left_out(make_base, make_peft):
    (group,) = parameter_groups(
        get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"])), **RATES
    )
    assert (group["name"], group["lr"]) == ("other", 1e-3)
    model = make_peft()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lrqat_scale." in name)
    (group,) = parameter_groups(model, **RATES)
    assert (group["name"], group["lr"]) == ("scales", 1e-5)


# Every optimizer of transformers

REFUSED = [name for name in OptimizerNames if name.value.startswith(OWN_GROUPS)]


@pytest.mark.parametrize("optim", [o.value for o in OptimizerNames if o not in REFUSED])
def test_every_optimizer_trains_every_group_at_its_rate(
    optim, lrqat_trainer, trained_tensors, step_logs
):
    rates = {"A": 1e-3, "B": 2e-3, "scales": 1e-6}
    fields = {
        "A_learning_rate": rates["A"],
        "B_learning_rate": rates["B"],
        "scale_learning_rate": rates["scales"],
    }
    trainer = lrqat_trainer(
        optim=optim, learning_rate=3e-3, max_steps=6, **fields
    )  # RAdam begins to move at the fifth
    try:
        trainer.create_optimizer()
    except (ImportError, ValueError) as error:  # transformers has both for what is not installed
        if not any(word in str(error).lower() for word in ("install", "import")):
            raise
        pytest.skip(f"{optim}: {error}")
    before = trained_tensors(trainer.model)
    trainer.train()
    assert rates_of(plain(trainer.optimizer)) == rates
    assert [
        {n: log[setting_name(n, "learning_rate")] for n in rates} for log in step_logs(trainer)
    ] == 6 * [rates]
    after = trained_tensors(trainer.model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@pytest.mark.parametrize("optim", [name.value for name in REFUSED])
def test_optimizers_with_groups_of_their_own_are_refused(optim, lrqat_args):
    with pytest.raises(
        ValueError, match=f"`optim` '{optim}' makes its own parameter groups.*such as 'adamw_torch'"
    ):
        lrqat_args(optim=optim)


def test_no_other_optimizer_makes_groups_of_its_own():
    from transformers import trainer_optimizer

    own = [*trainer_optimizer._GALORE_OPTIMIZERS, *trainer_optimizer._APOLLO_OPTIMIZERS]
    assert {*own, OptimizerNames.LOMO, OptimizerNames.ADALOMO} == set(REFUSED)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd"])
def test_schedule_free_optimizers_count_their_warm_up_in_steps(optim, lrqat_trainer):
    """They would read 0.1 as the length of the warm-up: a first step ten times too long."""
    pytest.importorskip("schedulefree")
    trainer = lrqat_trainer(optim=optim, warmup_steps=0.4, max_steps=5)
    trainer.train()
    assert [group["warmup_steps"] for group in trainer.optimizer.param_groups] == [2, 2, 2]


# Every schedule

SCHEDULES = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5, "threshold": 1.0, "min_lr": 1e-3},
    "greedy": {"patience": 0, "factor": 0.5, "smooth": False, "threshold": 1.0},
}


@pytest.mark.parametrize("schedule", [s.value for s in SchedulerType])
def test_every_schedule_keeps_the_ratio_of_the_rates(
    schedule, lrqat_trainer, token_rows, step_logs
):
    trainer = lrqat_trainer(
        options={"eval_dataset": token_rows(2)},
        max_steps=6,
        warmup_steps=2,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=SCHEDULES.get(schedule),
        learning_rate=4e-3,
        B_learning_rate=8e-3,
        scale_learning_rate=1e-5,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
    )
    trainer.train()
    logged = [
        [log[setting_name(name, "learning_rate")] for name in FACTORS_AND_SCALES]
        for log in step_logs(trainer)
    ]
    for factors, b, scales in logged:
        assert b == pytest.approx(2 * factors)
        assert scales == pytest.approx(factors / 400)
    peak = max(factors for factors, _, _ in logged)
    # GreedyLR may raise the rate while the loss falls; the others peak at the given rate.
    assert peak == pytest.approx(4e-3) or (schedule == "greedy" and peak > 4e-3)
    assert (len({a for a, _, _ in logged}) == 1) == (schedule == "constant")


def test_bounds_given_group_by_group_are_kept(lrqat_trainer, token_rows):
    bounds = [1e-3, 2e-3, 3e-5]
    fields = {
        "lr_scheduler_type": "greedy",
        "lr_scheduler_kwargs": {"min_lr": bounds},
        "eval_strategy": "steps",
    }
    trainer = lrqat_trainer(options={"eval_dataset": token_rows(2)}, **fields)
    trainer.create_optimizer_and_scheduler(3)
    assert trainer.lr_scheduler.min_lrs == bounds


# Clipping


def norm_of(gradients, marker):
    return (
        torch.stack([g.double().norm() for name, g in gradients.items() if marker in name])
        .norm()
        .item()
    )


MARKERS = {"A": ".lrqat_A.", "B": ".lrqat_B.", "scales": ".lrqat_scale."}


def test_each_group_is_clipped_by_its_own_norm():
    tensors = [torch.randn(6, 5), torch.randn(3), torch.randn(4, 4)]
    groups = [
        {"name": "large", "params": [nn.Parameter(t) for t in tensors[:2]]},
        {"params": [nn.Parameter(tensors[2])]},
    ]
    for parameter, gradient in zip([p for g in groups for p in g["params"]], tensors):
        parameter.grad = gradient.clone()
    groups[1]["params"][0].grad *= 1e-3
    small = groups[1]["params"][0].grad.clone()
    norms = clip_by_group(groups, 0.5)
    assert list(norms) == ["large", "1"]
    whole = torch.cat([t.flatten() for t in tensors[:2]]).norm()
    torch.testing.assert_close(norms["large"], whole)
    clipped = torch.cat([p.grad.flatten() for p in groups[0]["params"]])
    torch.testing.assert_close(
        clipped, torch.cat([t.flatten() for t in tensors[:2]]) * 0.5 / whole, rtol=1e-5, atol=0
    )
    assert clipped.norm() <= 0.5
    assert torch.equal(groups[1]["params"][0].grad, small)


def test_factors_have_a_limit_of_their_own():
    params = {name: nn.Parameter(torch.ones(4)) for name in ("A", "B", "scales", "other")}
    for parameter in params.values():
        parameter.grad = torch.ones(4)
    groups = [{"name": name, "params": [parameter]} for name, parameter in params.items()]
    norms = clip_by_group(groups, 1.0, 0.1)
    assert {name: float(norm) for name, norm in norms.items()} == {
        "A": 2,
        "B": 2,
        "scales": 2,
        "other": 2,
    }
    after = {name: float(parameter.grad.norm()) for name, parameter in params.items()}
    assert after == pytest.approx({"A": 0.1, "B": 0.1, "scales": 1.0, "other": 1.0}, rel=1e-5)


def test_groups_are_clipped_one_by_one_and_their_norms_logged(lrqat_trainer, gradients, step_logs):
    fields = {"optim": "sgd", "learning_rate": 1e-3, "scale_learning_rate": 1e-7}
    trainer = lrqat_trainer(options={"callbacks": [gradients]}, max_grad_norm=0.0, **fields)
    trainer.train()
    unclipped, free = list(gradients.steps), step_logs(trainer)
    raw = {name: norm_of(unclipped[0], marker) for name, marker in MARKERS.items()}
    limit = sorted(raw.values())[0] * 1.5  # one group is below it, two are above
    gradients.steps.clear()
    limits = {"max_grad_norm": limit, "factor_max_grad_norm": limit}
    trainer = lrqat_trainer(options={"callbacks": [gradients]}, **limits, **fields)
    trainer.train()
    logged = step_logs(trainer)[0]
    for name, marker in MARKERS.items():
        own = {n: g for n, g in gradients.steps[0].items() if marker in n}
        assert logged[setting_name(name, "grad_norm")] == pytest.approx(raw[name], rel=1e-5)
        if raw[name] <= limit:
            assert all(torch.equal(g, unclipped[0][n]) for n, g in own.items())
        else:
            assert limit * (1 - 1e-4) < norm_of(own, marker) <= limit
            for n, g in own.items():  # only shorter
                torch.testing.assert_close(
                    g, unclipped[0][n] * limit / raw[name], rtol=1e-4, atol=1e-12
                )
    overall = sum(norm**2 for norm in raw.values()) ** 0.5
    assert logged["grad_norm"] == pytest.approx(overall, rel=1e-5)
    # Without clipping the same is logged.
    assert {k: v for k, v in free[0].items() if "norm" in k} == {
        k: v for k, v in logged.items() if "norm" in k
    }


def test_the_factory_clips_like_the_trainer(lrqat_trainer, factory_run, trained_tensors):
    """In an unmodified Trainer: the same steps, bit for bit."""
    betas = {"betas": (0.9, 0.95)}
    fields = {"learning_rate": 1e-3, "scale_learning_rate": 1e-5}
    limits = {"max_grad_norm": 1e-3, "factor_max_grad_norm": 1e-4}
    ours = lrqat_trainer(**limits, optim="adamw_torch", **fields)
    ours.train()
    clipped = trained_tensors(factory_run({**RATES, **betas, **limits}).model)
    unclipped = trained_tensors(factory_run({**RATES, **betas}).model)
    mine = trained_tensors(ours.model)
    assert all(torch.equal(clipped[name], tensor) for name, tensor in mine.items())
    assert not all(torch.equal(unclipped[name], tensor) for name, tensor in mine.items())


def test_the_factory_clips_each_step(factory_run):
    norms = []

    class Norms(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **_):
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            norms.append([norm_of(found, marker) for marker in MARKERS.values()])

    factory_run({**RATES, "max_grad_norm": 1e-4, "factor_max_grad_norm": 1e-4}, callbacks=[Norms()])
    assert len(norms) == 3
    assert all(
        norm == pytest.approx(1e-4, rel=1e-2) and norm <= 1e-4 for step in norms for norm in step
    )


@pytest.mark.parametrize("fused", [False, True])
def test_the_factory_clips_gradients_that_a_fused_optimizer_scales_back(fused, make_peft):
    """Under a gradient scaler, a fused AdamW divides the gradients only in its own step."""
    settings = {**RATES, "max_grad_norm": 1e-4, "factor_max_grad_norm": 1e-4, "eps": 1e-3}
    moved = []
    for scale in (1.0, 1024.0):
        model = make_peft()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in trained.items()}
        optimizer = LRQATOptimizerFactory()(model, fused=fused, **settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))  # makes the scale
        for p in trained.values():
            p.grad = torch.full_like(p, scale)
        scaler.step(optimizer)
        moved.append({n: p.detach() - before[n] for n, p in trained.items()})
    for name, step in moved[0].items():
        assert step.abs().max() > 0
        torch.testing.assert_close(moved[1][name], step, rtol=1e-3, atol=1e-9)


# The factory in an unmodified Trainer


def test_factory_makes_adamw_with_the_groups(make_peft, factory_run, trained_tensors):
    model, options = (
        make_peft(),
        {**RATES, "betas": (0.8, 0.9), "eps": 1e-12, "scale_weight_decay": 0.3},
    )
    before = trained_tensors(model)
    trainer = factory_run(options, model)
    optimizer = plain(trainer.optimizer)
    assert type(optimizer) is torch.optim.AdamW
    assert rates_of(optimizer) == {"A": 1e-3, "B": 1e-3, "scales": 1e-5}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0, 0.3]
    assert all(
        group["betas"] == (0.8, 0.9) and group["eps"] == 1e-12 for group in optimizer.param_groups
    )
    assert options == {**RATES, "betas": (0.8, 0.9), "eps": 1e-12, "scale_weight_decay": 0.3}
    after = trained_tensors(trainer.model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainer.state.global_step == 3


def test_first_step_is_as_long_as_the_rate(make_peft, factory_run, trained_tensors):
    """Adam's first step has the length of the learning rate wherever the gradient is not zero."""
    model = make_peft()
    before = trained_tensors(model)
    after = trained_tensors(
        factory_run({**RATES, "lr_B": 2e-3, "eps": 1e-12}, model, max_steps=1).model
    )
    assert largest_move(before, after, "lrqat_B") == pytest.approx(2e-3, rel=1e-4)
    # Scales of 1e-2 resolve a step of 1e-5 to their own rounding.
    assert largest_move(before, after, "lrqat_scale") == pytest.approx(1e-5, rel=1e-3)
    assert largest_move(before, after, "lrqat_A") == 0  # B is zero still


def test_schedule_keeps_the_ratio_of_the_factory(factory_run):
    trainer = factory_run(
        {**RATES, "lr_A": 4e-3}, lr_scheduler_type="linear", warmup_steps=1, max_steps=4
    )
    a, b, scales = trainer.lr_scheduler.get_last_lr()
    assert (a, scales) == (pytest.approx(4 * b), pytest.approx(b / 100))
    logged = [
        entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry
    ]
    assert max(logged) == pytest.approx(4e-3)  # of the first group


def test_resumed_is_uninterrupted(
    factory_run, make_peft, trained_tensors, tmp_path, lrqat_args, token_rows
):
    """Bit for bit, with every group's state."""
    options = {**RATES, "lr_B": 2e-3, "max_grad_norm": 1e-2}
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained_tensors(
        factory_run(options, make_peft(), output_dir=str(tmp_path / "whole"), **fields).model
    )
    trainer = transformers.Trainer(
        model=make_peft(),
        args=lrqat_args(
            transformers.TrainingArguments, max_steps=4, max_grad_norm=0.0, learning_rate=7.0
        ),
        train_dataset=token_rows(),
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, options),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    rest = trained_tensors(trainer.model)
    assert all(torch.equal(rest[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("value", [0, 0.0, -1e-3, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["lr", "scale_lr", "lr_A", "lr_B"])
def test_bad_rate_is_refused(name, value, make_peft):
    markers = "`.lrqat_scale.`" if "scale" in name else "`.lrqat_A.` and `.lrqat_B.`"
    message = (
        f"`{name}` must be a learning rate above 0, but is {value!r};.*parameters with {markers} "
        "in their names"
    )
    with pytest.raises(ValueError, match=message):
        LRQATOptimizerFactory()(make_peft(), **{**RATES, name: value})
    with pytest.raises(ValueError, match=message):
        parameter_groups(make_peft(), **{**RATES, name: value})


def test_rates_of_other_number_types_are_taken_and_strings_are_not(make_peft):
    groups = parameter_groups(make_peft(), lr=np.float32(1e-3), scale_lr=1)
    assert [group["lr"] for group in groups] == [np.float32(1e-3), np.float32(1e-3), 1]
    with pytest.raises(
        ValueError, match=r"`lr` must be a number, but is the string '5e-3'; .* write 5.0e-3"
    ):
        parameter_groups(make_peft(), lr="5e-3", scale_lr=1e-5)


def test_both_rates_must_be_given(make_peft):
    with pytest.raises(TypeError, match="scale_lr"):
        LRQATOptimizerFactory()(make_peft(), lr=1e-3)  # type: ignore[call-arg]  # refused
    with pytest.raises(TypeError, match="momentum"):
        LRQATOptimizerFactory()(make_peft(), **RATES, momentum=0.9)


def test_model_with_nothing_to_train_is_refused():
    with pytest.raises(
        ValueError,
        match=r"no trainable parameters; wrap it with get_peft_model\(model, LRQATConfig",
    ):
        LRQATOptimizerFactory()(nn.Linear(2, 2).requires_grad_(False), **RATES)


def test_the_usual_rate_of_the_scales_follows_a_calibrated_base(
    make_base, make_config, token_rows, tmp_path
):
    rows = token_rows(4, 8)
    args = LRQATTrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )

    def rate_of(base, **fields):
        config = make_config(**fields)
        config.range_estimator = "lp"
        model = get_peft_model(base, config)
        trainer = LRQATTrainer(model=model, args=args, train_dataset=rows)
        trainer.create_optimizer()
        group = next(g for g in trainer.optimizer.param_groups if g["name"] == "scales")
        assert trainer.args.scale_learning_rate == group["initial_lr"]
        layers = [m for m in model.modules() if isinstance(m, LRQATLinear)]
        return group["initial_lr"], layers

    assert rate_of(make_base("llama"), bits=4)[0] == 1e-4
    start = CalibratedStart(method="gptq", dataset=rows, progress=False)
    base = calibrate_low_bit(make_base("llama"), LowBitConfig(bits=4, downcast="fixed8"), start)
    rate, layers = rate_of(base)
    means = torch.tensor([float(layer.base_layer.scale0.mean()) for layer in layers])
    assert rate == pytest.approx(0.01 * float(means.mean()), rel=1e-5)
    # The same arguments served for both models.
    assert args.scale_learning_rate is None
