"""Directories that are there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(target: str | os.PathLike[str]) -> None:
    """Whether a directory can be made there; an empty one counts as nothing.

    Raises:
        FileExistsError: something is there already.
        PermissionError: nothing can be written there.
    """
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists, and nothing is written over it; give another directory, or delete it"
            " first"
        )
    parent = next(path for path in target.absolute().parents if path.exists())
    if not os.access(parent, os.W_OK):
        raise PermissionError(
            f"{target} cannot be made, because {parent} is read-only; give another directory, or"
            " change its permissions"
        )


def flush(directory: Path) -> list[Path]:
    """Waits until all files below ``directory`` are on the disk, and returns them.

    A rename of the directory must not reach the disk before the files.
    """
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return files


def directory_bytes(directory: str | os.PathLike[str]) -> int:
    """The size of all files below a directory."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


@contextmanager
def whole_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory beside ``target`` that takes its place when everything in it is on the disk.

    After an exception nothing of it is left.
    """
    target = Path(target).resolve()  # what a link points to gets the content, and the link stays
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    directory.mkdir()
    try:
        yield directory
        flush(directory)
        check_target(target)
        try:
            directory.rename(target)
        except OSError:
            check_target(target)  # another process was faster
            raise
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
