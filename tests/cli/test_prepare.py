"""`lrqat prepare`, and training on what it makes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitConfig, export_model, load_low_bit
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.cli import main
from peft_lrqat.cli.prepare import FILLED_IN, BaseArguments, parse_size
from peft_lrqat.demo import model_path


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_path(), "plain")


def refusal(capsys, argv):
    """The line on stderr that ends a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_base_is_made_as_asked(capsys):
    words = ["--bits", "3", "--group_size", "32", "--bits_pattern", '{"down_proj": 8}']
    command = ["prepare", "--model", "plain", "--output", "base", *words, "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bits"], found["group_size"]) == (3, 32)
    model = AutoModelForCausalLM.from_pretrained("base")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DowncastLinear)}
    assert found["modules"] == len(layers)
    for name, layer in layers.items():
        assert layer.format.grid.bits == (8 if "down_proj" in name else 3)
        assert layer.format.grid.group_size == 32
    expected = load_low_bit(
        "plain", LowBitConfig(bits=3, group_size=32, bits_pattern={"down_proj": 8})
    )
    expected.save_pretrained("saved")
    ours, theirs = (load_file(Path(f) / "model.safetensors") for f in ("base", "saved"))
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


def test_options_are_the_fields_of_the_config():
    fields = {field.name for field in dataclasses.fields(LowBitConfig)}
    assert set(BaseArguments.__dataclass_fields__) == fields - FILLED_IN


def test_plain_prepare_train_export_load(capsys):
    """The way of a user: prepare, train on the base, export, load the export."""
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    base = ["--bits", "3", "--group_size", "32"]
    assert main(["prepare", "--model", "plain", "--output", "base", *base]) == 0
    command = ["train", "--model", "base", "--dataset", "text.txt", "--output_dir", "out"]
    command += ["--block_size", "16", "--max_steps", "2", "--r", "4", "--disable_tqdm", "true"]
    assert main(command) == 0
    saved = json.loads(Path("out/adapter_config.json").read_text())
    assert (saved["bits"], saved["group_size"], saved["downcast"]) == (3, 32, "int")
    assert main(["export", "--adapter", "out", "--output", "exported", "--verify"]) == 0
    model = AutoModelForCausalLM.from_pretrained("exported")
    assert model.config.quantization_config.quantization_config.format == "pack-quantized"


def test_options_that_disagree_with_the_base_are_refused(capsys):
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    assert main(["prepare", "--model", "plain", "--output", "base", "--bits", "3"]) == 0
    command = ["train", "--model", "base", "--dataset", "text.txt", "--output_dir", "out"]
    assert "`bits` is 4, but the low-bit base holds" in refusal(
        capsys, [*command, "--block_size", "16", "--bits", "4"]
    )


def test_integers_are_taken_over(make_exported, capsys):
    make_exported("export")
    assert main(["prepare", "--from", "export", "--output", "base"]) == 0
    stored = json.loads(Path("base/config.json").read_text())["quantization_config"]
    assert stored["source"]["quant_method"] == "gptq"
    assert "cannot be given with --from" in refusal(
        capsys, ["prepare", "--from", "export", "--output", "again", "--bits", "4"]
    )
    assert not Path("again").exists()


@pytest.fixture
def make_exported():
    """``make_exported(path)``: a GPTQ checkpoint of our own exporter."""
    from peft import get_peft_model

    from peft_lrqat import LRQATConfig

    def make(path):
        model = AutoModelForCausalLM.from_pretrained("plain")
        config = LRQATConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", bits=4, group_size=32
        )
        export_model(get_peft_model(model, config), path, format="gptq", progress=False)

    return make


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "plain"], "the following arguments are required: --output"),
        (["--output", "base"], "give either --model"),
        (["--model", "plain", "--from", "plain", "--output", "base"], "give either --model"),
        (["--from", "plain", "--output", "base"], "is not quantised"),
        (["--model", "plain", "--output", "base", "--bits", "9"], "`bits` must be an integer"),
        (["--model", "plain", "--output", "base", "--group_size", "7"], "does not divide"),
        (["--model", "plain", "--output", "plain"], "nothing is written over it"),
        (["--model", "plain", "--output", "base", "--max_shard_size", "big"], "such as 500MB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_it_refuses(words, message, capsys):
    assert message in refusal(capsys, ["prepare", *words])
    assert not Path("base").exists()
    assert not Path("base.partial").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500mb", 5 * 10**8), ("1.5KB", 1500), ("4096", 4096)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


CALIBRATION = ["--bits", "2", "--group_size", "32", "--no_symmetric", "--downcast", "fixed8"]
DATA = ["--dataset", "text.txt", "--block_size", "16", "--calibration_tokens", "128"]


def text():
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)


@pytest.mark.parametrize("method", [["blocks", "--epochs", "1"], ["gptq"]], ids=["blocks", "gptq"])
def test_a_calibrated_base(method, capsys):
    text()
    command = ["prepare", "--model", "plain", "--output", "base", *CALIBRATION, *DATA]
    assert main([*command, "--method", *method, "--plot", "losses.png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(after < before for before, after in found["losses"].values())
    assert len(found["losses"]) == 6
    assert Path("losses.png").read_bytes().startswith(b"\x89PNG")
    made = json.loads(Path("base/config.json").read_text())["quantization_config"]
    assert made["calibration"]["method"] == method[0]
    assert made["calibration"]["tokens"] == 128
    command = ["train", "--model", "base", "--dataset", "text.txt", "--output_dir", "out"]
    assert main([*command, "--block_size", "16", "--max_steps", "1", "--disable_tqdm", "true"]) == 0
    saved = json.loads(Path("out/adapter_config.json").read_text())
    assert (saved["bits"], saved["symmetric"], saved["downcast"]) == (2, False, "fixed8")


def test_losses_of_blocks_are_printed(capsys):
    text()
    command = ["prepare", "--model", "plain", "--output", "base", *CALIBRATION, *DATA]
    assert main([*command, "--method", "gptq"]) == 0
    assert re.search(r"model\.layers\.5 +0\.\d{4} -> 0\.\d{4}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "blocks"], "--method blocks needs --dataset"),
        (["--dataset", "text.txt"], "--dataset changes nothing without calibration"),
        (["--method", "gptq", "--epochs", "2", *DATA], "--epochs is an option of --method blocks"),
        (["--damping", "0.1"], "--damping is an option of --method gptq"),
    ],
)
def test_calibration_options_that_do_not_fit(words, message, capsys):
    text()
    command = ["prepare", "--model", "plain", "--output", "base"]
    assert message in refusal(capsys, [*command, *words])
    assert not Path("base").exists()
