"""`lrqat plot` draws what a run logged, wherever its state lies."""

import json
import shutil
from pathlib import Path

import pytest
from commands_at_work import refusal, train

from peft_lrqat.cli import main
from peft_lrqat.trainer.plots import plot_runs, read_logs


pytestmark = pytest.mark.usefixtures("own_place")


@pytest.fixture
def run(base):
    options = ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2"]
    options += ["--eval_dataset", "text.txt", "--eval_strategy", "steps", "--eval_steps", "1"]
    assert train(base, *options, steps=4) == 0
    return Path("out")


def texts(svg):
    """Titles and labels, which matplotlib writes as comments beside the outlines of the letters."""
    return [line.strip() for line in Path(svg).read_text().splitlines() if "<!-- " in line]


def test_a_run_its_checkpoint_and_several(run, capsys):
    capsys.readouterr()
    assert main(["plot", "out"]) == 0
    assert capsys.readouterr().out == "out/training.png: 4 logged losses of 1 run(s)\n"
    assert Path("out/training.png").read_bytes().startswith(b"\x89PNG")
    whole = read_logs("out")
    assert [log["step"] for log in whole if "loss" in log] == [1, 2, 3, 4]
    assert [log["step"] for log in read_logs("out/checkpoint-2") if "loss" in log] == [1, 2]
    Path("out/trainer_state.json").unlink()  # it still trains
    assert [log["step"] for log in read_logs("out") if "loss" in log] == [1, 2, 3, 4]
    shutil.copytree("out/checkpoint-2", "half")
    assert main(["plot", "out", "half", "--output", "both.svg"]) == 0
    drawn = " ".join(texts("both.svg"))
    for words in (
        "loss (nats per token)",
        "integers that differ from the start (%)",
        "weights outside the grid (%)",
        "mean change of the scales (%)",
        "learning rate",
        "gradient norm",
        "out, evaluation",
        "half, training",
        "out, scale",
    ):
        assert words in drawn


def test_the_curves_are_what_was_logged(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def seen(axes, steps, values, **look):
        drawn[look["label"]] = (tuple(steps), tuple(values))
        return plot(axes, steps, values, **look)

    monkeypatch.setattr(Axes, "plot", seen)
    logs = [
        {"step": 1, "loss": 3.0, "changed_integers": 0.25, "learning_rate": 0.1},
        {"step": 2, "loss": 2.0, "changed_integers": 0.5, "learning_rate": 0.05},
        {"step": 2, "eval_loss": 2.5},
    ]
    plot_runs({"mine": logs}, str(tmp_path / "plot.svg"))
    assert drawn["training"] == ((1, 2), (3.0, 2.0))
    assert drawn["evaluation"] == ((2,), (2.5,))
    assert drawn["all"] == ((1, 2), (25.0, 50.0))
    assert drawn[None] == ((1, 2), (0.1, 0.05))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no trainer_state.json"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"log_history": []}), "has no logged loss"),
    ],
)
def test_what_plot_refuses(content, message, capsys):
    Path("run").mkdir()
    if content is not None:
        Path("run/trainer_state.json").write_text(content)
    assert message in refusal(capsys, ["plot", "run"])
    assert not Path("run/training.png").exists()
