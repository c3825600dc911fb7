"""Scores in tasks of lm-eval are those of the model's own probabilities."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat.cli import main
from peft_lrqat.demo import model_path


pytest.importorskip("lm_eval")
QUESTIONS = [
    ("The for statement is used to iterate over the elements of a", [" sequence", " banana"], 0),
    ("A class definition is an executable", [" statement", " z"], 1),
    ("The import statement", [" imports a module", " x"], 0),
    ("Lists are", [" q", " mutable sequences of objects"], 1),
    ("An assignment", [" target", " the"], 1),
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A directory with the task `facts`, whose data are local."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    fields = ("question", "choices", "answer")
    rows = [json.dumps(dict(zip(fields, question))) + "\n" for question in QUESTIONS]
    (tmp_path / "facts.jsonl").write_text("".join(rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "facts.yaml").write_text(TASK.format(name="facts", data=tmp_path / "facts.jsonl"))
    return folder


def chosen(model, tokenizer, question, choices):
    """The most probable of the choices, and the most probable by character."""
    before = tokenizer(question)["input_ids"]
    sums = []
    for choice in choices:
        ids = tokenizer(question + choice)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(before), len(ids))))
    by_character = [s / len(choice) for s, choice in zip(sums, choices)]
    return sums.index(max(sums)), by_character.index(max(by_character))


def test_scores_of_several_models(task, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    models = [AutoModelForCausalLM.from_pretrained(model_path())]
    torch.manual_seed(0)
    models.append(AutoModelForCausalLM.from_config(models[0].config))
    models[1].save_pretrained(tmp_path / "random")
    tokenizer.save_pretrained(tmp_path / "random")
    command = ["eval", str(model_path()), str(tmp_path / "random"), "--tasks", "facts"]
    command += ["--task_path", str(task)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    for row, model in zip(found, models):
        right = [
            [own == answer for own in chosen(model, tokenizer, question, choices)]
            for question, choices, answer in QUESTIONS
        ]
        scores = row["tasks"]["facts"]
        assert scores["questions"] == len(QUESTIONS)
        for metric, own in zip(("acc", "acc_norm"), zip(*right)):
            share = sum(own) / len(own)
            assert scores["metrics"][metric]["value"] == pytest.approx(share)
            error = (share * (1 - share) / (len(own) - 1)) ** 0.5
            assert scores["metrics"][metric]["standard_error"] == pytest.approx(error)
        assert "perplexity" not in row
    assert main([*command, "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == [str(model_path()), "facts", "acc"]
    assert lines[1].split()[-1] == "2"


def test_data_that_cannot_be_had_are_told_before_a_model_is_loaded(task, capsys):
    (task / "other.yaml").write_text(TASK.format(name="other", data=task / "missing.jsonl"))
    command = ["eval", "no-model", "--tasks", "other", "--task_path", str(task)]
    with pytest.raises(SystemExit):
        main(command)
    assert "the data of `other` cannot be had" in capsys.readouterr().err


def test_without_lm_eval(monkeypatch, capsys):
    monkeypatch.setattr("peft_lrqat.trainer.tasks.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["eval", "no-model", "--tasks", "arc_easy"])
    assert 'pip install "peft-lrqat[tasks]"' in capsys.readouterr().err
