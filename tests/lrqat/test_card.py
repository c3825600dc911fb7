"""The model card: what it says about base model and training; values cannot break it."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from peft_lrqat import LRQATConfig
from peft_lrqat.lrqat.card import describe_adapter
from peft_lrqat.shared.card import (
    BEGIN,
    END,
    drop_local_base,
    is_hub_id,
    make_publishable,
    training_text,
)


def write(folder, config, text=None):
    if text is not None:
        (folder / "README.md").write_text(text)
    describe_adapter(str(folder), config)
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


@pytest.mark.parametrize("base", ["user/base", "gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_names_of_the_hub(base, tmp_path):
    assert is_hub_id(base)
    metadata, text = write(tmp_path, LRQATConfig(base_model_name_or_path=base))
    assert metadata["base_model"] == base
    assert f'from_pretrained("{base}"' in text
    assert "local directory" not in text


LOCAL = [
    "/srv/models/base",
    "./base",
    "../base",
    "base/",
    "a/b/c",
    "C:\\models\\base",
    "~/base",
    "here",
    "here/inside",
]


@pytest.mark.parametrize("base", LOCAL)
def test_local_directory_is_told_in_words_and_not_in_metadata(base, tmp_path, monkeypatch):
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(base)
    # The card that PEFT writes before we add our part.
    data = ModelCardData(
        base_model=base, tags=[f"base_model:adapter:{base}", f"base_model:{base}", "transformers"]
    )
    metadata, text = write(
        tmp_path, LRQATConfig(base_model_name_or_path=base), str(ModelCard.from_template(data))
    )
    assert metadata["base_model"] == base  # where it is saved, as PEFT has it, and tests
    make_publishable(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert card.data.tags == ["4-bit", "lr-qat", "peft_lrqat", "transformers"]
    assert card.text.strip() == text.split("---\n", 2)[2].strip()
    section = text.split(BEGIN)[1].split(END)[0]
    assert "local directory" in section
    assert "must supply a model with the same weights" in section
    assert f"`{Path(base).name}`" in section
    assert "/srv" not in section


@pytest.mark.parametrize("base", [None, ""])
def test_base_model_without_a_name(base, tmp_path):
    data = ModelCardData(base_model="", tags=["base_model:adapter:"])
    _, text = write(
        tmp_path, LRQATConfig(base_model_name_or_path=base), str(ModelCard.from_template(data))
    )
    make_publishable(tmp_path)
    metadata = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "base_model" not in metadata
    assert metadata["tags"] == ["4-bit", "lr-qat", "peft_lrqat"]
    assert "base model: not named" in text


def test_names_of_the_hub_stay_beside_local_ones():
    tags = [
        "base_model:adapter:user/base",
        "base_model:user/base",
        "base_model:adapter:/srv/base",
        "mine",
    ]
    data = ModelCardData(base_model=["user/base", "/srv/base"], tags=tags)
    drop_local_base(data)
    assert data.base_model == ["user/base"]
    assert data.tags == ["base_model:adapter:user/base", "base_model:user/base", "mine"]


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        (None, "# Model Card for Model ID"),  # PEFT's form
        ("\n# Title\nTheirs.\n", "# Title"),
        ("# Title", "# Title"),
        ("## Part\n\nTheirs.\n", ""),
        ("", ""),
    ],
)
def test_the_section_comes_first_behind_the_title(text, begins, tmp_path):
    _, text = write(tmp_path, LRQATConfig(), text and f"---\nlicense: mit\n---\n{text}")
    body = text.split("---\n", 2)[2]
    before, _, after = body.partition(BEGIN)
    assert before.strip() == begins
    assert ("Theirs." in after.split(END)[1]) == ("Theirs." in text)
    _, again = write(tmp_path, LRQATConfig(bits=3))
    assert again.split("---\n", 2)[2].partition(BEGIN)[0] == before
    assert again.count("\n\n\n\n") <= text.count("\n\n\n\n")


def test_activations_in_the_section(tmp_path):
    metadata, text = write(tmp_path, LRQATConfig(activation_bits=8, kv_cache_bits=4))
    assert "w4a8kv4" in metadata["tags"]
    assert "inputs of these layers: 8 bits, asymmetric, one range per token" in text
    assert "keys and values: 4 bits, asymmetric, one range per token and head" in text
    metadata, text = write(tmp_path, LRQATConfig(kv_cache_bits=8, activation_symmetric=True))
    assert "w4a16kv8" in metadata["tags"]
    assert "inputs of these layers" not in text
    assert "keys and values: 8 bits, symmetric" in text


def test_weights_alone_in_the_section(tmp_path):
    metadata, text = write(tmp_path, LRQATConfig())
    assert metadata["tags"] == ["4-bit", "lr-qat", "peft_lrqat"]
    assert "softmax" not in text


def test_training_record_in_the_section(tmp_path):
    record = {
        "steps": 150,
        "settings": {"learning_rate": 0.005, "optimizer": "adamw"},
        "metrics": {"eval_perplexity": 11.93},
    }
    section = write(tmp_path, LRQATConfig(training_record=record))[1].split(BEGIN)[1].split(END)[0]
    assert "### Training\n\nTrained for 150 steps.\n\n| setting | value |\n|---|---|\n" in section
    assert (
        "| learning_rate | 0.005 |\n| optimizer | adamw |\n\n| metric | value |\n|---|---|\n"
        in section
    )
    assert section.endswith("| eval_perplexity | 11.93 |\n")


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (None, ""),
        ({}, ""),
        ({"steps": None, "settings": {}, "metrics": {}}, ""),
        ({"steps": 0}, "Trained for 0 steps.\n"),
        ({"metrics": {"loss": 1}}, "| metric | value |\n|---|---|\n| loss | 1 |\n"),
        ({"settings": {"lr": 1}, "seconds": 3}, "| setting | value |\n|---|---|\n| lr | 1 |\n"),
    ],
)
def test_any_part_of_the_record_may_be_missing(record, text):
    assert training_text(record) == (text and f"\n### Training\n\n{text}")


def test_values_cannot_break_the_table_or_the_section(tmp_path):
    values = [
        "a\nb",
        "a|b",
        "a\\|b",
        "a\r\n\r\n# heading",
        f"{END} rest",
        "<!-- x",
        "\u2028",
        "",
        None,
        [1, {"a": "b|c"}],
    ]
    record = {
        "steps": "1\n2",
        "settings": {f"name {i}|\n{i}": value for i, value in enumerate(values)},
    }
    for _ in range(2):  # and the next save finds the section again
        describe_adapter(str(tmp_path), LRQATConfig(training_record=record))
    text = (tmp_path / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == text.count("# heading") == 1
    section = text.split(BEGIN)[1].split(END)[0]
    rows = section.split("|---|---|\n")[1].splitlines()
    assert len(rows) == len(values)
    assert all(row.startswith("| ") and row.endswith(" |") and row.count("|") == 3 for row in rows)
    assert "| a&#124;b |" in section
    assert "Trained for 1 2 steps." in section


def test_record_changes_only_its_part_of_the_card(tmp_path):
    for name, record in (("without", None), ("with", {"steps": 3})):
        (tmp_path / name).mkdir()
        write(tmp_path / name, LRQATConfig(training_record=record))
    texts = [(tmp_path / name / "README.md").read_text() for name in ("without", "with")]
    assert texts[0] == texts[1].replace("\n### Training\n\nTrained for 3 steps.\n", "")


def test_text_after_a_lost_end_mark_stays(tmp_path):
    write(tmp_path, LRQATConfig(bits=3))
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace(END, "") + "\nmy own text\n")
    text = write(tmp_path, LRQATConfig(bits=3))[1]
    assert "my own text" in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index("my own text") < text.index(BEGIN)


def test_adapter_in_a_subfolder(tmp_path):
    describe_adapter(str(tmp_path), LRQATConfig(), subfolder="mine")
    assert (
        'from_pretrained(base, "this repository or folder", subfolder="mine")'
        in (tmp_path / "README.md").read_text()
    )


def test_record_is_written_with_the_config(tmp_path, make_peft):
    model = make_peft()
    model.peft_config["default"].training_record = {"steps": 2, "metrics": {"loss": 2.5}}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["training_record"][
        "metrics"
    ] == {"loss": 2.5}
    assert "| loss | 2.5 |" in (tmp_path / "README.md").read_text()
