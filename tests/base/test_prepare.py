"""A low-bit base written a tensor at a time is the one that is loaded and saved, killed or not."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from mixtures import make_mixture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat import LowBitConfig, load_low_bit, prepare_low_bit
from peft_lrqat.base import prepare
from peft_lrqat.demo import model_path
from peft_lrqat.shared.staging import locked


SMALL = 4096  # bytes of tensors in a file


@pytest.fixture
def plain(make_base, tmp_path):
    """``plain(architecture, dtype)``: a checkpoint on disk."""

    def make(architecture="llama", dtype=torch.bfloat16):
        make_base(architecture, dtype).save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    return make


def tensors_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def check_same(one, other):
    first, second = tensors_in(one), tensors_in(other)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert torch.equal(tensor, second[key])
    first, second = (json.loads((f / "config.json").read_text()) for f in (one, other))
    assert first == second


def saved(source, folder, settings=None, **kwargs):
    load_low_bit(source, settings, **kwargs).save_pretrained(folder)
    return folder


SETTINGS = [
    {"bits": 4},
    {"bits": 3, "symmetric": False, "group_size": 8},
    {"bits": 2, "downcast": "fixed8", "scale_dtype": "float32", "range_estimator": "minmax"},
    {"bits": 4, "bits_pattern": {"down_proj": 8}, "exclude_modules": ["q_proj"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shard", [SMALL, 2 * 10**9], ids=["shards", "one-file"])
def test_it_is_what_loading_and_saving_gives(settings, shard, plain, tmp_path):
    source = plain()
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(**settings), max_shard_bytes=shard)
    check_same(tmp_path / "made", saved(source, tmp_path / "saved", LowBitConfig(**settings)))
    assert (len(list((tmp_path / "made").glob("*.safetensors"))) > 1) == (shard == SMALL)
    assert not (tmp_path / "made.partial").exists()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma", "gpt2", "opt", "mistral"])
def test_architectures(architecture, plain, logits_of, tmp_path):
    source = plain(architecture, torch.float32)
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4), max_shard_bytes=SMALL)
    check_same(tmp_path / "made", saved(source, tmp_path / "saved", LowBitConfig(bits=4)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    expected = load_low_bit(source, LowBitConfig(bits=4)).eval()
    assert torch.equal(logits_of(model, architecture), logits_of(expected, architecture))


def test_another_dtype(plain, tmp_path):
    source, dtype = plain(), torch.float16
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4), dtype=dtype)
    check_same(
        tmp_path / "made", saved(source, tmp_path / "saved", LowBitConfig(bits=4), dtype=dtype)
    )


@pytest.fixture
def gptq(plain, make_gptq, quantise_folder):
    """A GPTQ checkpoint."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
    folder = plain("llama", torch.float16)

    def module(name, weight):
        return make_gptq(
            *weight.shape, bits=4, group_size=16, version="gptq", symmetric=False, order=None
        )

    quantise_folder(folder, settings, module)
    return folder


def test_integers_of_others_are_taken_over(gptq, tmp_path):
    prepare_low_bit(gptq, tmp_path / "made", max_shard_bytes=SMALL)
    check_same(tmp_path / "made", saved(gptq, tmp_path / "saved"))


def test_no_tokenizer_is_made_up(tmp_path):
    """transformers makes one without words for some architectures."""
    make_mixture("qwen3_moe").save_pretrained(tmp_path / "plain")
    prepare_low_bit(tmp_path / "plain", tmp_path / "base", LowBitConfig(), progress=False)
    assert not list((tmp_path / "base").glob("tokenizer*"))


def test_tokenizer_generation_config_and_card_come_along(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_path(), source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=3, group_size=32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert tokenizer("some text") == AutoTokenizer.from_pretrained(source)("some text")
    name = "generation_config.json"
    ours, theirs = (json.loads((f / name).read_text()) for f in (tmp_path / "made", source))
    assert {k: v for k, v in ours.items() if k != "transformers_version"} == {
        k: v for k, v in theirs.items() if k != "transformers_version"
    }
    card = (tmp_path / "made" / "README.md").read_text()
    assert "# A 3-bit base for LR-QAT" in card
    assert str(tmp_path) not in card


# What cannot be streamed


def test_tensors_with_other_names_are_loaded_and_saved(plain, tmp_path, monkeypatch):
    source = plain()
    said = []
    monkeypatch.setattr(prepare.logger, "warning", said.append)
    monkeypatch.setattr(prepare._Job, "_name_of", lambda self, key: None)
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4))
    assert "cannot be read a tensor at a time" in said[0]
    monkeypatch.undo()
    check_same(tmp_path / "made", saved(source, tmp_path / "saved", LowBitConfig(bits=4)))


# Interrupted


def test_a_run_goes_on_after_the_last_file(plain, tmp_path, monkeypatch):
    source = plain()
    written = []
    write = prepare._Job._write_shard

    def stop_at_third(self, directory, file, names, bar):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        return write(self, directory, file, names, bar)

    monkeypatch.setattr(prepare._Job, "_write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4), max_shard_bytes=SMALL)
    assert not (tmp_path / "made").exists()
    again = []

    def record(self, directory, file, names, bar):
        again.append(file)
        return write(self, directory, file, names, bar)

    monkeypatch.setattr(prepare._Job, "_write_shard", record)
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4), max_shard_bytes=SMALL)
    assert len(written) == 2
    assert again
    assert not set(again) & set(written)
    check_same(tmp_path / "made", saved(source, tmp_path / "saved", LowBitConfig(bits=4)))


