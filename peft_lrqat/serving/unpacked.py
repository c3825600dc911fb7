"""A directory of bounded size in which packed adapters lie as LoRA while a server reads them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..loraquant import dequantize_adapter
from ..shared.adapter_files import read_config
from ..shared.checks import check_integer
from ..shared.staging import directory_bytes


DEFAULT_BYTES = 2**30
FOLDER = "unpacked-by-peft-lrqat"  # all in it is ours, and may be deleted
# A server process may still be reading an adapter that was asked for so recently.
SECONDS_IN_USE = 10.0
# An adapter is unpacked under a hidden name in far less.
SECONDS_OF_STAGING = 3600.0
UNPACKED = re.compile(r"(?!\.).*-[0-9a-f]{24}")
GONE = ".gone-"
FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


class UnpackedAdapters:
    """Unpacks adapters of type LORAQUANT when they are asked for; the least recently used go.

    Several processes may share the directory. They lie in a folder of their own in it, and nothing
    else is touched.

    Args:
        directory: by default in memory (``/dev/shm``), else among temporary files.
        max_bytes: of all files. Adapters that were asked for within the last ten seconds stay in
            any case, and so does a single adapter of more.
        dtype: of the factors.

    Raises:
        PermissionError: the folder in it is a link, or another user could put adapters there.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = DEFAULT_BYTES,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        check_integer("max_bytes", max_bytes, 1)
        parent = _in_memory() if directory is None else Path(directory)
        self.directory = parent / FOLDER
        self.max_bytes, self.dtype = max_bytes, dtype
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.mkdir(mode=0o700, exist_ok=True)
        for folder in (self.directory, *(() if directory is not None else (parent,))):
            _check_own(folder)

    def path(self, packed: str | os.PathLike[str]) -> Path:
        """The directory of the LoRA adapter that ``packed``, a directory, stands for.

        A LoRA adapter that is not packed stays where it is.

        Raises:
            ValueError: the adapter is damaged, or of another type.
            OSError: there is no room for it.
        """
        packed = Path(packed)
        config = packed / CONFIG_NAME
        kind = read_config(config).get("peft_type") if config.exists() else None
        if kind == "LORA":
            return packed
        if kind == "LRQAT":
            raise ValueError(
                f"the adapter in {packed} is of type LRQAT, whose factors act inside the rounding, "
                "so that no LoRA adapter stands for it; serve the model that `lrqat export` makes"
            )
        target = self.directory / self._name(packed)
        with FileLock(_lock(target)):
            if not all((target / name).exists() for name in FILES):
                shutil.rmtree(target, ignore_errors=True)
                dequantize_adapter(packed, target, dtype=self.dtype)
            os.utime(target)
        self._make_room()
        return target

    def _name(self, packed: Path) -> str:
        """Another one for another adapter, and for another version of it."""
        files = [packed.resolve() / name for name in FILES]
        parts: list[object] = [str(packed.resolve()), str(self.dtype)]
        for file in files:
            if file.exists():
                found = file.stat()
                parts += [found.st_size, found.st_mtime_ns, found.st_ino]
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
        return f"{packed.name.lstrip('.')}-{digest}"

    def _make_room(self) -> None:
        with FileLock(self.directory / "room.lock"):
            self._tidy_up()
            found = [
                (path.stat().st_mtime, directory_bytes(path), path)
                for path in self.directory.iterdir()
                if UNPACKED.fullmatch(path.name)
            ]
            total = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                if total <= self.max_bytes or time.time() - used < SECONDS_IN_USE:
                    return
                total -= size if self._evict(path) else 0

    def _evict(self, path: Path) -> bool:
        """Deletes an adapter, unless somebody asked for it meanwhile."""
        try:
            with FileLock(_lock(path), timeout=0):
                if time.time() - path.stat().st_mtime < SECONDS_IN_USE:
                    return False
                hidden = path.with_name(f"{GONE}{uuid.uuid4().hex}")
                path.rename(hidden)
        except Timeout:
            return False
        shutil.rmtree(hidden, ignore_errors=True)
        return True

    def _tidy_up(self) -> None:
        """Deletes what processes that were killed left behind."""
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):  # a process has just finished with it
                old = time.time() - path.stat().st_mtime > SECONDS_OF_STAGING
                if path.name.startswith(GONE) or (path.name.startswith(".") and old):
                    shutil.rmtree(path, ignore_errors=True)


def _lock(target: Path) -> Path:
    """One of 256: no lock is ever deleted, as another process may wait for it."""
    return target.with_name(f"{target.name[-2:]}.lock")


def _check_own(folder: Path) -> None:
    """PermissionError unless ``folder`` is the user's own, and nobody else may write into it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{folder} is a link, belongs to another user, or may be written to by others; give "
            "another directory for unpacked adapters"
        )


def _in_memory() -> Path:
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return place / f"peft-lrqat-{os.getuid()}"
