"""The arguments: the recipe as defaults, and what is no setting at all."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from peft_lrqat.trainer import LRQATArguments, LRQATTrainer, LRQATTrainingArguments


def arguments(**fields):
    return LRQATTrainingArguments("out", use_cpu=True, **fields)


def test_defaults_are_the_recipe():
    args = arguments()
    assert (args.learning_rate, args.A_learning_rate, args.B_learning_rate) == (5e-3, None, None)
    assert (args.scale_learning_rate, args.weight_decay, args.scale_weight_decay) == (None, 0, 0)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert (args.max_grad_norm, args.factor_max_grad_norm) == (1.0, 0.01)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.logging_steps) == (
        "linear",
        100,
        10,
    )
    assert (args.distillation_weight, args.distillation_temperature) == (0, 1)


def test_all_else_is_as_transformers_has_it():
    own = {field.name for field in dataclasses.fields(LRQATArguments)}
    plain = transformers.TrainingArguments("out", use_cpu=True)
    ours = arguments()
    for field in dataclasses.fields(transformers.TrainingArguments):
        if field.init and field.name not in own | {"dataloader_pin_memory"}:
            assert getattr(ours, field.name) == getattr(plain, field.name), field.name


def test_memory_is_not_pinned_for_a_cpu():
    assert not arguments().dataloader_pin_memory


def test_every_field_is_explained():
    assert all(field.metadata.get("help") for field in dataclasses.fields(LRQATArguments))


def test_they_go_before_any_trainers_own():
    @dataclass(kw_only=True)
    class Other(transformers.TrainingArguments):
        learning_rate: float = 1e-6
        beta: float = 0.1

        def __post_init__(self):
            super().__post_init__()
            self.checked = True

    @dataclass(kw_only=True)
    class Both(LRQATArguments, Other):
        pass

    args = Both(output_dir="out", use_cpu=True, beta=0.5, B_learning_rate=1e-2)
    assert (args.learning_rate, args.B_learning_rate, args.beta, args.checked) == (
        5e-3,
        1e-2,
        0.5,
        True,
    )
    with pytest.raises(ValueError, match="`B_learning_rate`"):
        Both(output_dir="out", use_cpu=True, B_learning_rate=0)


@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["learning_rate", "A_learning_rate", "B_learning_rate", "scale_learning_rate"]
)
def test_bad_rate_is_refused(name, value):
    message = f"`{name}` must be a learning rate above 0, but is {value}; to keep them fixed"
    with pytest.raises(ValueError, match=message):
        arguments(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *[
            ("distillation_weight", value, "is a share of the loss, 0 to 1, but is")
            for value in (-0.1, 1.1, math.nan)
        ],
        *[
            ("distillation_temperature", value, "must be above 0, but is")
            for value in (0.0, -1.0, math.nan, math.inf)
        ],
        *[
            ("scale_weight_decay", value, "must be at least 0, but is")
            for value in (-0.1, math.nan, math.inf)
        ],
    ],
)
def test_bad_value_is_refused(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` {message} {value}"):
        arguments(**{name: value})


# What the trainer says of what it is given


def test_plain_training_arguments_are_refused(make_peft, lrqat_args):
    args = lrqat_args(transformers.TrainingArguments)
    with pytest.raises(
        ValueError, match="`args` must be LRQATTrainingArguments, but is TrainingArguments;"
    ):
        LRQATTrainer(model=make_peft(), args=args)


def test_model_without_lrqat_layers_is_refused(make_base, lrqat_args):
    lora = get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for model in (make_base(), lora):
        message = rf"the model \({type(model).__name__}\) has no LR-QAT layers; wrap it first"
        with pytest.raises(ValueError, match=message):
            LRQATTrainer(model=model, args=lrqat_args())


def test_merged_model_is_refused(make_peft, lrqat_args):
    with pytest.raises(ValueError, match="has no LR-QAT layers"):
        LRQATTrainer(model=make_peft().merge_and_unload(), args=lrqat_args())
