"""The figures in the logs follow their plain definition, at the right time, for all callbacks."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from peft_lrqat import deployed_weight_bytes
from peft_lrqat.trainer import LRQATCallback, LRQATOptimizerFactory, figures


FIGURES = [
    "clipped_weights",
    "changed_integers",
    "changed_integers_since_log",
    "scale_change",
    "bits_per_weight",
]
GRIDS = {
    "symmetric": {},
    "grouped": {"group_size": 8},
    "asymmetric": {"symmetric": False, "bits": 2},
    "asymmetric, grouped, packed": {"symmetric": False, "group_size": 16, "downcast": "int"},
}


def all_codes(layers):
    return {name: layer.quantized_codes().clone() for name, layer in layers.items()}


def naive(model, layers, before):
    """Every weight of every layer, by the definitions. ``before``: the integers at the last log."""
    counts = {"clipped": 0, "changed": 0, "flipped": 0, "weights": 0}
    moved = []
    for name, layer in layers.items():
        weight, grid = layer.low_rank_weight("default"), layer.base_layer.format.grid
        phi = layer.base_layer.format.decode(weight.phi).float()
        z = phi + weight.gamma * (weight.B @ weight.A)
        counts["clipped"] += ((z.round() < grid.qmin) | (z.round() > grid.qmax)).sum().item()
        codes, nearest = layer.quantized_codes(), phi.round().clamp(grid.qmin, grid.qmax)
        counts["changed"] += (codes.float() != nearest).sum().item()
        counts["flipped"] += (codes != before[name]).sum().item()
        counts["weights"] += codes.numel()
        scale0 = layer.base_layer.scale0
        moved.append(((weight.scale - scale0).abs() / scale0).flatten())
    return {
        "clipped_weights": counts["clipped"] / counts["weights"],
        "changed_integers": counts["changed"] / counts["weights"],
        "changed_integers_since_log": counts["flipped"] / counts["weights"],
        "scale_change": torch.cat(moved).mean().item(),
        "bits_per_weight": 8 * deployed_weight_bytes(model) / counts["weights"],
    }


class Listener(transformers.TrainerCallback):
    """A callback that reports, where transformers places its own."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **_):
        self.seen.append(dict(logs))


# The figures


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_figures_equal_their_definitions(grid, make_peft, disturb, lrqat_layers):
    model = make_peft(**grid)
    layers, measured = lrqat_layers(model), LRQATCallback()
    measured.measure(model)
    start = all_codes(layers)
    with torch.no_grad():
        disturb(model)
        first = naive(model, layers, start)
        assert measured.measure(model) == pytest.approx(first, rel=1e-5)
        middle = all_codes(layers)
        disturb(model, seed=4)
        second = naive(model, layers, middle)
        assert measured.measure(model) == pytest.approx(second, rel=1e-5)
    assert 0.01 < first["changed_integers"] != second["changed_integers_since_log"]
    assert first["clipped_weights"] > 0.001
    assert 0.01 < first["scale_change"] < second["scale_change"]
    assert (
        first["changed_integers_since_log"] == first["changed_integers"]
    )  # it started from round-to-nearest


def test_a_fresh_adapter_has_changed_nothing(make_peft):
    measured = LRQATCallback().measure(make_peft())
    assert (
        measured["changed_integers"],
        measured["changed_integers_since_log"],
        measured["scale_change"],
    ) == (0, 0, 0)


def test_bits_per_weight_are_those_that_ship(make_peft, lrqat_layers):
    model = make_peft(bits=3, group_size=8)  # a bfloat16 scale for 8 weights: 2 bits each
    assert LRQATCallback().measure(model)["bits_per_weight"] == pytest.approx(3 + 16 / 8)


