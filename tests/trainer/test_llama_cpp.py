"""A GGUF file in llama.cpp has the perplexity that its weights have in transformers."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat import LowBitConfig
from peft_lrqat.cli import main
from peft_lrqat.demo import load_topics, model_path
from peft_lrqat.export import export_model


pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    config = LowBitConfig(bits=4, group_size=32, range_estimator="minmax")
    model = AutoModelForCausalLM.from_pretrained(model_path(), quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    export_model(model, folder / "out", format="gguf", tokenizer=tokenizer, progress=False)
    (folder / "text.txt").write_text("\n\n".join(load_topics("heldout"))[:1500])
    return folder


@pytest.mark.parametrize("stride", [[], ["--stride", "48"]])
def test_same_figures_on_the_same_tokens(gguf, stride, capsys):
    """llama.cpp rounds the inputs of layers to 8 bits."""
    options = ["--dataset", str(gguf / "text.txt"), "--window", "64", *stride, "--json"]
    found = []
    for how in ([], ["--llama_cpp"]):
        assert main(["eval", str(gguf / "out"), *options, *how]) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, run = found
    assert (plain["kind"], run["kind"]) == ("GGUF file", "GGUF in llama.cpp")
    assert run["tokens"] == plain["tokens"] > 300
    for field in ("nats_per_token", "nats_standard_error", "bits_per_byte"):
        assert run[field] == pytest.approx(plain[field], rel=0.005), field
        assert run[field] != plain[field]


def test_a_file_that_llama_cpp_does_not_run(gguf, tmp_path, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((gguf / "out" / name).read_bytes())
    other = tmp_path / "other.gguf"  # whole, but of an architecture that it does not know
    other.write_bytes((gguf / "out" / "model.gguf").read_bytes().replace(b"llama", b"lxama"))
    command = ["eval", str(other), "--dataset", str(gguf / "text.txt"), "--window", "64"]
    with pytest.raises(SystemExit):
        main([*command, "--llama_cpp"])
    assert "llama.cpp cannot run" in capsys.readouterr().err


def test_without_the_package(gguf, monkeypatch, capsys):
    monkeypatch.setattr("peft_lrqat.trainer.llama_cpp.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["eval", str(gguf / "out"), "--llama_cpp", "--dataset", str(gguf / "text.txt")])
    assert "pip install xllamacpp" in capsys.readouterr().err
