"""Directories that are there as a whole or not at all."""

import os
import signal

import pytest

from peft_lrqat.shared.staging import check_target, flush, whole_directory


def write(target):
    check_target(target)
    with whole_directory(target) as directory:
        (directory / "file").write_text("whole")


@pytest.mark.parametrize("kind", ["nothing", "an empty directory", "parents are missing"])
def test_the_directory_appears_with_all_that_is_in_it(kind, tmp_path):
    target = tmp_path / "deep" / "target" if kind == "parents are missing" else tmp_path / "target"
    if kind == "an empty directory":
        target.mkdir()
    write(target)
    assert (target / "file").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("kind", ["to an empty directory", "to nothing"])
def test_links_are_followed(kind, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    if kind == "to an empty directory":
        real.mkdir()
    link.symlink_to(real)
    write(link)
    assert link.is_symlink()
    assert (real / "file").read_text() == "whole"
    with pytest.raises(FileExistsError, match="link exists, and nothing is written over it"):
        check_target(link)


def test_nested_folders_are_flushed(tmp_path):
    with whole_directory(tmp_path / "target") as directory:
        (directory / "inner" / "deeper").mkdir(parents=True)
        (directory / "inner" / "deeper" / "file").write_text("whole")
        assert flush(directory) == [directory / "inner" / "deeper" / "file"]
    assert (tmp_path / "target" / "inner" / "deeper" / "file").read_text() == "whole"


def test_an_exception_leaves_nothing(tmp_path):
    staged = whole_directory(tmp_path / "target")
    (staged.__enter__() / "file").write_text("half")
    assert not staged.__exit__(KeyError, KeyError("lost"), None)  # it goes on to the caller
    assert list(tmp_path.iterdir()) == []


def test_what_came_in_between_is_kept(tmp_path):
    with (
        pytest.raises(FileExistsError, match="nothing is written over it"),
        whole_directory(tmp_path / "target"),
    ):
        (tmp_path / "target").write_text("theirs")
    assert (tmp_path / "target").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def killed_while_writing(target):
    """What a killed process leaves beside ``target``."""
    child = os.fork()
    if child == 0:
        with whole_directory(target) as directory:
            (directory / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_killed_process_left_goes_with_the_next_call(tmp_path):
    target = tmp_path / "a[0-9]target"
    killed_while_writing(target)
    (left,) = tmp_path.iterdir()
    killed_while_writing(tmp_path / "other")
    (tmp_path / f"{left.name}-mine").mkdir()
    (tmp_path / f".{target.name}-01234567").mkdir()
    others = set(tmp_path.iterdir()) - {left}
    write(target)
    assert set(tmp_path.iterdir()) == others | {target}


def test_what_another_process_is_writing_stays(tmp_path):
    target = tmp_path / "target"
    with whole_directory(target) as theirs:
        (theirs / "file").write_text("theirs")
        child = os.fork()
        if child == 0:
            try:
                write(target)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert (theirs / "file").read_text() == "theirs"
        assert (target / "file").read_text() == "whole"
        (target / "file").unlink()
    assert (target / "file").read_text() == "theirs"


def test_where_directories_cannot_be_locked_nothing_is_removed(tmp_path, monkeypatch):
    killed_while_writing(tmp_path / "target")
    (left,) = tmp_path.iterdir()

    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    write(tmp_path / "target")
    assert set(tmp_path.iterdir()) == {left, tmp_path / "target"}
