"""Packed adapters, unpacked when they are asked for, in a directory of bounded size."""

import json
import os
import shutil
import stat
import threading

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_lrqat import LoRAQuantConfig, LRQATConfig, dequantize_adapter, quantize_adapter
from peft_lrqat.serving import UnpackedAdapters, unpacked
from peft_lrqat.shared.staging import directory_bytes


@pytest.fixture(scope="module")
def packed(tmp_path_factory, make_base):
    """Three packed adapters, by name."""
    folder = tmp_path_factory.mktemp("packed")
    for number, name in enumerate("abc"):
        torch.manual_seed(number)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(make_base(), config).save_pretrained(folder / "lora" / name)
        quantize_adapter(folder / "lora" / name, folder / name, LoRAQuantConfig(), progress=False)
    return folder


@pytest.fixture
def adapters(tmp_path):
    return UnpackedAdapters(tmp_path / "unpacked")


def folders(adapters):
    return {p.name.split("-")[0] for p in adapters.directory.iterdir() if p.is_dir()}


def age(path, seconds=1000):
    """As if it had been asked for before."""
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def test_they_are_what_dequantize_adapter_writes(packed, adapters, make_base, tmp_path):
    found = adapters.path(packed / "a")
    dequantize_adapter(packed / "a", tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted" / "adapter_model.safetensors")
    mine = load_file(found / "adapter_model.safetensors")
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    assert json.loads((found / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert isinstance(PeftModel.from_pretrained(make_base(), found), PeftModel)


def test_an_adapter_is_unpacked_once(packed, adapters):
    first = adapters.path(packed / "a")
    written = (first / "adapter_model.safetensors").stat()
    age(first)
    assert adapters.path(packed / "a") == first
    assert (first / "adapter_model.safetensors").stat().st_ino == written.st_ino
    # Asked for again, it is among the last to go.
    assert first.stat().st_mtime > written.st_mtime - 10


def test_another_version_is_another_adapter(packed, adapters, tmp_path):
    shutil.copytree(packed / "a", tmp_path / "own")
    first = adapters.path(tmp_path / "own")
    shutil.rmtree(tmp_path / "own")
    shutil.copytree(packed / "b", tmp_path / "own")
    second = adapters.path(tmp_path / "own")
    name = "adapter_model.safetensors"
    assert first != second
    assert (first / name).read_bytes() != (second / name).read_bytes()


def test_the_least_recently_used_go(packed, tmp_path):
    size = directory_bytes(UnpackedAdapters(tmp_path / "one").path(packed / "a"))
    adapters = UnpackedAdapters(tmp_path / "two", max_bytes=int(2.5 * size))
    a = adapters.path(packed / "a")
    age(a, 2000)
    b = adapters.path(packed / "b")
    age(b, 3000)
    adapters.path(packed / "c")
    assert folders(adapters) == {"a", "c"}
    assert not [p for p in adapters.directory.iterdir() if p.name.startswith("b-")]
    assert adapters.path(packed / "b").exists()


def test_what_was_just_asked_for_stays(packed, tmp_path):
    adapters = UnpackedAdapters(tmp_path / "unpacked", max_bytes=1)
    for name in "abc":
        assert adapters.path(packed / name).exists()
    assert folders(adapters) == {*"abc"}


def test_a_damaged_adapter_leaves_nothing(packed, adapters, tmp_path):
    shutil.copytree(packed / "a", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="bad"):
        adapters.path(tmp_path / "bad")
    assert folders(adapters) == set()
    assert not list(adapters.directory.glob("bad*"))


def test_what_is_not_packed_stays_where_it_is(packed, adapters):
    assert adapters.path(packed / "lora" / "a") == packed / "lora" / "a"


def test_factors_inside_the_rounding_are_no_lora(adapters, make_base, tmp_path):
    config = LRQATConfig(r=4, target_modules=["q_proj"])
    get_peft_model(make_base(), config).save_pretrained(tmp_path / "lrqat")
    quantize_adapter(tmp_path / "lrqat", tmp_path / "packed", LoRAQuantConfig(), progress=False)
    for folder in ("lrqat", "packed"):
        with pytest.raises(ValueError, match=r"type LRQAT.*serve the model that `lrqat export`"):
            adapters.path(tmp_path / folder)
    assert not folders(adapters)


def test_nothing_else_in_the_directory_is_touched(packed, tmp_path):
    shutil.copytree(packed / "a", tmp_path / "archive" / "a")
    (tmp_path / "archive" / "thesis").mkdir()
    for name in ("a", "thesis"):
        age(tmp_path / "archive" / name)
    adapters = UnpackedAdapters(tmp_path / "archive", max_bytes=1)
    age(adapters.path(tmp_path / "archive" / "a"))
    adapters.path(packed / "b")
    assert folders(adapters) == {"b"}
    assert (tmp_path / "archive" / "thesis").is_dir()
    assert (tmp_path / "archive" / "a" / "adapter_config.json").exists()


def test_a_file_that_is_gone_is_made_again(packed, adapters):
    found = adapters.path(packed / "a")
    (found / "adapter_model.safetensors").unlink()
    assert (adapters.path(packed / "a") / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("wrong", [0, -1, "1GB", None, 1.5])
def test_a_bound_that_is_no_number_of_bytes(wrong, tmp_path):
    with pytest.raises(ValueError, match="`max_bytes` must be an integer"):
        UnpackedAdapters(tmp_path / "unpacked", max_bytes=wrong)
    assert not (tmp_path / "unpacked").exists()


def test_many_at_once(packed, adapters):
    found = []
    threads = [
        threading.Thread(target=lambda name=name: found.append(adapters.path(packed / name)))
        for name in "abcabc"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 3


def test_a_directory_of_another_user_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(unpacked.os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        UnpackedAdapters(tmp_path / "theirs")


def test_a_link_in_its_place_is_refused(tmp_path):
    (tmp_path / "home" / "precious").mkdir(parents=True)
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / unpacked.FOLDER).symlink_to(tmp_path / "home")
    with pytest.raises(PermissionError, match="is a link"):
        UnpackedAdapters(tmp_path / "place")
    (tmp_path / "place" / unpacked.FOLDER).unlink()
    (tmp_path / "place" / unpacked.FOLDER).mkdir()
    (tmp_path / "place" / unpacked.FOLDER).chmod(0o777)
    with pytest.raises(PermissionError, match="written to by others"):
        UnpackedAdapters(tmp_path / "place")


def test_the_default_place_is_looked_at_whole(monkeypatch, tmp_path):
    """Its name can be foreseen: somebody may have made it before."""
    monkeypatch.setattr(unpacked, "_in_memory", lambda: tmp_path / "link")
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(PermissionError, match="is a link"):
        UnpackedAdapters()


def test_what_killed_processes_left_goes(packed, adapters):
    gone, staged = (adapters.directory / name for name in (".gone-1", ".a.lrqat-1"))
    for folder in (gone, staged):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    adapters.path(packed / "a")
    assert not gone.exists()
    assert staged.exists()  # a process may be writing it
    age(staged, 2 * unpacked.SECONDS_OF_STAGING)
    adapters.path(packed / "b")
    assert not staged.exists()
    assert folders(adapters) == {"a", "b"}


@pytest.mark.parametrize("how", ["asked for", "locked"])
def test_an_adapter_that_is_wanted_meanwhile_stays(how, packed, tmp_path, monkeypatch):
    adapters = UnpackedAdapters(tmp_path / "unpacked", max_bytes=1)
    a = adapters.path(packed / "a")
    age(a)
    measure = unpacked.directory_bytes
    lock = FileLock(unpacked._lock(a))

    def measured(path):
        if path == a:
            os.utime(a) if how == "asked for" else lock.acquire()
        return measure(path)

    monkeypatch.setattr(unpacked, "directory_bytes", measured)
    adapters.path(packed / "b")
    lock.release()
    assert folders(adapters) == {"a", "b"}


def test_an_adapter_with_a_hidden_name_is_counted(packed, tmp_path):
    shutil.copytree(packed / "a", tmp_path / ".own")
    adapters = UnpackedAdapters(tmp_path / "unpacked", max_bytes=1)
    age(adapters.path(tmp_path / ".own"))
    adapters.path(packed / "b")
    assert folders(adapters) == {"b"}


def test_nobody_else_may_read_it(adapters):
    assert stat.S_IMODE(adapters.directory.stat().st_mode) == 0o700
