"""`LRQATTrainer` does what the Trainer does: the same steps, evaluation, search and resuming."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from peft_lrqat import LRQATConfig
from peft_lrqat.trainer import LRQATArguments, LRQATTrainer, LRQATTrainerMixin
from peft_lrqat.trainer.metrics import compute_metrics, preprocess_logits_for_metrics


pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(second[name], t) for name, t in first.items()
    )


def plain_loop(model, rows, args, steps):
    """The plain training loop: AdamW, clipping by kind, a linear schedule with warm-up."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = [
        [p for name, p in named.items() if kind in name]
        for kind in (".lrqat_A.", ".lrqat_B.", ".lrqat_scale.")
    ]
    rates = [args.learning_rate, args.learning_rate, args.scale_learning_rate]
    limits = [args.factor_max_grad_norm, args.factor_max_grad_norm, args.max_grad_norm]
    betas = (args.adam_beta1, args.adam_beta2)
    optimizers = [
        torch.optim.AdamW(parameters, lr=rate, betas=betas, eps=args.adam_epsilon, weight_decay=0.0)
        for parameters, rate in zip(kinds, rates)
    ]
    warmup = args.get_warmup_steps(steps)
    losses = []
    model.train()
    for step, batch in zip(range(steps), rows):
        loss = model(**batch).loss
        loss.backward()
        share = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for optimizer, parameters, rate, limit in zip(optimizers, kinds, rates, limits):
            torch.nn.utils.clip_grad_norm_(parameters, limit)
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_run_is_the_loop_that_it_describes(
    lrqat_trainer, make_peft, token_rows, trained_tensors, step_logs
):
    fields = {
        "max_steps": 6,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "max_grad_norm": 1e-2,
        "factor_max_grad_norm": 1e-3,
    }
    trainer = lrqat_trainer(**fields, optim="adamw_torch")
    seen = []
    collate = trainer.data_collator

    def recording(rows):
        seen.append(collate(rows))
        return seen[-1]

    trainer.data_collator = recording
    trainer.train()
    model = make_peft(init_weights=False)
    losses = plain_loop(model, seen, trainer.args, steps=6)
    assert [log["loss"] for log in step_logs(trainer)] == pytest.approx(losses, rel=1e-6)
    expected = trained_tensors(model)
    for name, tensor in trained_tensors(trainer.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("size", "steps"), [(2, 2), (1, 4)])
def test_accumulated_batches_equal_one(size, steps, lrqat_trainer, gradients, step_logs):
    def run(size, steps):
        fields = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_grad_norm": 0.0,
        }
        trainer = lrqat_trainer(options={"callbacks": [gradients]}, max_steps=1, **fields)
        trainer.train()
        return gradients.steps.pop(), step_logs(trainer)[0]

    (whole, log), (parts, accumulated) = run(4, 1), run(size, steps)
    for name, gradient in whole.items():  # sums of float32 in another order
        torch.testing.assert_close(
            parts[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max()
        )
    for key in ("loss", "grad_norm", "A_grad_norm", "B_grad_norm", "scale_grad_norm"):
        assert accumulated[key] == pytest.approx(log[key], rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activation_checkpointing_changes_no_bit(
    dtype, reentrant, lrqat_trainer, make_peft, trained_tensors
):
    trainer = lrqat_trainer(make_peft(dtype=dtype), max_steps=2)
    trainer.train()
    fields = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    checkpointed = lrqat_trainer(make_peft(dtype=dtype), max_steps=2, **fields)
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    assert same(trained_tensors(trainer.model), trained_tensors(checkpointed.model))


def test_autocast_trains_the_same_integers(
    lrqat_trainer, make_peft, lrqat_layers, step_logs, trained_tensors
):
    """All products but those that make integers are bfloat16: losses agree to its 8 bits."""
    wide, narrow = lrqat_trainer(), lrqat_trainer(bf16=True)
    for trainer in (wide, narrow):
        trainer.train()
    losses = [[log["loss"] for log in step_logs(trainer)] for trainer in (wide, narrow)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)
    assert {t.dtype for t in trained_tensors(narrow.model).values()} == {torch.float32}
    for layer in lrqat_layers(narrow.model).values():
        codes = layer.quantized_codes()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.quantized_codes(), codes)


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "classifier"])
def test_other_architectures_train(
    architecture, lrqat_trainer, make_peft, batch_for, trained_tensors, step_logs
):
    rows = [{name: value[i] for name, value in batch_for(architecture).items()} for i in range(2)]
    model = make_peft(architecture, init_weights=False)
    before = trained_tensors(model)
    trainer = lrqat_trainer(model, {"train_dataset": rows}, max_steps=8, learning_rate=1e-2)
    trainer.train()
    after = trained_tensors(model)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    losses = [log["loss"] for log in step_logs(trainer)]
    assert losses[-1] < losses[0]
    groups = [group["name"] for group in trainer.optimizer.param_groups]
    assert groups == ["A", "B", "scales"] + ["other"] * (architecture == "classifier")


