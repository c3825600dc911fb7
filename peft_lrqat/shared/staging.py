"""Directories that are there as a whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system: what killed processes leave stays
    fcntl = None

# In the hidden name of a directory that is being written.
MARK = ".lrqat-"


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

    After an exception no part of it is left. A killed process leaves it, under a hidden name, until
    the next call for the same target.
    """
    target = Path(target).resolve()  # what a link points to gets the content, and the link stays
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    directory, lock = _staging(target)
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
    finally:
        if lock is not None:
            os.close(lock)


def _staging(target: Path) -> tuple[Path, int | None]:
    """A new directory, and the open file that locks it for as long as its process lives.

    None: directories cannot be locked here.
    """
    while True:
        directory = target.with_name(f".{target.name}{MARK}{secrets.token_hex(4)}")
        directory.mkdir()
        try:
            return directory, _lock(directory)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for abandoned before it was locked
        except OSError:
            return directory, None


def _remove_abandoned(target: Path) -> None:
    """Removes what killed processes left of the same target: nobody holds its lock any more."""
    for directory in target.parent.glob(f".{glob.escape(target.name)}{MARK}{'[0-9a-f]' * 8}"):
        try:
            lock = _lock(directory)
        except OSError:
            continue  # it is being written, or was just moved into place
        if lock is not None:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """The open file that locks a directory.

    None where directories cannot be opened; BlockingIOError if another process has locked it.
    """
    if fcntl is None:
        return None
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(directory)):
            raise FileNotFoundError(f"{directory} is another directory now")
    except BaseException:
        os.close(lock)
        raise
    return lock


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds ``directory`` for this process, until the block ends or the process does.

    Raises:
        FileExistsError: another process holds it.
    """
    try:
        lock = _lock(directory)
    except (BlockingIOError, FileNotFoundError):
        raise FileExistsError(
            f"another process is writing {directory}; wait until it is done, or give another"
            " output directory"
        ) from None
    except OSError:
        lock = None  # directories cannot be locked here
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