def killed_at(number, source, target):
    """A fork that SIGKILL ends before its change ``number``; the changes of a whole run.

    A change is a file or folder that is created, renamed or removed.
    """
    kinds = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
    counted = target.with_name("counted")
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return None
        assert status == 0
        return int(counted.read_text())
    seen = 0

    def count(event, args):
        nonlocal seen
        opens = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wx+")
        if (event in kinds or opens) and target.name in str(args[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        settings = {"max_shard_bytes": 40_000, "progress": False}
        prepare_low_bit(source, target, LowBitConfig(bits=4), **settings)
        counted.write_text(str(seen))
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_it_is_whole_or_not_there_and_goes_on(plain, tmp_path):
    source = plain()
    settings = {"max_shard_bytes": 40_000, "progress": False}
    expected = saved(source, tmp_path / "saved", LowBitConfig(bits=4))
    changes = killed_at(0, source, tmp_path / "made")
    check_same(tmp_path / "made", expected)
    shutil.rmtree(tmp_path / "made")
    for number in sorted(
        {1, 3, changes // 3, changes // 2, changes - 12, changes - 5, changes - 1}
    ):
        target = tmp_path / f"made-{number}"
        assert killed_at(number, source, target) is None
        if target.exists():
            check_same(target, expected)
            continue
        prepare_low_bit(source, target, LowBitConfig(bits=4), **settings)
        check_same(target, expected)


def test_a_full_disk_is_told_and_the_run_goes_on(plain, tmp_path):
    source = plain()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"made\.partial; make room and run the same") as raised:
            prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert raised.value.errno == errno.EFBIG
    assert not (tmp_path / "made").exists()
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4))
    check_same(tmp_path / "made", saved(source, tmp_path / "saved", LowBitConfig(bits=4)))


def interrupted(source, target, **settings):
    """Leaves the beginning of a run."""
    write = prepare._Job._write_shard

    def stop(self, directory, file, names, bar):
        if file.startswith("model-00003"):
            raise KeyboardInterrupt
        return write(self, directory, file, names, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare._Job, "_write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_low_bit(source, target, LowBitConfig(**settings), max_shard_bytes=SMALL)


def test_other_settings_do_not_go_on(plain, tmp_path):
    source = plain()
    interrupted(source, tmp_path / "made", bits=4)
    with pytest.raises(ValueError, match=r"beginning of another run.*delete it"):
        prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=3), max_shard_bytes=SMALL)


def test_a_changed_checkpoint_does_not_go_on(plain, tmp_path):
    source = plain()
    interrupted(source, tmp_path / "made", bits=4)
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["more"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    del tensors["more"]
    save_file(tensors, file, metadata={"format": "pt", "other": "yes"})
    with pytest.raises(ValueError, match="beginning of another run"):
        prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4), max_shard_bytes=SMALL)


def test_a_directory_of_somebody_else_stays(plain, tmp_path):
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="this command did not make it"):
        prepare_low_bit(plain(), tmp_path / "made", LowBitConfig(bits=4))
    assert (tmp_path / "made.partial" / "mine").read_text() == "mine"


# Bad input


def test_what_is_there_is_not_written_over(plain, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is written over it"):
        prepare_low_bit(plain(), tmp_path / "made", LowBitConfig(bits=4))


def test_a_low_bit_base_is_refused(plain, tmp_path):
    prepare_low_bit(plain(), tmp_path / "made", LowBitConfig(bits=4))
    with pytest.raises(ValueError, match="is a low-bit base already"):
        prepare_low_bit(tmp_path / "made", tmp_path / "again")


def test_checkpoints_without_safetensors_are_refused(plain, tmp_path):
    source = plain()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no model\.safetensors"):
        prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4))


def test_weights_that_are_not_finite_are_refused(make_base, tmp_path):
    model = make_base("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"`model.layers.1.mlp.up_proj` have NaN"):
        prepare_low_bit(tmp_path / "plain", tmp_path / "made", LowBitConfig(bits=4))
    assert not (tmp_path / "made").exists()


def test_a_missing_tensor_is_refused(plain, tmp_path):
    source = plain()
    file = source / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weight for `model.layers.0.mlp.up_proj`"):
        prepare_low_bit(source, tmp_path / "made", LowBitConfig(bits=4))
    assert [Path(p).name for p in sorted(tmp_path.iterdir())] == ["plain"]


def test_two_runs_at_once(plain, tmp_path):
    source = plain()
    (tmp_path / "made.partial").mkdir()
    held = pytest.raises(FileExistsError, match=r"another process is writing .*made\.partial")
    with locked(tmp_path / "made.partial"), held:
        prepare_low_bit(source, tmp_path / "made", LowBitConfig(), progress=False)
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(), progress=False)
    assert (tmp_path / "made" / "config.json").exists()
    assert not (tmp_path / "made.partial").exists()


def test_files_hold_no_path_of_this_machine(plain, tmp_path):
    source = plain()
    prepare_low_bit(source, tmp_path / "made", LowBitConfig(), progress=False)
    saved(source, tmp_path / "saved", LowBitConfig())
    for folder in ("made", "saved"):
        for file in (tmp_path / folder).glob("*"):
            assert str(tmp_path).encode() not in file.read_bytes(), file
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["quantization_config"]["made_from"] == "./plain"
    assert "a local directory, `plain`" in (tmp_path / "made" / "README.md").read_text()
