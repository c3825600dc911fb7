"""An export is whole or not there: killed at every write, on a full disk, raced, read-only."""

import os
import resource

import pytest
from killing import check_whole_or_not_there

from peft_lrqat.export import export_model, load_quantized
from peft_lrqat.shared.staging import check_target


def test_killed_at_every_write(make_model, tokenizer, tmp_path):
    model = make_model(bits=4, target_modules=["q_proj"])
    target = tmp_path / "place" / "target"

    def write():
        options = {"tokenizer": tokenizer, "max_shard_size": "60KB", "progress": False}
        export_model(model, target, format="packed", **options)

    check_whole_or_not_there(write, target, lambda: load_quantized(target))


def test_two_processes_write_the_same_target(make_model, tmp_path):
    """One of them wins, the other says that something is there."""
    model = make_model(bits=4, target_modules=["q_proj"])
    target = tmp_path / "target"
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                export_model(model, target, format="packed", progress=False)
                code = 0
            except FileExistsError as error:
                code = 3 if "nothing is written over it" in str(error) else 1
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 3]
    load_quantized(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_a_full_disk_leaves_nothing(limit, make_model, tokenizer, tmp_path):
    model = make_model(bits=4, target_modules=["q_proj"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|requested and \d+ written"):
            export_model(
                model, tmp_path / "out", format="packed", tokenizer=tokenizer, progress=False
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"out cannot be made, because .* is read-only"):
        check_target(tmp_path / "deep" / "out")