def test_label_smoothing(lrqat_trainer, make_peft, token_rows, step_logs):
    model, rows = make_peft(init_weights=False), token_rows(2)
    ids = torch.stack([row["input_ids"] for row in rows])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = -0.9 * log_p.gather(-1, ids[:, 1:, None]).mean() - 0.1 * log_p.mean()
    trainer = lrqat_trainer(model, {"train_dataset": rows}, max_steps=1, label_smoothing_factor=0.1)
    trainer.train()
    assert step_logs(trainer)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_of_ones_own(lrqat_trainer, step_logs):
    def halved(outputs, labels, num_items_in_batch=None):
        nats = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return 0.5 * nats / num_items_in_batch

    whole = lrqat_trainer(max_steps=1)
    own = lrqat_trainer(options={"compute_loss_func": halved}, max_steps=1)
    for trainer in (whole, own):
        trainer.train()
    assert step_logs(own)[0]["loss"] == pytest.approx(0.5 * step_logs(whole)[0]["loss"], rel=1e-6)


# Evaluation


def test_evaluation_and_metrics(lrqat_trainer, token_rows):
    options = {
        "eval_dataset": token_rows(4),
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
    }
    trainer = lrqat_trainer(options=options, eval_strategy="steps", eval_steps=1)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3
    for log in evaluations:
        assert log["eval_tokens"] == 4 * 9
        assert log["eval_perplexity"] == pytest.approx(np.exp(log["eval_loss"]), rel=1e-5)
    assert trainer.evaluate()["eval_perplexity"] == evaluations[-1]["eval_perplexity"]


