"""The commands of `lrqat`: what is asked for is done, what cannot be done is one clear line."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands_at_work import TEXT, refusal, train
from hub_server import StandInHub, run_client
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
)

from peft_lrqat import LRQATConfig
from peft_lrqat.cli import main
from peft_lrqat.cli.adapters import RECIPE, _warn, gain_kept
from peft_lrqat.cli.options import NOT_FOR_TRAINING, AdapterArguments, adapter_config
from peft_lrqat.cli.parser import Parser
from peft_lrqat.cli.stop import StopOnSignal
from peft_lrqat.demo import run
from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter
from peft_lrqat.shared.config import AdapterConfig
from peft_lrqat.trainer import LRQATTrainingArguments


pytestmark = pytest.mark.usefixtures("own_place")


def evaluate(capsys, *options):
    capsys.readouterr()
    assert main(["eval", "--dataset", "text.txt", "--window", "16", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


# Options


def parse(argv, kind):
    parser = Parser("train", "", [kind], "", "")
    return parser.parse(argv)[0]


def test_without_options_the_config_is_the_default_one():
    assert adapter_config(parse([], AdapterArguments)) == LRQATConfig(
        task_type="CAUSAL_LM", target_modules="all-linear"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--target_modules", "all-linear"], {"target_modules": "all-linear"}),
        (["--target_modules", "q_proj"], {"target_modules": ["q_proj"]}),
        (
            ["--target_modules", "q_proj", "mlp.up_proj"],
            {"target_modules": ["q_proj", "mlp.up_proj"]},
        ),
        (["--target_modules", r".*\.(q|v)_proj"], {"target_modules": r".*\.(q|v)_proj"}),
        (["--exclude_modules", ".*mlp.*"], {"exclude_modules": ".*mlp.*"}),
        (["--bits", "2", "--no_symmetric"], {"bits": 2, "symmetric": False}),
        (["--symmetric", "false", "--group-size", "16"], {"symmetric": False, "group_size": 16}),
        (["--bits_pattern", '{"down_proj": 4}'], {"bits_pattern": {"down_proj": 4}}),
        (
            ["--downcast", "int", "--scale_dtype", "float16"],
            {"downcast": "int", "scale_dtype": "float16"},
        ),
        (
            ["--layers_to_transform", "0", "2", "--target_modules", "q_proj"],
            {"layers_to_transform": [0, 2], "target_modules": ["q_proj"]},
        ),
    ],
)
def test_options_become_the_config(words, expected):
    assert adapter_config(parse(words, AdapterArguments)) == LRQATConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **expected}
    )


def test_training_defaults_are_the_recipe():
    args = parse(["--output_dir", "out"], LRQATTrainingArguments)
    assert (args.learning_rate, args.scale_learning_rate, args.weight_decay) == (5e-3, None, 0)
    assert (args.A_learning_rate, args.B_learning_rate, args.distillation_weight) == (None, None, 0)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.95, 1.0)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000), args.report_to) == (
        "linear",
        100,
        [],
    )


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "prepare",
        "eval",
        "quantize-adapter",
        "dequantize-adapter",
        "recipe",
        "export",
        "demo",
    ],
)
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.count(f"  lrqat {command}") >= 2  # two examples
    assert "None" not in text.split("training (transformers")[0]


def test_help_of_train_explains_every_field_with_the_words_of_the_config(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = "".join(capsys.readouterr().out.split())
    inherited = {field.name for field in dataclasses.fields(AdapterConfig)}
    for field in dataclasses.fields(LRQATConfig):
        assert (f"--{field.name}" in text) == (field.name not in NOT_FOR_TRAINING | inherited), (
            field.name
        )
        if f"--{field.name}" in text:
            assert "".join(field.metadata["help"].split()) in text


def test_help_of_quantize_adapter_explains_the_recipe_with_the_words_of_the_config(capsys):
    with pytest.raises(SystemExit):
        main(["quantize-adapter", "--help"])
    text = "".join(capsys.readouterr().out.split())
    inherited = {field.name for field in dataclasses.fields(AdapterConfig)}
    for field in dataclasses.fields(LoRAQuantConfig):
        if field.name in inherited:
            continue
        # What is taken over from the LoRA adapter or filled in is not asked for.
        asked = not any(words in field.metadata["help"] for words in ("taken over", "filled in"))
        assert (field.name in RECIPE) == (
            asked and field.name not in ("fan_in_fan_out", "format_version")
        )
        if field.name in RECIPE:
            assert f"--{field.name}" in text
            assert "".join(field.metadata["help"].split()) in text


# Training and evaluation


def test_train_then_evaluate(base, capsys):
    assert train(base, "--eval_dataset", "text.txt", "--learning_rate", "2e-2") == 0
    said = capsys.readouterr().out
    assert (
        "7 layers quantised (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)" in said
    )
    line = next(line for line in said.splitlines() if line.startswith("perplexity before training"))
    before, after = numbers(line)
    assert after < before

    # The adapter names its base by an absolute path, and comes with its tokenizer.
    assert PeftConfig.from_pretrained("out").base_model_name_or_path == str(base.resolve())
    assert AutoTokenizer.from_pretrained("out")("dog") == AutoTokenizer.from_pretrained(base)("dog")

    unquantised = evaluate(capsys, "--model", str(base))
    adapted = evaluate(capsys, "--model", str(base), "--adapter", "out")
    assert f"{adapted['perplexity']:.3f}" == f"{after:.3f}"
    assert adapted["perplexity"] != unquantised["perplexity"]
    # Without --model the adapter's own base is used. Merging changes no digit.
    alone = evaluate(capsys, "--adapter", "out")
    merged = evaluate(capsys, "--adapter", "out", "--merge")
    assert alone["perplexity"] == merged["perplexity"] == adapted["perplexity"]
    assert (merged["window"], merged["stride"], merged["merge"]) == (16, None, True)


def numbers(line):
    """The two perplexities in the line that `lrqat train` ends with."""
    words = line.replace(",", "").replace(";", "").split()
    return [float(word) for word in words if "." in word and word.replace(".", "").isdigit()]


CHATS = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b" * n}]}
    for n in range(1, 7)
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.mark.parametrize(
    ("loss", "scored", "shown"), [("completion", 27, "u:a?;a:⟦b;⟧"), ("all", 63, "⟦u:a?;a:b;⟧")]
)
def test_train_on_chats(base, capsys, loss, scored, shown):
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    Path("template.jinja").write_text(TEMPLATE)
    options = ["--dataset", "chat.jsonl", "--eval_dataset", "chat.jsonl", "--loss", loss]
    assert train(base, *options, "--chat_template", "template.jinja") == 0
    out = capsys.readouterr().out
    # 6 answers of 1 to 6 tokens and their end; or all but the first token of each row.
    assert f"6 examples in 6 blocks, {scored:,} scored tokens" in out
    assert shown in out
    assert f"{scored:,} tokens scored" in out
    # What the model was trained to answer in goes with it.
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE


def test_chats_need_a_template_and_no_stream(base, capsys):
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    command = ["train", "--model", base, "--dataset", "chat.jsonl", "--output_dir", "out"]
    command += ["--block_size", "16", "--max_steps", "1"]
    assert "give one with `--chat_template FILE`" in refusal(capsys, command)
    assert "leave it out for chats" in refusal(capsys, [*command, "--streaming"])


@pytest.fixture
def kinds(base, tmp_path):
    """An adapter and what is made of it: four more of the same predictions, and one packed."""
    assert train(base, "--learning_rate", "2e-2", "--scale_dtype", "bfloat16") == 0
    assert main(["export", "--adapter", "out", "--output", "ct"]) == 0
    assert main(["export", "--adapter", "out", "--output", "gptq", "--format", "gptq"]) == 0
    assert main(["export", "--adapter", "out", "--output", "gguf", "--format", "gguf"]) == 0
    assert main(["export", "--adapter", "out", "--output", "own", "--format", "packed"]) == 0
    assert main(["quantize-adapter", "out", "tiny"]) == 0
    return ["out", "ct", "gptq", "gguf", "own"], "tiny"


def test_eval_of_everything_that_holds_a_model(base, kinds, capsys):
    same, packed = kinds
    capsys.readouterr()
    options = ["--dataset", "text.txt", "--window", "16", "--json"]
    assert main(["eval", str(base), *same, packed, *options]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    rows = {row["name"]: row for row in found}
    assert list(rows) == [str(base), *same, packed]
    for name in same:
        assert rows[name]["perplexity"] == pytest.approx(rows["out"]["perplexity"], rel=1e-5), name
    assert rows[packed]["perplexity"] != rows["out"]["perplexity"] != rows[str(base)]["perplexity"]
    # One token per byte, and one that ends the text.
    size = len(TEXT.encode())
    per_byte = rows["out"]["nats_per_token"] / math.log(2) * (size + 1) / size
    assert rows["out"]["bits_per_byte"] == pytest.approx(per_byte)
    assert rows["out"]["nats_standard_error"] > 0
    assert main(["eval", "gguf", "out", "--dataset", "text.txt"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert re.match("gguf +GGUF file ", table[1])
    assert re.match("out +LRQAT adapter ", table[2])
    # The adapter was trained on examples of 16 tokens; one window for all.
    assert table[3].startswith("windows of 16, not overlapping")


def test_compare(base, kinds, capsys):
    _, packed = kinds
    command = ["compare", "out", "ct", str(base), packed, "--dataset", "text.txt"]
    capsys.readouterr()
    assert main([*command, "--json", "--plot", "compare.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "out"
    assert found["window"] == 16
    equal, unlike, near = found["candidates"]
    assert equal["name"] == "ct"
    assert abs(equal["kl_mean"]) < 1e-6
    assert equal["same_top"] == 1.0
    assert unlike["kl_mean"] > 1e-4
    assert unlike["kl_99"] > unlike["kl_mean"]
    assert unlike["kl_error"] > 0
    assert near["nats_difference"] == pytest.approx(
        near["nats_per_token"] - equal["nats_per_token"], abs=1e-6
    )
    assert Path("compare.png").stat().st_size > 5000
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["ct", str(base), packed]
    assert "windows of 16, not overlapping" in lines[4]


def test_compare_refuses_another_tokenizer(base, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(other)
    line = refusal(capsys, ["compare", base, other, "--dataset", "text.txt", "--window", "16"])
    assert "another tokenizer" in line
    assert "bits per byte" in line


def test_eval_prints_the_window(base, capsys):
    assert (
        main(
            [
                "eval",
                "--model",
                str(base),
                "--dataset",
                "text.txt",
                "--window",
                "16",
                "--stride",
                "8",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.startswith("perplexity ")
    assert (
        f"{len(TEXT):,} tokens scored; windows of 16, stride 8" in said
    )  # one token per byte and the end, less the first


def test_resumed_training_ends_where_uninterrupted_training_does(base):
    train(base, "--save_steps", "2", steps=4)
    train(base, "--resume_from_checkpoint", "out/checkpoint-2", steps=4, output="resumed")
    whole, resumed = (load_file(f"{name}/adapter_model.safetensors") for name in ("out", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    half = load_file("out/checkpoint-2/adapter_model.safetensors")
    assert not all(torch.equal(whole[name], half[name]) for name in whole)


def test_resume_from_the_last_checkpoint(base):
    train(base, "--save_steps", "2", steps=2)
    train(base, "--resume_from_checkpoint", "last", steps=3)
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize("number", StopOnSignal.SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_a_checkpoint_and_says_how_to_continue(base, number, monkeypatch, capsys):
    step = Trainer.training_step

    def with_a_signal(self, *args, **kwargs):
        if self.state.global_step == 1:
            signal.raise_signal(number)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", with_a_signal)
        assert train(base, "--eval_dataset", "text.txt", steps=4) == 128 + number
    said = capsys.readouterr().out
    assert "stopped after step 2 of 4; to continue, run the same command with" in said
    assert "adapter saved" not in said
    train(base, "--eval_dataset", "text.txt", "--resume_from_checkpoint", "last", steps=4)
    train(base, "--eval_dataset", "text.txt", steps=4, output="whole")
    whole, resumed = (load_file(f"{name}/adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def logged(output="out"):
    """What was logged of each training step."""
    log = json.loads(Path(output, "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def test_any_optimizer_with_rates_of_their_own(base):
    rates = [
        "--learning_rate",
        "2e-2",
        "--B_learning_rate",
        "1e-2",
        "--scale_learning_rate",
        "1e-4",
    ]
    options = [
        "--optim",
        "adafactor",
        "--lr_scheduler_type",
        "constant",
        "--logging_steps",
        "1",
        "--warmup_steps",
        "0",
    ]
    assert train(base, *rates, *options) == 0
    assert len(logged()) == 3
    for entry in logged():
        assert [entry[f"{name}_learning_rate"] for name in ("A", "B", "scale")] == [
            2e-2,
            1e-2,
            1e-4,
        ]
        assert {
            "clipped_weights",
            "changed_integers",
            "bits_per_weight",
            "scale_grad_norm",
        } <= entry.keys()


def test_distillation_from_the_model_itself(base):
    """The teacher is loaded once more from --model."""
    assert (
        train(
            base,
            "--distillation_weight",
            "0.5",
            "--distillation_temperature",
            "2",
            "--logging_steps",
            "1",
        )
        == 0
    )
    assert all(entry["distillation_loss"] > 0 for entry in logged())


def test_streaming(base):
    assert train(base, "--streaming", steps=2) == 0
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 2


def test_the_command_runs_as_a_module(base):
    command = [
        sys.executable,
        "-m",
        "peft_lrqat.cli",
        "eval",
        "--model",
        str(base),
        "--dataset",
        "nowhere.txt",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(
        "lrqat eval: error: no such file or directory: 'nowhere.txt'"
    )
    assert "Traceback" not in done.stderr


def test_bars_in_a_log_have_few_lines(base):
    start = "from lrqat_command import main; main()"
    command = [sys.executable, "-c", start, "eval", str(base)]
    command += ["--dataset", "text.txt", "--window", "8", "--batch_size", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_MININTERVAL"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    # 100 windows of a few milliseconds each: the start, and at most an end.
    assert done.stderr.count("perplexity:") <= 2


# LoRA adapters


@pytest.fixture
def lora(base):
    """A LoRA adapter in the directory `lora`, with factors in float32."""
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained("lora")
    return "lora"


def test_gain_kept():
    share = gain_kept(perplexity_without=84.4, perplexity_before=16.6, perplexity=18.1)
    assert share == pytest.approx(math.log(84.4 / 18.1) / math.log(84.4 / 16.6))
    assert gain_kept(perplexity_without=5, perplexity_before=5, perplexity=4) is None


def test_quantising_says_what_is_kept_and_the_card_too(lora, capsys):
    command = ["quantize-adapter", lora, "kept", "--dataset", "text.txt", "--window", "16"]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plain = evaluate(capsys, "--adapter", lora)
    assert found["perplexity_before"] == pytest.approx(plain["perplexity"])
    assert found["perplexity_without"] == pytest.approx(
        evaluate(capsys, "--model", plain["model"])["perplexity"]
    )
    names = ("perplexity_without", "perplexity_before", "perplexity")
    assert found["gain_kept"] == gain_kept(**{name: found[name] for name in names})
    assert "| perplexity_without |" in Path("kept/README.md").read_text()
    # The figures change no digest: the adapter still loads.
    assert evaluate(capsys, "--adapter", "kept")["perplexity"] == pytest.approx(found["perplexity"])


def test_sweep(lora, capsys):
    command = ["quantize-adapter", lora, "swept", "--sweep", "4", "6", "--group_size", "16"]
    command += ["--dataset", "text.txt", "--window", "16"]
    capsys.readouterr()
    assert main(command) == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split()[-4:] == ["error", "perplexity", "gain", "kept"]
    assert [row.split()[0] for row in rows] == ["4", "6"]
    assert "saved in swept" in last
    assert sorted(os.listdir("swept")) == ["4-bits", "6-bits", "sweep.png"]
    for bits, row in zip((4, 6), rows, strict=True):
        adapter = PeftConfig.from_pretrained(f"swept/{bits}-bits")
        assert adapter.average_bits == bits
        assert adapter.report["nominal_bits_per_parameter"] <= bits
        assert f"{adapter.report['bytes']:,}" in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "4", "--average_bits", "3"], "--average_bits does not go with it"),
        (["--sweep", "4", "4"], "a number of bits twice"),
    ],
)
def test_what_a_sweep_refuses(lora, capsys, options, message):
    assert message in refusal(capsys, ["quantize-adapter", lora, "swept", *options])
    assert not Path("swept").exists()


def test_warnings_of_what_packing_loses(monkeypatch):
    said = []
    monkeypatch.setattr("peft_lrqat.cli.adapters.logger.warning", said.append)
    _warn({"relative_error": 0.6, "relative_error_of_modules": {"a": 1.0, "b": 0.2}}, "out")
    _warn({"relative_error": 0.6, "relative_error_of_modules": {"a": 0.7, "b": 0.2}}, "out")
    _warn({"relative_error": 0.2, "relative_error_of_modules": {"a": 0.2, "b": 0.2}}, "out")
    zero, off = said
    assert "1 of 2 modules are stored as zero, such as `a`" in zero
    assert "off by 60%" in off


def test_quantize_then_dequantize(lora, capsys):
    capsys.readouterr()
    recipe = [
        "--bits_high",
        "3",
        "--ratio",
        "0.8",
        "--group-size",
        "16",
        "--scale_dtype",
        "float16",
    ]
    assert main(["quantize-adapter", lora, "packed", *recipe]) == 0
    said = capsys.readouterr().out.splitlines()
    expected = quantize_adapter(
        lora,
        "expected",
        LoRAQuantConfig(bits_high=3, ratio=0.8, group_size=16, scale_dtype="float16"),
    )
    assert (
        Path("packed/adapter_config.json").read_bytes()
        == Path("expected/adapter_config.json").read_bytes()
    )
    report = expected.report
    assert [line.rsplit("  ", 1)[-1].strip() for line in said] == [
        f"{report['relative_error']:.4f}",
        f"{report['bits_per_parameter']:.3f}",
        f"{report['nominal_bits_per_parameter']:.3f}",
        "2,048",  # two layers of 4 x (32 + 32), 4 bytes each
        f"{report['bytes']:,}",
        "adapter saved in packed",
    ]
    assert main(["dequantize-adapter", "packed", "back", "--dtype", "bfloat16"]) == 0
    assert "adapter saved in back" in capsys.readouterr().out
    source, back = (load_file(f"{name}/adapter_model.safetensors") for name in (lora, "back"))
    assert {k: t.shape for k, t in source.items()} == {k: t.shape for k, t in back.items()}
    assert {t.dtype for t in back.values()} == {torch.bfloat16}
    assert PeftConfig.from_pretrained("back").peft_type == "LORA"


def test_adapters_in_json(lora, capsys):
    capsys.readouterr()
    assert (
        main(
            [
                "quantize-adapter",
                lora,
                "packed",
                "--average_bits",
                "2",
                "--group_size",
                "16",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    made = PeftConfig.from_pretrained("packed")
    assert {name: found[name] for name in RECIPE} == {name: getattr(made, name) for name in RECIPE}
    assert {name: found[name] for name in made.report} == made.report
    assert (found["source"], found["target"]) == ("lora", "packed")
    assert main(["dequantize-adapter", "packed", "back", "--json"]) == 0
    size = Path("back/adapter_model.safetensors").stat().st_size
    assert json.loads(capsys.readouterr().out) == {
        "source": "packed",
        "target": "back",
        "dtype": "float16",
        "bytes": size,
    }


def test_a_packed_adapter_is_published(lora, tmp_path):
    code = (
        "from peft_lrqat.cli import main\n"
        "main(['quantize-adapter', 'lora', 'packed', '--push_to_hub', 'user/packed'])\n"
        "main(['dequantize-adapter', 'user/packed', 'back'])\n"
        "main(['quantize-adapter', 'user/none', 'other'])"
    )
    with StandInHub() as hub:
        with pytest.raises(
            AssertionError,
            match="lrqat quantize-adapter: error: user/none is not a directory, and not a rep",
        ):
            run_client(hub, code, tmp_path)
        files = hub.repos["user/packed"].files
    assert files.keys() - {".gitattributes"} == {path.name for path in Path("packed").iterdir()}
    assert (
        files["adapter_model.safetensors"] == Path("packed/adapter_model.safetensors").read_bytes()
    )
    assert Path("back/adapter_model.safetensors").is_file()


# LR-QAT adapters: their factors packed, and their models exported


def test_factors_of_an_lrqat_adapter_are_packed_and_compared(base, capsys):
    train(base)
    capsys.readouterr()
    words = ["out", "packed", "--average_bits", "4", "--dataset", "text.txt", "--window", "16"]
    assert main(["quantize-adapter", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["flipped_integers"] < 0.5
    assert found["perplexity_before"] == pytest.approx(
        evaluate(capsys, "--adapter", "out")["perplexity"]
    )
    assert found["perplexity"] == pytest.approx(
        evaluate(capsys, "--adapter", "packed")["perplexity"]
    )
    assert main(["quantize-adapter", "out", "again", "--model", str(base)]) == 0
    assert "integers of the weights that change" in capsys.readouterr().out
    assert main(["dequantize-adapter", "packed", "plain"]) == 0
    assert "float32" in capsys.readouterr().out
    assert evaluate(capsys, "--adapter", "plain")["perplexity"] == pytest.approx(
        found["perplexity"]
    )


def test_lora_before_and_after(lora, capsys):
    words = ["--average_bits", "3", "--group_size", "16", "--dataset", "text.txt", "--window", "16"]
    assert main(["quantize-adapter", lora, "packed", *words]) == 0
    out = capsys.readouterr().out
    assert "perplexity before" in out
    assert "integers of the weights" not in out


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf", "packed", "dequantized"])
def test_recipe_train_export(format, base, capsys):
    runtime = {"gguf": "llama.cpp"}.get(format, "transformers")
    assert main(["recipe", "--for", runtime, "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)
    assert recipe["bits"] == 4
    train(base, "--bits", "4", "--group_size", "32", "--symmetric", str(recipe["symmetric"]))
    capsys.readouterr()
    assert (
        main(
            [
                "export",
                "--adapter",
                "out",
                "--output",
                "exported",
                "--format",
                format,
                "--verify",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] is True
    assert found["layers"] == 7
    assert (
        main(["export", "--adapter", "out", "--output", "other", "--format", format, "--verify"])
        == 0
    )
    assert "every weight is what was trained" in capsys.readouterr().out


def test_recipe_prints_commands(capsys):
    assert main(["recipe", "--for", "vllm"]) == 0
    out = capsys.readouterr().out
    assert "--bits 4 --group_size 128 --symmetric True --scale_dtype bfloat16" in out
    assert "lrqat export --adapter ADAPTER --format compressed-tensors" in out


@pytest.mark.parametrize("bits", ["2", "3", "4"])
def test_what_the_recipe_of_a_number_of_bits_prints_runs(bits, base, capsys):
    words = ["recipe", "--bits", bits, "--model", str(base)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["base"] is None) == (bits == "4")
    assert main(words) == 0
    *lines, why = capsys.readouterr().out.splitlines()
    assert lines == found["commands"]
    assert why == f"# {found['measured']}"
    given = {"TEXT": "text.txt", "HELDOUT": "text.txt"}
    for line in lines:
        _, *command = [given.get(word, word) for word in shlex.split(line)]
        if command[0] == "prepare":
            command += ["--block_size", "16", "--calibration_tokens", "64"]
        if command[0] == "train":
            command += ["--block_size", "16", "--max_steps", "2", "--disable_tqdm", "true"]
        assert main(command) == 0, line
    config = LRQATConfig.from_pretrained("ADAPTER")
    assert (config.bits, config.symmetric) == (int(bits), bits != "2")
    assert config.group_size == {"2": 32}.get(bits, -1)


def test_activations_from_recipe_to_export(base, capsys):
    assert main(["recipe", "--for", "vllm", "--activation_bits", "8"]) == 0
    assert "--scale_dtype bfloat16 --activation_bits 8\n" in capsys.readouterr().out
    train(
        base,
        "--bits",
        "4",
        "--activation_bits",
        "8",
        "--kv_cache_bits",
        "4",
        "--activation_symmetric",
        "True",
    )
    config = LRQATConfig.from_pretrained("out")
    assert (config.activation_bits, config.kv_cache_bits, config.activation_symmetric) == (
        8,
        4,
        True,
    )
    capsys.readouterr()
    words = ["export", "--adapter", "out", "--output", "exported"]
    assert "cannot carry `kv_cache_bits`=4" in refusal(capsys, words)
    assert not Path("exported").exists()
    assert main([*words, "--activations", "ignore", "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True


def test_an_export_without_a_comparison(base, capsys):
    train(base)
    capsys.readouterr()
    assert main(["export", "--adapter", "out", "--output", "exported", "--format", "packed"]) == 0
    size = sum(file.stat().st_size for file in Path("exported").iterdir())
    assert capsys.readouterr().out == f"{size:,} bytes in exported\n"
    assert "exported exists, and nothing is written over it" in refusal(
        capsys, ["export", "--adapter", "out", "--output", "exported"]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe"], "the following arguments are required: --bits, --for"),
        (["recipe", "--bits", "9"], "`bits` must be 2 to 8, but is 9"),
        (["recipe", "--bits", "4", "--activation_bits", "8"], "depends on the runtime; add --for"),
        (["recipe", "--for", "onnx"], "invalid choice: 'onnx'"),
        (["recipe", "--for", "vllm", "--bits", "9"], "`bits` must be 2 to 8, but is 9"),
        (
            ["recipe", "--for", "llama.cpp", "--activation_bits", "8"],
            "llama.cpp rounds activations its own way",
        ),
        (["export", "--output", "out"], "give --adapter, or --model with a low-bit base"),
        (["export", "--adapter", "none", "--output", "other"], "none"),
        (
            ["export", "--adapter", "none", "--output", "other", "--format", "onnx"],
            "invalid choice: 'onnx'",
        ),
    ],
)
def test_what_recipe_and_export_refuse(words, message, capsys):
    assert message in refusal(capsys, words)


# The demo, on the random model: the real one takes minutes


@pytest.fixture
def small_demo(base, monkeypatch):
    def in_process(command, **_):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(command[3:])  # after `python -m peft_lrqat.cli`
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr="")

    setup = dataclasses.replace(run.SETUPS["tiny"], window=16, steps=30, learning_rate=2e-2)
    monkeypatch.setitem(run.SETUPS, "tiny", setup)
    monkeypatch.setattr(run, "model_path", lambda: base)
    monkeypatch.setattr(run, "load_topics", lambda split: [TEXT])
    # The demo's own name alone: libraries start programs, too.
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=in_process))


def test_the_demo_compares_saves_reloads_and_merges(small_demo, capsys):
    assert main(["demo", "--output", "demo"]) == 0
    assert "all checks passed" in capsys.readouterr().out
    rows = json.loads(Path("demo/table.json").read_text())
    methods = ["round-to-nearest", "scales only", "LR-QAT"]
    expected = [("unquantised", None), *((method, 3) for method in methods)]
    expected += [(method, 2) for method in (*methods[:2], "calibrated", methods[2])]
    assert [(row["method"], row["bits"]) for row in rows] == expected
    # 7 x 32 x 32 weights of 4 bytes or of 3 bits, and 7 x 32 scales of 2 bytes.
    weights, scales = 7 * 32 * 32, 7 * 32
    assert [row["deployed_bytes"] for row in rows[:2]] == [
        weights * 4,
        weights * 3 // 8 + scales * 2,
    ]
    assert [row["trainable"] for row in rows[:4]] == [0, 0, scales, scales + 7 * 32 * (32 + 32)]
    assert Path("demo/losses.png").read_bytes().startswith(b"\x89PNG")
    drawn = Path("demo/tradeoff.svg").read_text()
    assert all(f">{row['perplexity']:.2f}</text>" in drawn for row in rows)
    assert Path("demo/lrqat-2bit/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("capability", "dtype"), [("AVX2", "float32"), ("AVX512", "bfloat16"), ("DEFAULT", "bfloat16")]
)
def test_the_demo_avoids_bfloat16_where_it_is_slow(capability, dtype, small_demo, monkeypatch):
    setup = dataclasses.replace(run.SETUPS["tiny"], dtype="bfloat16")
    monkeypatch.setitem(run.SETUPS, "tiny", setup)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert run.prepare(run.DemoArguments(output="demo")).setup.dtype == dtype


def test_a_demo_that_fails_says_why_and_ends_non_zero(small_demo, monkeypatch, capsys):
    monkeypatch.setattr(run.Experiment, "reloaded_perplexity", lambda self, adapter, base: 1.0)
    # What does not move cannot beat trained scales.
    still = dataclasses.replace(
        run.SETUPS["tiny"], learning_rate=1e-30, scale_learning_rate=1e-30, starts={}
    )
    monkeypatch.setitem(run.SETUPS, "tiny", still)
    assert main(["demo", "--bits", "2", "--output", "demo"]) == 1
    said = capsys.readouterr()
    assert "all checks passed" not in said.out
    failures = [line for line in said.err.splitlines() if line.startswith("lrqat demo: FAILED: ")]
    assert len(failures) == 3
    assert "does not beat round-to-nearest" in failures[0]
    assert "does not beat scales only" in failures[1]
    assert "has perplexity 1.0 when reloaded in a fresh process, but had" in failures[2]


def test_the_demo_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        main(["demo"])
    assert capsys.readouterr().err == (
        "lrqat demo: error: the plot needs matplotlib; run `pip install 'peft-lrqat[demo]'`\n"
    )


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "9"], "`bits` must be an integer from 2 to 8, but is 9"),
        (["--bits", "three"], "invalid int value: 'three'"),
        (["--bitz", "3"], "unknown: --bitz 3"),
        (["--teacher_model", "x"], "--teacher_model is for --distillation_weight"),
        (["--downcast", "int3"], "invalid choice: 'int3'"),
        (["--bits_pattern", "{'down_proj': 4}"], "must be a JSON object such as"),
        (["--bits_pattern", "[4]"], "must be a JSON object such as"),
        (
            ["--group_size", "24"],
            "`group_size` must divide `in_features`, but 24 does not divide 32",
        ),
        (["--target_modules", "nothing_here"], "nothing_here"),
        (["--dataset", "nowhere.txt"], "no such file or directory: 'nowhere.txt'"),
        (["--eval_dataset", "nowhere.txt"], "no such file or directory: 'nowhere.txt'"),
        (["--text_column", "body"], "no text column 'body'; it has 'text'"),
        (["--block_size", "33"], "must fit in the model's context of 32 tokens, but it is 33"),
        (["--model", "./no-model"], "no-model"),
        (["--streaming", "--max_steps", "-1"], "--streaming needs --max_steps"),
        (["--optim", "galore_adamw"], "`optim` 'galore_adamw' makes its own parameter groups"),
        (["--learning_rate", "0"], "`learning_rate` must be a learning rate above 0, but is 0.0"),
        (
            ["--scale_learning_rate", "-1"],
            "`scale_learning_rate` must be a learning rate above 0, but is -1.0",
        ),
        (
            ["--distillation_weight", "1.5"],
            "`distillation_weight` is a share of the loss, 0 to 1, but is 1.5",
        ),
        (
            ["--distillation_temperature", "0"],
            "`distillation_temperature` must be above 0, but is 0.0",
        ),
        (["--save_steps", "1.5"], "must be an integer if bigger than 1"),
        (["--resume_from_checkpoint", "last"], "finds no whole checkpoint in out"),
        (
            ["--resume_from_checkpoint", "elsewhere"],
            "'elsewhere' cannot be resumed from: there is no such directory",
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_train_refuses(base, capsys, options, message):
    command = [
        "train",
        "--model",
        base,
        "--dataset",
        "text.txt",
        "--output_dir",
        "out",
        "--block_size",
        "16",
    ]
    assert message in refusal(capsys, [*command, "--target_modules", "all-linear", *options])
    assert not Path("out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give PATH, or --model, --adapter, or both"),
        (["--model", "BASE", "--merge"], "--merge merges an adapter"),
        (["--model", "BASE", "--window", "33"], "33 is more than its 32 tokens"),
        (
            ["--model", "BASE", "--window", "16", "--stride", "17"],
            "between 1 and `window`, but it is 17",
        ),
        (["--model", "BASE", "--adapter", "no-adapter"], "no-adapter"),
        (["--adapter", "no-adapter"], "no-adapter"),
        (["--model", "BASE", "--tasks", "arc_easi", "--task_path", "."], "did you mean arc_easy"),
        (
            ["--model", "BASE", "--tasks", "a", "--task_path", "nowhere"],
            "nowhere, which is no",
        ),
        (["--model", "BASE", "--tasks", ","], "name one task at least"),
        (["--model", "BASE", "--llama_cpp"], "none is among the paths"),
        (["--model", "BASE", "--limit", "3"], "--limit is for --tasks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_eval_refuses(base, capsys, options, message):
    options = [str(base) if word == "BASE" else word for word in options]
    assert message in refusal(capsys, ["eval", "--dataset", "text.txt", *options])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize-adapter"], "the following arguments are required: SOURCE, TARGET"),
        (["quantize-adapter", "lora"], "the following arguments are required: TARGET"),
        (["quantize-adapter", "lora", "packed", "more"], "unknown: more"),
        (["quantize-adapter", "lora", "packed", "--bits", "2"], "unknown: --bits 2"),
        (
            ["quantize-adapter", "lora", "packed", "--bits_high", "1"],
            "`bits_high` must be an integer",
        ),
        (["quantize-adapter", "lora", "packed", "--method", "best"], "invalid choice: 'best'"),
        (
            ["quantize-adapter", "lora", "packed", "--average_bits", "0"],
            "`average_bits` must be a number, above 0",
        ),
        (
            ["quantize-adapter", "lora", "packed", "--method", "paper", "--average_bits", "2"],
            "needs method='residual'",
        ),
        (["quantize-adapter", "lora", "lora"], "lora exists, and nothing is written over it"),
        (
            ["quantize-adapter", "text.txt", "packed"],
            "text.txt is not a directory, and not a repository",
        ),
        (
            ["quantize-adapter", "./nowhere", "packed"],
            "./nowhere is not a directory, and not a repository",
        ),
        (["quantize-adapter", ".", "packed"], ". has no adapter_config.json"),
        (["dequantize-adapter", "lora", "back"], "is of type LORA, but must be LORAQUANT"),
        (["dequantize-adapter", "lora", "back", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_adapter_commands_refuse(lora, capsys, words, message):
    assert message in refusal(capsys, words)
    assert not Path("packed").exists()
    assert not Path("back").exists()


def test_a_text_shorter_than_a_window(base, capsys):
    Path("short.txt").write_text("dog")
    assert "it has 4 tokens and the window is 16" in refusal(
        capsys, ["eval", "--model", base, "--dataset", "short.txt", "--window", "16"]
    )


def test_an_adapter_for_another_base_model(base, tmp_path, capsys):
    train(base)
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained("other")
    AutoTokenizer.from_pretrained(base).save_pretrained("other")
    assert "not the base model that the adapter was trained on" in refusal(
        capsys,
        ["eval", "--model", "other", "--adapter", "out", "--dataset", "text.txt", "--window", "16"],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "1"], "`bits` must be an integer from 2 to 8, but is 1"),
        (["--model", "large"], "invalid choice: 'large'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--output", "text.txt"], "--output must be a directory, but 'text.txt' is a file"),
    ],
)
def test_what_demo_refuses(capsys, options, message):
    assert message in refusal(capsys, ["demo", *options])


def test_bugs_keep_their_traceback(base, monkeypatch):
    def broken(self, *_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(Trainer, "train", broken)
    with pytest.raises(ValueError, match="a bug"):
        train(base)


def test_main_is_found_where_release_0_1_0_had_it():
    from peft_lrqat.cli import main as found

    assert found is main
