"""`--config run.yaml`: the options of a file, which the command line overrules."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands_at_work import refusal, train
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_lrqat.cli import main
from peft_lrqat.cli.run_file import with_run_file


pytestmark = pytest.mark.usefixtures("own_place")


def test_words_of_a_file_come_after_those_of_the_line():
    Path("run.yaml").write_text(
        "bits: 3\ngroup-size: -1\nsymmetric: false\nbits_pattern: {down_proj: 4}\n"
        "dataset: [a.txt, b.txt]\nr: null\nseed: 1\n"
    )
    expected = ["x", "--seed", "5", "--bits", "3", "--group_size", "-1", "--symmetric", "false"]
    expected += ["--bits_pattern", '{"down_proj": 4}', "--dataset", "a.txt", "b.txt"]
    assert with_run_file(["x", "--config", "run.yaml", "--seed", "5"]) == expected
    assert with_run_file(["x", "--config=run.yaml", "--seed", "5"]) == expected
    assert "--symmetric" not in with_run_file(["--config", "run.yaml", "--no_symmetric"])
    assert with_run_file(["--bits", "3"]) == ["--bits", "3"]


def test_a_run_is_repeated_from_what_it_leaves(base):
    assert train(base, "--no_symmetric", "--scale_dtype", "float16", "--seed", "3") == 0
    kept = yaml.safe_load(Path("out/run.yaml").read_text())
    assert kept["bits"] == 3
    assert kept["symmetric"] is False
    assert kept["dataset"] == ["text.txt"]
    assert "learning_rate" not in kept
    assert main(["train", "--config", "out/run.yaml", "--output_dir", "again"]) == 0
    first, second = (load_file(f"{d}/adapter_model.safetensors") for d in ("out", "again"))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
    # The line wins, and what decided is what is kept.
    options = ["--output_dir", "other", "--bits", "4"]
    assert main(["train", "--config", "out/run.yaml", *options]) == 0
    assert PeftConfig.from_pretrained("other").bits == 4
    assert yaml.safe_load(Path("other/run.yaml").read_text())["bits"] == 4


def test_every_command_takes_a_file(base, capsys):
    Path("eval.yaml").write_text("dataset: text.txt\nwindow: 16\njson: true\n")
    capsys.readouterr()
    assert main(["eval", str(base), "--config", "eval.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["window"] == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "run.yaml cannot be read"),
        ("- bits\n", "must hold options and values"),
        ("bits: [", "cannot be read"),
        ("bitz: 3\n", "did you mean --bits?"),
    ],
)
def test_files_that_are_refused(base, capsys, text, message):
    if text is not None:
        Path("run.yaml").write_text(text)
    command = ["train", "--model", base, "--dataset", "text.txt", "--output_dir", "out"]
    assert message in refusal(capsys, [*command, "--config", "run.yaml"])


def test_a_wrong_path_of_data_is_found_before_the_model_is_loaded(base, capsys, monkeypatch):
    def load(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("peft_lrqat.cli.train.load_base", load)
    command = ["train", "--model", base, "--dataset", "text.txt", "--output_dir", "out"]
    line = refusal(capsys, [*command, "--eval_dataset", "nowhere.txt"])
    assert "no such file or directory: 'nowhere.txt'" in line


def test_a_base_is_made_again_from_what_it_left(base):
    options = ["--bits", "2", "--no_symmetric", "--group_size", "16", "--downcast", "int"]
    assert main(["prepare", "--model", str(base), "--output", "low", *options]) == 0
    kept = yaml.safe_load(Path("low/run.yaml").read_text())
    assert (kept["bits"], kept["symmetric"], kept["output"]) == (2, False, "low")
    assert main(["prepare", "--config", "low/run.yaml", "--output", "again"]) == 0
    one, two = (load_file(Path(place) / "model.safetensors") for place in ("low", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    AutoModelForCausalLM.from_pretrained("low")
