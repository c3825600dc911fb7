"""Directories that are there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(target: str | os.PathLike[str]) -> None:
    """FileExistsError where something is there already; an empty directory is nothing."""
    target = Path(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists, and nothing is written over it; give another directory, or delete it first"
        )


@contextmanager
def whole_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory beside ``target`` that gets its name when everything is on the disk, and vanishes after an exception."""
    target = Path(target).resolve()  # what a link points to gets the content, and the link stays
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    directory.mkdir()
    try:
        yield directory
        for path in directory.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        check_target(target)
        directory.rename(target)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
