"""TRL's trainers: with the mixin over them, and unmodified with the factory."""

import ast
import copy
import inspect
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from peft_lrqat.trainer import (
    LRQATArguments,
    LRQATCallback,
    LRQATOptimizerFactory,
    LRQATTrainerMixin,
)
from peft_lrqat.trainer.part import TrainerPart


trl: Any = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@dataclass(kw_only=True)
class LRQATSFTConfig(LRQATArguments, trl.SFTConfig):
    pass


@dataclass(kw_only=True)
class LRQATDPOConfig(LRQATArguments, trl.DPOConfig):
    pass


class LRQATSFTTrainer(LRQATTrainerMixin, trl.SFTTrainer):
    pass


class LRQATDPOTrainer(LRQATTrainerMixin, trl.DPOTrainer):
    pass


def words(start, count):
    return " ".join(f"w{3 + (7 * start + i) % 93}" for i in range(count))


DATA = {
    "sft": Dataset.from_dict({"text": [words(i, 12) for i in range(8)]}),
    "dpo": Dataset.from_dict(
        {
            "prompt": [words(i, 4) for i in range(8)],
            "chosen": [" " + words(i + 1, 6) for i in range(8)],
            "rejected": [" " + words(i + 40, 5) for i in range(8)],
        }
    ),
}
OURS = {"sft": (LRQATSFTTrainer, LRQATSFTConfig), "dpo": (LRQATDPOTrainer, LRQATDPOConfig)}
FIELDS = {"bf16": False, "max_length": 16}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.fixture
def make_trainer(make_base, make_config, lrqat_args, tokenizer):
    """``make_trainer(kind, model, options, **fields)``: TRL's trainer with the mixin.

    Without ``model``, TRL wraps the model.
    """

    def make(kind, model=None, options=None, **fields):
        trainer, config = OURS[kind]
        given = (
            {"model": model}
            if model is not None
            else {"model": make_base(), "peft_config": make_config(bits=3)}
        )
        torch.manual_seed(0)
        return trainer(
            args=lrqat_args(config, **{**FIELDS, **fields}),
            train_dataset=DATA[kind],
            processing_class=tokenizer,
            **given,
            **(options or {}),
        )

    return make


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_groups_rates_and_figures(kind, make_trainer, step_logs, trained_tensors):
    fields = {
        "learning_rate": 1e-2,
        "B_learning_rate": 2e-2,
        "scale_learning_rate": 1e-5,
        "max_steps": 6,
    }
    trainer = make_trainer(kind, max_grad_norm=1e-3, **fields)
    before = trained_tensors(trainer.model)
    trainer.train()
    groups = {
        g["name"]: (g["lr"], g["weight_decay"], g["betas"]) for g in trainer.optimizer.param_groups
    }
    assert groups == {
        "A": (1e-2, 0.0, (0.9, 0.95)),
        "B": (2e-2, 0.0, (0.9, 0.95)),
        "scales": (1e-5, 0.0, (0.9, 0.95)),
    }
    after = trained_tensors(trainer.model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    for log in step_logs(trainer):
        assert (log["A_learning_rate"], log["B_learning_rate"], log["scale_learning_rate"]) == (
            1e-2,
            2e-2,
            1e-5,
        )
        assert {"clipped_weights", "changed_integers_since_log", "scale_grad_norm"} <= log.keys()
        assert ("rewards/margins" if kind == "dpo" else "mean_token_accuracy") in log  # TRL's own
    assert step_logs(trainer)[-1]["changed_integers"] > 0


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_resumed_is_uninterrupted_and_saved_is_loaded(
    kind, make_trainer, make_base, trained_tensors, logits_of, tmp_path
):
    whole = make_trainer(kind, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=2e-2)
    whole.train()
    resumed = make_trainer(
        kind, max_steps=4, output_dir=str(tmp_path / "resumed"), learning_rate=2e-2
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = trained_tensors(whole.model)
    assert all(
        torch.equal(tensor, expected[name])
        for name, tensor in trained_tensors(resumed.model).items()
    )

    resumed.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "adapter").eval()
    last = PeftModel.from_pretrained(make_base(), tmp_path / "out" / "checkpoint-4").eval()
    assert torch.equal(logits_of(loaded), logits_of(last))
    merged = loaded.merge_and_unload()
    assert torch.isfinite(logits_of(merged)).all()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "import peft_lrqat" in card
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "training_record"
    ]
    assert record["steps"] == 4


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_model_that_is_wrapped_already(kind, make_trainer, make_peft, trained_tensors, tmp_path):
    """DPO keeps a frozen second adapter as its reference; it is neither trained nor in a group."""
    model = make_peft()
    trainer = make_trainer(kind, model, save_strategy="steps", save_steps=3, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(name.endswith(".default") for name in trained)
    assert trained == {name for name in before if ".lrqat_" in name and name.endswith(".default")}
    after = dict(model.named_parameters())
    assert {
        name for name, tensor in before.items() if not torch.equal(after[name], tensor)
    } == trained
    assert model.active_adapters == ["default"]
    with safe_open(tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors", "pt") as file:
        assert not any("ref" in name.split(".") for name in set(file.keys()))


def test_accumulated_batches_equal_one(make_trainer, gradients):
    found = []
    for size, steps in ((4, 1), (2, 2)):
        fields = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_grad_norm": 0.0,
        }
        make_trainer("sft", options={"callbacks": [gradients]}, max_steps=1, **fields).train()
        found.append(gradients.steps.pop())
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max()
        )


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_distillation_is_refused_where_there_are_no_logits(kind, make_trainer, make_base):
    trainer = make_trainer(kind, options={"teacher_model": make_base()}, distillation_weight=0.5)
    name = type(trainer).__name__
    with pytest.raises(
        ValueError, match=f"the loss of {name} does not return them; use LRQATTrainer, or set"
    ):
        trainer.train()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_plain_arguments_of_trl_are_refused(kind, make_peft, lrqat_args, tokenizer):
    trainer, _ = OURS[kind]
    config = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[kind]
    with pytest.raises(
        ValueError, match=f"`args` must be LRQATTrainingArguments, but is {config.__name__};"
    ):
        trainer(
            model=make_peft(),
            args=lrqat_args(config, **FIELDS),
            train_dataset=DATA[kind],
            processing_class=tokenizer,
        )


