"""A run that is no longer finite stops at once, says where, and keeps the last checkpoint."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from peft_lrqat.trainer import (
    LRQATTrainer,
    LRQATTrainerMixin,
    LRQATTrainingArguments,
    last_complete_checkpoint,
)
from peft_lrqat.trainer.finite import first_nonfinite_module, nonfinite_tensors


def rows(count=8):
    ids = torch.randint(3, 96, (count, 10), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]


class AtStep(transformers.TrainerCallback):
    """Does ``action(model)`` after ``step`` steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.action(model)


class PoppingTrainer(transformers.Trainer):
    """A trainer that takes its labels out of the batch, and drops extra arguments."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return super().compute_loss(
            model, {**inputs, "labels": labels}, return_outputs, num_items_in_batch
        )


class LRQATPoppingTrainer(LRQATTrainerMixin, PoppingTrainer):
    pass


@pytest.fixture
def make_trainer(make_peft, make_base, tmp_path):
    """``make_trainer(action, step, cls, **fields)``: ``action(model)`` happens after ``step``."""

    def make(action=lambda model: None, step=2, cls=LRQATTrainer, **fields):
        defaults = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = LRQATTrainingArguments(str(tmp_path), **{**defaults, **fields})
        return cls(
            model=make_peft(),
            args=args,
            train_dataset=rows(),
            teacher_model=make_base() if args.distillation_weight else None,
            callbacks=[AtStep(step, action)],
        )

    return make


@pytest.fixture
def stopped(tmp_path, make_base):
    """``stopped(trainer)``: the error of its training; the last checkpoint is then step 2."""

    def run(trainer):
        with pytest.raises(FloatingPointError) as caught:
            trainer.train()
        last = tmp_path / "checkpoint-2"
        assert last_complete_checkpoint(tmp_path) == str(last)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
        assert f"Nothing of this step was saved; the last checkpoint, {last}, is unchanged" in str(
            caught.value
        )
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)
        PeftModel.from_pretrained(make_base(), str(last))
        return str(caught.value)

    return run


def put_out_nan(name, value=float("nan")):
    """An action: from now on the module puts out ``value``."""

    def act(model):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: torch.full_like(output, value)
        )

    return act


def break_norm(model):
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.1.input_layernorm").weight[3] = float(
            "nan"
        )


MLP = "base_model.model.model.layers.0.mlp"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logging_nan_inf_filter": False},
        {"distillation_weight": 0.5},
        {"distillation_weight": 1.0},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"bf16": True},
        {"cls": LRQATPoppingTrainer},
    ],
    ids=str,
)
def test_module_that_puts_out_nan_is_named(fields, make_trainer, stopped):
    """The innermost one: those around it put out NaN, too."""
    message = stopped(make_trainer(put_out_nan(f"{MLP}.act_fn"), **fields))
    assert message.startswith("the loss is nan at step 3; ")
    assert f"the first module with an output that is not finite: `{MLP}.act_fn`. " in message


def test_module_that_puts_out_infinity_is_named(make_trainer, stopped):
    message = stopped(make_trainer(put_out_nan(f"{MLP}.down_proj", float("inf"))))
    assert f"the first module with an output that is not finite: `{MLP}.down_proj`. " in message


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_frozen_parameter_that_is_nan_is_named(weight, make_trainer, stopped):
    message = stopped(make_trainer(break_norm, distillation_weight=weight))
    assert message.startswith("the loss is nan at step 3; ")
    # The teacher uses the same memory.
    shared = ", `teacher.model.layers.1.input_layernorm.weight`" if weight else ""
    name = "base_model.model.model.layers.1.input_layernorm.weight"
    assert f"; parameters that are not finite: `{name}`{shared}. " in message


def test_teacher_that_is_nan_is_named(make_trainer, stopped):
    trainer = make_trainer(distillation_weight=0.5)

    def act(model):
        # A copy, because the student uses the same memory.
        layer = trainer.teacher.get_submodule("model.layers.1.input_layernorm")
        layer.weight = nn.Parameter(
            torch.full_like(layer.weight, float("nan")), requires_grad=False
        )

    trainer.add_callback(AtStep(2, act))
    assert (
        "parameters that are not finite: `teacher.model.layers.1.input_layernorm.weight`. "
        in stopped(trainer)
    )

    trainer = make_trainer(distillation_weight=0.5, overwrite_checkpoints=True)
    trainer.add_callback(
        AtStep(2, lambda model: put_out_nan("model.layers.0.mlp")(trainer.teacher))
    )
    assert (
        "the first module with an output that is not finite: `teacher.model.layers.0.mlp`. "
        in stopped(trainer)
    )


def test_loss_that_is_nan_in_finite_parts(make_trainer, stopped):
    class Loss(LRQATTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    message = stopped(make_trainer(cls=Loss))
    assert "all parameters and, in a second pass, all outputs of modules are finite. " in message


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_that_is_not_finite_is_named(
    value, max_grad_norm, accumulation, make_trainer, stopped
):
    """That one alone: clipping must not have spread it over its group before."""
    name = f"{MLP}.up_proj.lrqat_B.default"

    def act(model):
        model.get_parameter(name).register_hook(lambda grad: torch.full_like(grad, value))

    message = stopped(
        make_trainer(act, max_grad_norm=max_grad_norm, gradient_accumulation_steps=accumulation)
    )
    assert message.startswith(
        f"the gradient norm is {value} at step 3; gradients that are not finite: `{name}`. "
    )


def test_gradient_whose_square_is_infinite_stops_too(make_trainer, stopped):
    """AdamW would divide by the infinite root of it, and never move this parameter again."""

    def act(model):
        model.get_parameter(f"{MLP}.up_proj.lrqat_B.default").register_hook(
            lambda grad: torch.full_like(grad, 1e30)
        )

    message = stopped(make_trainer(act))
    assert (
        "the gradient norm is inf at step 3; gradients that are not finite: none, but their "
        "squares are too large" in message
    )


def test_float16_scaler_skips_by_itself(make_trainer):
    """Infinite gradients are its daily work."""
    trainer = make_trainer()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer._check_gradients = None
    trainer.train()
    assert trainer.state.global_step == 4


def spoil(model):
    with torch.no_grad():
        model.get_parameter(f"{MLP}.up_proj.lrqat_scale.default")[2] = float("nan")


def test_parameters_that_are_not_finite_are_not_saved(make_trainer, make_base, tmp_path):
    """Neither as a checkpoint nor as the adapter."""
    trainer = make_trainer(spoil, step=3)
    trainer.save_model()
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    name = f"{MLP}.up_proj.lrqat_scale.default"
    with pytest.raises(
        FloatingPointError, match="there are parameters that are not finite at step 3; these: "
    ) as caught:
        trainer.train()
    assert name in str(caught.value)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(FloatingPointError, match=name):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == saved
    names = ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == names
    PeftModel.from_pretrained(make_base(), str(tmp_path))


def test_stopped_before_the_first_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer()
    put_out_nan(f"{MLP}.act_fn")(trainer.model)
    with pytest.raises(FloatingPointError, match=r"at step 1; .* there is no checkpoint yet"):
        trainer.train()


def test_looking_changes_nothing(make_peft, batch_for):
    model = make_peft()
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    batch = batch_for()
    assert first_nonfinite_module(model.named_modules(), lambda: model(**batch)) is None
    put_out_nan(f"{MLP}.act_fn")(model)
    assert first_nonfinite_module(model.named_modules(), lambda: model(**batch)) == f"{MLP}.act_fn"
    with pytest.raises(ZeroDivisionError):
        first_nonfinite_module(model.named_modules(), lambda: 1 / 0)
    assert [len(module._forward_hooks) for module in model.modules()] == [
        count + (name == f"{MLP}.act_fn") for count, (name, _) in zip(hooks, model.named_modules())
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: (None, [t]), lambda t: {"a": {"b": t}}])
def test_outputs_of_any_form_are_looked_into(wrap):
    class Model(nn.Module):
        def forward(self, value):
            return wrap(value)

    named = [("m", Model())]
    for value, found in [
        (torch.ones(2), None),
        (torch.tensor([1.0, float("inf")]), "m"),
        (torch.ones(1).int(), None),
    ]:
        assert first_nonfinite_module(named, lambda value=value: named[0][1](value)) == found


def test_nonfinite_tensors_of_every_dtype():
    named = {
        "none": None,
        "integers": torch.ones(2, dtype=torch.int8),
        "empty": torch.empty(0),
        "half": torch.tensor([1.0, float("inf")], dtype=torch.float16),
        "bfloat16": torch.tensor([float("nan")], dtype=torch.bfloat16),
        "fine": torch.tensor([1e38]),
    }
    assert nonfinite_tensors(named.items()) == ["half", "bfloat16"]
