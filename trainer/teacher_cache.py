"""What a teacher gave for each text, on disk, so that it is computed once and then out of memory.

A folder holds one sub-folder for each teacher and kind of target, named by a digest of both:

    settings.json    what the digest is of
    <id>.bin         tensors, one after another; a process that adds texts writes a file of its own
    <id>.index       a line for each text: key, offset, tokens, checksum; written after its tensors

A line that is not whole, or points behind the end of its file, does not count: a killed run loses
the text it was at.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


# By name, the shape of what a token has, and its dtype.
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class TeacherCache:
    """Tensors by key of the text.

    Args:
        folder: of all caches.
        settings: what decides the tensors, such as teacher and target; fit for JSON.
        layout: the tensors of a text, each with a row for each token.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], layout: Layout) -> None:
        self.layout = dict(layout)
        described = {
            **settings,
            "tensors": {
                name: [list(shape), str(dtype).removeprefix("torch.")]
                for name, (shape, dtype) in layout.items()
            },
        }
        text = json.dumps(described, sort_keys=True)
        self.place = Path(folder) / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / "settings.json").write_text(json.dumps(described, indent=2) + "\n")
        # Key -> file, offset in bytes, tokens, checksum.
        self._found: dict[str, tuple[Path, int, int, int]] = {}
        self._mapped: dict[Path, Tensor] = {}
        self._own = self.place / f"{uuid.uuid4().hex}.bin"
        self.refresh()

    def refresh(self) -> None:
        """Finds what other processes have added."""
        for index in self.place.glob("*.index"):
            data = index.with_suffix(".bin")
            size = data.stat().st_size
            for line in index.read_text().splitlines(keepends=True):
                words = line.split()
                if len(words) != 4 or not line.endswith("\n"):
                    continue
                offset, tokens, checksum = map(int, words[1:])
                if offset + tokens * self._token_bytes <= size:
                    self._found[words[0]] = data, offset, tokens, checksum

    @property
    def _token_bytes(self) -> int:
        return sum(_row_bytes(*parts) for parts in self.layout.values())

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __len__(self) -> int:
        return len(self._found)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tokens for _, _, tokens, _ in self._found.values()) * self._token_bytes

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores the tensors of a text, each (tokens, ...)."""
        if key in self._found:
            return
        tokens = len(next(iter(tensors.values())))
        stored = b"".join(
            tensors[name].detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()
            for name, (_, dtype) in self.layout.items()
        )
        checksum = zlib.crc32(stored)
        with self._own.open("ab") as data:
            offset = data.tell()
            data.write(stored)
        with self._own.with_suffix(".index").open("a") as index:
            index.write(f"{key} {offset} {tokens} {checksum}\n")
        self._found[key] = self._own, offset, tokens, checksum

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a text, on the CPU.

        Raises:
            KeyError: there are none.
            ValueError: the file is damaged.
        """
        file, offset, tokens, checksum = self._found[key]
        stored = self._map(file, offset + tokens * self._token_bytes)[offset:]
        stored = stored[: tokens * self._token_bytes].clone()
        if zlib.crc32(stored.numpy().data) != checksum:
            raise ValueError(
                f"what the teacher gave is damaged in {file}; delete {self.place}, and it is "
                "computed again"
            )
        tensors, start = {}, 0
        for name, (shape, dtype) in self.layout.items():
            size = tokens * _row_bytes(shape, dtype)
            part = stored[start : start + size].clone()  # aligned for its dtype
            tensors[name] = part.view(dtype).view(tokens, *shape)
            start += size
        return tensors

    def _map(self, file: Path, size: int) -> Tensor:
        mapped = self._mapped.get(file)
        if mapped is None or len(mapped) < size:
            mapped = torch.from_file(
                str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8
            )
            self._mapped[file] = mapped
        return mapped


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