def test_the_best_model_is_loaded_at_the_end(lrqat_trainer, token_rows, trained_tensors, tmp_path):
    """By a metric that falls, and of which more is called better: it is the first."""
    trainer = lrqat_trainer(
        options={"train_dataset": token_rows(2), "eval_dataset": token_rows(2)},
        greater_is_better=True,
        learning_rate=2e-2,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert losses.index(max(losses)) == 0
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
    saved = load_file(tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors")
    loaded = {
        name.replace(".default", ""): tensor
        for name, tensor in trained_tensors(trainer.model).items()
    }
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())


# Again and again


def test_two_runs_are_equal_bit_for_bit(lrqat_trainer, trained_tensors):
    first, second = lrqat_trainer(), lrqat_trainer()
    for trainer in (first, second):
        trainer.train()
    assert same(trained_tensors(first.model), trained_tensors(second.model))


def test_a_second_training_goes_on_at_the_same_rates(lrqat_trainer, step_logs):
    trainer = lrqat_trainer(
        lr_scheduler_type="linear", learning_rate=3e-3, scale_learning_rate=3e-5
    )
    for _ in range(2):
        trainer.train()
        assert [log["A_learning_rate"] for log in step_logs(trainer)] == pytest.approx(
            [3e-3, 2e-3, 1e-3]
        )
        assert [log["scale_learning_rate"] for log in step_logs(trainer)] == pytest.approx(
            [3e-5, 2e-5, 1e-5]
        )


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "schedule_free_adamw"])
def test_resumed_is_uninterrupted(optim, lrqat_trainer, trained_tensors, tmp_path):
    if optim.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    fields = {
        "optim": optim,
        "max_steps": 4,
        "lr_scheduler_type": "linear",
        "B_learning_rate": 2e-3,
    }
    fields["warmup_steps"] = 0.3
    whole = lrqat_trainer(save_strategy="steps", save_steps=2, **fields)
    whole.train()
    resumed = lrqat_trainer(output_dir=str(tmp_path / "resumed"), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same(trained_tensors(whole.model), trained_tensors(resumed.model))


@pytest.mark.filterwarnings("ignore")
def test_hyperparameter_search(lrqat_trainer, make_peft, token_rows, tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tried = []

    class Rates(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                tried.append((logs["scale_learning_rate"], logs["B_learning_rate"]))

    def space(trial):
        return {
            "scale_learning_rate": trial.suggest_categorical(
                "scale_learning_rate", [1e-6, 1e-5, 1e-4]
            ),
            "B_learning_rate": trial.suggest_float("B_learning_rate", 1e-3, 1e-2, log=True),
        }

    trainer = lrqat_trainer(
        options={
            "model_init": lambda: make_peft(init_weights=False),
            "eval_dataset": token_rows(4),
            "callbacks": [Rates()],
        },
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    best = trainer.hyperparameter_search(
        space,
        n_trials=3,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert len({scales for scales, _ in tried}) > 1
    assert len({b for _, b in tried}) == 3
    assert len(tried) == 3 * 2
    assert best.hyperparameters.keys() == {"scale_learning_rate", "B_learning_rate"}
    runs = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert runs == ["run-0", "run-1", "run-2"]
    for number in range(3):
        assert (
            tmp_path / "out" / f"run-{number}" / "checkpoint-2" / "adapter_model.safetensors"
        ).is_file()


def test_model_init(lrqat_trainer, make_peft, trained_tensors):
    fresh = lrqat_trainer(options={"model_init": lambda: make_peft(init_weights=False)})
    fresh.train()
    first = trained_tensors(fresh.model)
    fresh.train()  # from the start again
    assert same(first, trained_tensors(fresh.model))


# The mixin


def test_the_mixin_goes_over_a_trainer_of_ones_own(
    make_peft, lrqat_args, token_rows, trained_tensors, lrqat_trainer
):
    class Doubled(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    class DoubledLRQAT(LRQATTrainerMixin, Doubled):
        pass

    assert issubclass(LRQATTrainer, LRQATTrainerMixin)
    fields = {"optim": "sgd", "max_grad_norm": 0.0}
    doubled = DoubledLRQAT(
        model=make_peft(init_weights=False),
        args=lrqat_args(learning_rate=1e-3, scale_learning_rate=1e-6, **fields),
        train_dataset=token_rows(),
    )
    single = lrqat_trainer(learning_rate=2e-3, scale_learning_rate=2e-6, **fields)
    for trainer in (doubled, single):
        trainer.train()
    expected = trained_tensors(single.model)
    for name, tensor in trained_tensors(doubled.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)


def test_the_record_names_what_was_done(lrqat_trainer, token_rows):
    trainer = lrqat_trainer(
        options={"eval_dataset": token_rows(2)}, eval_strategy="steps", B_learning_rate=2e-3
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    record = LRQATConfig.from_pretrained(trainer.args.output_dir).training_record
    assert record["steps"] == 3
    assert record["settings"]["B_learning_rate"] == 2e-3
    assert record["metrics"].keys() >= {"eval_loss"}
    assert isinstance(trainer.args, LRQATArguments)


def test_an_optimizer_with_groups_of_its_own_is_told(lrqat_trainer, make_peft, monkeypatch):
    """Nothing would say otherwise that the scales move at the factors' rate."""
    told = []
    monkeypatch.setattr(logging.getLogger("peft_lrqat.trainer.optimizer"), "warning", told.append)
    lrqat_trainer().train()
    assert told == []
    model = make_peft()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    lrqat_trainer(model, {"optimizers": (own, None)}).train()
    assert len(told) == 1
    assert "`scale_learning_rate` has no effect" in told[0]


def test_the_record_has_the_rates_that_were_used(lrqat_trainer):
    """A resumed run continues with the checkpoint's, a second one with its optimizer's."""
    trainer = lrqat_trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    asked = {"scale_learning_rate": 3e-4}
    resumed = lrqat_trainer(**asked)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    for each in (trainer, resumed):
        settings = each.model.peft_config["default"].training_record["settings"]
        assert (
            settings["scale_learning_rate"]
            == trainer.args.scale_learning_rate
            != asked["scale_learning_rate"]
        )


def test_a_model_saved_by_itself_has_the_record(lrqat_trainer, make_peft, token_rows, tmp_path):
    """It is what `model.push_to_hub` publishes; of the last training, whoever saves it."""
    model = make_peft()
    for steps in (3, 5):
        trainer = lrqat_trainer(model, {"eval_dataset": token_rows(2)}, max_steps=steps)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        model.save_pretrained(tmp_path / "saved")
        record = LRQATConfig.from_pretrained(tmp_path / "saved").training_record
        assert (record["steps"], record["metrics"]["eval_loss"]) == (steps, loss)


def test_metrics_of_the_record_are_of_these_weights(lrqat_trainer, token_rows):
    sets = {"wiki": token_rows(2), "code": token_rows(4)}
    trainer = lrqat_trainer(options={"eval_dataset": sets})
    trainer.train()
    record = trainer.model.peft_config["default"].training_record
    assert record["metrics"] == {}
    trainer.evaluate()
    record = trainer.model.peft_config["default"].training_record
    assert record["metrics"].keys() == {"eval_wiki_loss", "eval_code_loss"}
    trainer.train()
    assert trainer.model.peft_config["default"].training_record["metrics"] == {}


def test_infinite_metrics_are_kept_in_words(lrqat_trainer, token_rows):
    """JSON has no infinity, and a perplexity at 2 bits may well be."""
    options = {
        "eval_dataset": token_rows(2),
        "compute_metrics": lambda _: {"perplexity": float("inf")},
    }
    trainer = lrqat_trainer(options=options)
    trainer.evaluate()
    trainer.save_model()
    with open(f"{trainer.args.output_dir}/adapter_config.json") as file:
        metrics = json.load(file, parse_constant=pytest.fail)["training_record"]["metrics"]
    assert metrics["eval_perplexity"] == "inf"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_labels_teaches_nothing(
    accumulation, lrqat_trainer, token_rows, step_logs, caplog
):
    """As completions that were cut off; a mean over none of them is 0 / 0."""
    rows = token_rows(6)
    for row in rows[2:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = lrqat_trainer(
        options={"train_dataset": rows},
        per_device_train_batch_size=1,
        max_steps=6 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    assert all(np.isfinite(log["loss"]) for log in step_logs(trainer))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_trial_that_is_not_finite_does_not_end_the_search(lrqat_trainer, make_peft, token_rows):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    trainer = lrqat_trainer(
        options={
            "model_init": lambda: make_peft(init_weights=False),
            "eval_dataset": token_rows(2),
        },
        eval_strategy="steps",
        eval_steps=3,
    )
    rates = {"scale_learning_rate": [1e38, 1e-5]}
    best = trainer.hyperparameter_search(
        lambda trial: {
            "scale_learning_rate": trial.suggest_categorical(
                "scale_learning_rate", rates["scale_learning_rate"]
            )
        },
        n_trials=2,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler(rates, seed=0),
    )
    assert best.hyperparameters == {"scale_learning_rate": 1e-5}