def test_a_sample_is_close(make_peft, disturb, lrqat_layers, monkeypatch):
    """A fifth of the rows estimates a share p of n weights within 4 sqrt(p (1 - p) / n)."""
    model = disturb(make_peft())
    layers = lrqat_layers(model)
    exact = LRQATCallback().measure(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    monkeypatch.setattr(figures, "SAMPLE", 256)
    rows = {
        name: figures._sampled_rows(layer.low_rank_weight("default"), 1)
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        assert len(rows[name]) == 256 // layer.in_features
        assert len(set(rows[name].tolist())) == len(rows[name])
        assert rows[name][0] == 0
        assert rows[name][-1] == layer.out_features - 1
    sampled = LRQATCallback().measure(model)
    seen = sum(len(r) * layers[name].in_features for name, r in rows.items())
    assert seen < weights / 4
    for figure in ("clipped_weights", "changed_integers"):
        p = exact[figure]
        # Entries of a row move together with that row of B: a tenth as many count for independent.
        assert abs(sampled[figure] - p) <= 4 * (p * (1 - p) / (seen / 10)) ** 0.5
    assert sampled["scale_change"] == exact["scale_change"]
    assert sampled["bits_per_weight"] == exact["bits_per_weight"]


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 1 << 18), (3, 1 << 17), (4096, 16), (1 << 20, 1)]
)
def test_sampled_rows_are_there(rows, columns):
    weight = SimpleNamespace(shape=(rows, columns), phi=torch.empty(0))
    sample = figures._sampled_rows(weight, 1)
    assert 0 <= sample.min() <= sample.max() < rows
    assert len(sample) == min(rows, max(1, figures.SAMPLE // columns)) == len(sample.unique())


def test_a_model_without_an_active_adapter_has_no_figures(make_peft, make_base):
    assert LRQATCallback().measure(make_base()) == {}
    model = make_peft()
    model.base_model.set_adapter([])
    assert LRQATCallback().measure(model) == {}


# In training


@pytest.fixture
def calls(monkeypatch):
    """How often anything was computed."""
    counted = []
    measure, look = LRQATCallback.measure, figures.inspect_rows

    def counting(self, model):
        counted.append("measure")
        return measure(self, model)

    def looking(*args):
        counted.append("look")
        return look(*args)

    monkeypatch.setattr(LRQATCallback, "measure", counting)
    monkeypatch.setattr(figures, "inspect_rows", looking)
    return counted


def test_nothing_is_computed_between_logs(calls, lrqat_trainer, lrqat_layers, token_rows):
    fields = {"max_steps": 6, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer = lrqat_trainer(options={"eval_dataset": token_rows(2)}, **fields)
    trainer.train()
    assert calls.count("measure") == 1 + 2  # at the start, and at two logs
    assert calls.count("look") == 3 * 2 * len(lrqat_layers(trainer.model))


def test_everyone_sees_the_figures(lrqat_trainer, step_logs, token_rows):
    listener = Listener()
    options = {"callbacks": [listener], "eval_dataset": token_rows(2)}
    trainer = lrqat_trainer(
        options=options, learning_rate=2e-2, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    heard = [log for log in listener.seen if "loss" in log]
    assert len(heard) == 3
    rates = {"A_learning_rate", "B_learning_rate", "scale_learning_rate"}
    for kept, log in zip(step_logs(trainer), heard):
        assert {*FIGURES, *rates, "A_grad_norm", "B_grad_norm", "scale_grad_norm"} <= kept.keys()
        assert kept == {**log, "step": kept["step"]}
        assert all(isinstance(value, int | float) for value in log.values())
    # Evaluations and the summary at the end are as they were.
    for log in (log for log in listener.seen if "loss" not in log):
        assert not {*FIGURES, *rates} & log.keys()


def test_figures_in_training_equal_their_definitions(
    lrqat_trainer, lrqat_layers, step_logs, make_peft
):
    expected = []

    class Definition(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            self.before = all_codes(lrqat_layers(model))

        def on_log(self, args, state, control, logs, model, **_):
            if "loss" in logs:
                with torch.no_grad():
                    expected.append(naive(model, lrqat_layers(model), self.before))
                self.before = all_codes(lrqat_layers(model))

    fields = {
        "max_steps": 4,
        "learning_rate": 5e-2,
        "scale_learning_rate": 1e-3,
        "logging_steps": 2,
    }
    trainer = lrqat_trainer(make_peft(bits=2), {"callbacks": [Definition()]}, **fields)
    trainer.train()
    logged = [{figure: log[figure] for figure in FIGURES} for log in step_logs(trainer)]
    assert len(logged) == 2
    for ours, theirs in zip(logged, expected):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert logged[0]["changed_integers"] > 0


def test_a_resumed_run_counts_from_where_it_resumed(lrqat_trainer, make_peft, step_logs, tmp_path):
    fields = {"max_steps": 4, "learning_rate": 5e-2, "logging_steps": 1}
    whole = lrqat_trainer(make_peft(bits=2), save_strategy="steps", save_steps=2, **fields)
    whole.train()
    resumed = lrqat_trainer(make_peft(bits=2), output_dir=str(tmp_path / "resumed"), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    names = [
        *FIGURES,
        "A_learning_rate",
        "scale_learning_rate",
        "A_grad_norm",
        "scale_grad_norm",
        "loss",
    ]
    later = [[log[name] for name in names] for log in step_logs(whole)[2:]]
    assert [[log[name] for name in names] for log in step_logs(resumed)[2:]] == later
    assert (
        later[0][FIGURES.index("changed_integers_since_log")]
        < later[0][FIGURES.index("changed_integers")]
    )


def test_a_second_training_counts_anew(lrqat_trainer, make_peft, step_logs):
    trainer = lrqat_trainer(make_peft(bits=2), max_steps=2, learning_rate=5e-2)
    trainer.train()
    trainer.train()
    first = step_logs(trainer)[0]
    assert 0 < first["changed_integers_since_log"] < first["changed_integers"]


def test_the_rate_is_that_of_the_step(lrqat_trainer, step_logs):
    fields = {
        "max_steps": 4,
        "lr_scheduler_type": "linear",
        "learning_rate": 4e-3,
        "B_learning_rate": 8e-3,
    }
    trainer = lrqat_trainer(**fields, scale_learning_rate=4e-5)
    trainer.train()
    logs = step_logs(trainer)
    assert [log["A_learning_rate"] for log in logs] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert [log["B_learning_rate"] for log in logs] == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3])
    assert [log["scale_learning_rate"] for log in logs] == pytest.approx([4e-5, 3e-5, 2e-5, 1e-5])
    assert [log["learning_rate"] for log in logs] == [log["A_learning_rate"] for log in logs]


def test_attached_to_an_unmodified_trainer(make_peft, lrqat_args, token_rows, step_logs):
    listener = Listener()
    trainer = transformers.Trainer(
        model=make_peft(),
        args=lrqat_args(transformers.TrainingArguments),
        train_dataset=token_rows(),
        optimizer_cls_and_kwargs=(LRQATOptimizerFactory, {"lr": 1e-2, "scale_lr": 1e-4}),
        callbacks=[listener],
    )
    attached = LRQATCallback.attach(trainer)
    assert trainer.callback_handler.callbacks[0] is attached
    trainer.train()
    for log in [*step_logs(trainer), *listener.seen[:3]]:
        assert set(FIGURES) <= log.keys()
        assert (log["A_learning_rate"], log["scale_learning_rate"]) == (1e-2, 1e-4)


def test_without_named_groups_there_are_no_rates(make_peft, lrqat_args, token_rows, step_logs):
    args = lrqat_args(transformers.TrainingArguments)
    trainer = transformers.Trainer(model=make_peft(), args=args, train_dataset=token_rows())
    LRQATCallback.attach(trainer)
    trainer.train()
    assert all(set(FIGURES) <= log.keys() for log in step_logs(trainer))
    assert not any(key.endswith("_learning_rate") for log in step_logs(trainer) for key in log)


def test_tensorboard_files_hold_the_figures(lrqat_trainer, step_logs, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = lrqat_trainer(report_to=["tensorboard"], learning_rate=2e-2)
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    for name in [*FIGURES, "A_learning_rate", "scale_learning_rate", "B_grad_norm"]:
        written = [event.value for event in events.Scalars(f"train/{name}")]
        assert written == pytest.approx([log[name] for log in step_logs(trainer)], rel=1e-6)
