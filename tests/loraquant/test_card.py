"""The model card of a packed adapter: what it says, and that others' text in it is kept."""

import pytest
import yaml

from peft_lrqat import LoRAQuantConfig
from peft_lrqat.loraquant.card import describe_adapter
from peft_lrqat.shared.card import BEGIN, END


FIELDS = {
    "task_type": "SEQ_CLS",
    "r": 16,
    "lora_alpha": 32,
    "component_bits": {"q": "3311", "k": ""},
}


def write(folder, **fields):
    describe_adapter(str(folder), LoRAQuantConfig(**{**FIELDS, **fields}))
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text.split(BEGIN)[1].split(END)[0]


def test_how_to_load_it(tmp_path):
    metadata, section = write(tmp_path, base_model_name_or_path="user/base")
    assert metadata["base_model"] == "user/base"
    assert metadata["library_name"] == "peft"
    assert metadata["tags"] == ["lora", "loraquant", "peft_lrqat"]
    assert "import peft_lrqat  # registers the type LORAQUANT with PEFT" in section
    assert 'AutoModelForSequenceClassification.from_pretrained("user/base")' in section
    assert "KeyError: 'LORAQUANT'" in section


def test_local_base_is_told_in_words(tmp_path):
    metadata, section = write(tmp_path, base_model_name_or_path="/srv/models/base", task_type=None)
    assert "base_model" not in metadata
    assert "/srv" not in section
    assert "a local directory, `base`. Whoever loads the adapter must supply" in section
    assert "base = AutoModel.from_pretrained" in section


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "paper", "bits_high": 3, "ratio": 0.8}, "paper, 3 bits up to a share of 0.8"),
        ({}, "residual, in the storage that 2 bits up to a share of 0.9"),
        ({"average_bits": 1.5}, "residual, in 1.5 bits of storage for each parameter"),
        ({"zero_points": True}, "integer zero points above 1 bit"),
        ({"use_dora": True, "use_rslora": True}, "rank 16, lora_alpha 32, DoRA, rank-stabilised"),
        ({"component_bits": {"q": ""}}, "components of no bits"),
        (
            {"component_bits": {"q": "3311", "k": "42"}},
            "components of 4, 3, 2, 1 bits, one scale in bfloat16 per 128",
        ),
    ],
)
def test_recipe_in_words(fields, words, tmp_path):
    assert words in write(tmp_path, **fields)[1]


def test_report(tmp_path):
    report = {"relative_error": 0.25, "note|": "<b>", "modules": {"q": {"relative_error": 0.5}}}
    section = write(tmp_path, report=report)[1]
    table = (
        "| measure | value |\n|---|---|\n| relative_error | 0.25 |\n| note&#124; | &lt;b&gt; |\n"
    )
    assert section.endswith(table)
    assert "| measure |" not in write(tmp_path)[1]


def test_other_text_stays(tmp_path):
    write(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("# Model Card", "# My card") + "\nMine.\n")
    write(tmp_path, r=4, component_bits={})
    text = path.read_text()
    assert "# My card" in text
    assert text.endswith("Mine.\n")
    assert "rank 4" in text
    assert "rank 16" not in text
