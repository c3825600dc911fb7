"""A directory of bounded size in which packed adapters lie as LoRA while a server reads them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from filelock import FileLock
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..loraquant import dequantize_adapter
from ..shared.adapter_files import read_config
from ..shared.checks import check_integer
from ..shared.staging import directory_bytes


DEFAULT_BYTES = 2**30
FOLDER = "unpacked-by-peft-lrqat"  # all in it is ours, and may be deleted
# A server process may still be reading an adapter that was asked for so recently.
SECONDS_IN_USE = 10.0
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
        PermissionError: the directory belongs to another user, who could put other adapters there.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = DEFAULT_BYTES,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        check_integer("max_bytes", max_bytes, 1)
        self.directory = (_in_memory() if directory is None else Path(directory)) / FOLDER
        self.max_bytes, self.dtype = max_bytes, dtype
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.directory.stat().st_uid != os.getuid():
            raise PermissionError(
                f"{self.directory} belongs to another user; give another directory for unpacked "
                "adapters"
            )

    def path(self, packed: str | os.PathLike[str]) -> Path:
        """The directory of the LoRA adapter that ``packed``, a directory, stands for.

        A LoRA adapter that is not packed stays where it is.

        Raises:
            ValueError: the adapter is damaged, or of another type.
            OSError: there is no room for it.
        """
        packed = Path(packed)
        config = packed / CONFIG_NAME
        if config.exists() and read_config(config).get("peft_type") == "LORA":
            return packed
        target = self.directory / self._name(packed)
        with FileLock(_lock(target)):
            if not all((target / name).exists() for name in FILES):
                shutil.rmtree(target, ignore_errors=True)
                try:
                    dequantize_adapter(packed, target, dtype=self.dtype)
                except BaseException:
                    _lock(target).unlink(missing_ok=True)
                    raise
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
        return f"{packed.name}-{digest}"

    def _make_room(self) -> None:
        with FileLock(self.directory / "room.lock"):
            found = [
                (path.stat().st_mtime, directory_bytes(path), path)
                for path in self.directory.iterdir()
                if path.is_dir() and not path.name.startswith(".")
            ]
            total = sum(size for _, size, _ in found)
            for used, size, path in sorted(found):
                if total <= self.max_bytes or time.time() - used < SECONDS_IN_USE:
                    return
                # Out of sight first: whoever asks for it meanwhile unpacks it anew.
                hidden = path.with_name(f".{path.name}")
                path.rename(hidden)
                shutil.rmtree(hidden, ignore_errors=True)
                _lock(path).unlink(missing_ok=True)
                total -= size


def _lock(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")


def _in_memory() -> Path:
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return place / f"peft-lrqat-{os.getuid()}"