def test_sft_trainer_as_it_is(
    make_base, make_config, lrqat_args, tokenizer, trained_tensors, step_logs, tmp_path
):
    """The factory in an unmodified SFTTrainer, which wraps the model itself."""
    options = {"lr": 1e-3, "lr_B": 2e-3, "scale_lr": 1e-5, "max_grad_norm": 1.0}
    trainer = trl.SFTTrainer(
        model=make_base(),
        args=lrqat_args(trl.SFTConfig, **FIELDS, max_grad_norm=0.0),
        train_dataset=DATA["sft"],
        processing_class=tokenizer,
        peft_config=make_config(),
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, options),
    )
    LRQATCallback.attach(trainer)
    before = trained_tensors(trainer.model)
    trainer.train()
    after = trained_tensors(trainer.model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {g["name"]: g["lr"] for g in trainer.optimizer.param_groups} == {
        "A": 1e-3,
        "B": 2e-3,
        "scales": 1e-5,
    }
    assert all(
        log["scale_learning_rate"] == 1e-5 and "clipped_weights" in log
        for log in step_logs(trainer)
    )
    trainer.save_model(str(tmp_path / "adapter"))
    assert "import peft_lrqat" in (tmp_path / "adapter" / "README.md").read_text()


def names_on_self(source):
    """The methods that the source defines, and the attributes of ``self`` that it uses."""
    tree = ast.parse(source)
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return methods | used


@pytest.mark.parametrize(
    "trainer",
    [getattr(trl, name) for name in sorted(trl.__all__) if name.endswith("Trainer")],
    ids=lambda trainer: trainer.__name__,
)
def test_state_of_the_parts_is_not_the_trainers(trainer):
    """A part's attribute or method must not take the place of one that a trainer of TRL has."""
    base = names_on_self(inspect.getsource(transformers.Trainer))
    parts = [part for part in LRQATTrainerMixin.__mro__ if issubclass(part, TrainerPart)]
    ours = {name for part in parts for name in names_on_self(inspect.getsource(part))} - base
    assert {"_group_norms", "_staging", "teacher"} <= ours
    ours.remove("ref_model")  # on purpose, see `ReferencePolicy`
    for cls in trainer.__mro__[:-1]:
        if cls.__module__.startswith("trl."):
            assert not ours & names_on_self(inspect.getsource(cls)), cls


def reference_of(trainer):
    """The reference's log-probabilities of one batch, and the policy's."""
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for name in ("ref", "default"):
        trainer.model.set_adapter(name)
        with torch.no_grad():
            found.append(trainer.model.eval()(batch["input_ids"]).logits)
    trainer.model.set_adapter("default")
    return found


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("way", ["peft_config", "path", "wrapped", "trained"])
def test_the_reference_is_the_policy_at_its_start(
    way, precompute, make_trainer, make_base, make_config, make_peft, step_logs, disturb, tmp_path
):
    """Whoever wrapped the model: the first loss is ln 2, and the reference stays what it is."""
    if way == "path":
        make_base().save_pretrained(tmp_path / "base")
    given = {
        "peft_config": lambda: None,
        "path": lambda: str(tmp_path / "base"),
        "wrapped": make_peft,
        "trained": lambda: disturb(make_peft()),
    }[way]()
    options = {"peft_config": make_config()} if way == "path" else {}
    fields = {"precompute_ref_log_probs": precompute, "learning_rate": 1e-2}
    trainer = make_trainer("dpo", given, options, **fields)
    reference, policy = reference_of(trainer)
    assert torch.equal(reference, policy)
    trainer.train()
    losses = [log["loss"] for log in step_logs(trainer)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] != losses[0]
    after, trained = reference_of(trainer)
    assert torch.equal(after, reference)
    assert not torch.equal(trained, after)
    assert not any(".ref" in n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_no_reference_where_none_is_needed(make_trainer):
    assert list(make_trainer("sft").model.peft_config) == ["default"]


@dataclass(kw_only=True)
class LRQATGRPOConfig(LRQATArguments, trl.GRPOConfig):
    pass


class LRQATGRPOTrainer(LRQATTrainerMixin, trl.GRPOTrainer):
    pass


class RatioOfPolicies(transformers.TrainerCallback):
    """Before each step: the ratio of a token's probability in training to that when merged."""

    def __init__(self, batch):
        self.ids, self.ratios = batch["input_ids"], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        served = copy.deepcopy(model).merge_and_unload().eval()
        model.train()
        with torch.no_grad():
            logs = [
                policy(input_ids=self.ids, use_cache=False).logits.log_softmax(-1)
                for policy in (model, served)
            ]
        self.ratios.append((logs[0] - logs[1]).exp())


def test_grpo_samples_from_the_policy_that_it_trains(
    make_base, make_config, lrqat_args, tokenizer, batch_for, trained_tensors
):
    """The importance ratio is exactly 1 before each update, at every token."""
    fields = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 6}
    torch.manual_seed(0)
    trainer = LRQATGRPOTrainer(
        make_base(),
        reward_funcs=lambda completions, **_: [-float(len(text)) for text in completions],
        args=lrqat_args(LRQATGRPOConfig, **{"bf16": False, "learning_rate": 1e-2, **fields}),
        train_dataset=Dataset.from_dict({"prompt": [words(i, 4) for i in range(8)]}),
        processing_class=tokenizer,
        peft_config=make_config(bits=4),
    )
    seen = RatioOfPolicies(batch_for())
    trainer.add_callback(seen)
    before = trained_tensors(trainer.model)
    trainer.train()
    after = trained_tensors(trainer.model)
    assert {
        name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])
    } == {
        "lrqat_A",
        "lrqat_B",
        "lrqat_scale",
    }
    assert len(seen.ratios) == 3
    assert all(bool((ratio == 1).all()) for ratio in seen.ratios)
    assert [log["changed_integers"] > 0 for log in trainer.state.log_history if "loss" in log][-1]
