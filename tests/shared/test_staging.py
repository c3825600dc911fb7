"""Directories that are there as a whole or not at all."""

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
