"""Safetensors files written a tensor at a time, so that memory holds only one of them."""

from __future__ import annotations

import json
import os
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import _TYPES  # names of dtypes in a file, as safetensors itself reads them
from torch import Tensor

from ..shared import integrity


DTYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class ShardWriter:
    """Writes ``model.safetensors``, or several files with an index, as transformers reads them.

    Several files are named ``model-00001-of-0000N.safetensors``. A header says where each tensor
    lies and is known last. So room for it is left in front, and the unused rest is filled with
    spaces, as the format allows.

    Args:
        directory: where the files go.
        max_shard_size: bytes of tensors in a file; a single larger tensor has its own file.
        header_bytes: room for the header of each file, without digests.
        settings: those that decide the result, and the others; with them, files have digests.
    """

    def __init__(
        self,
        directory: Path,
        max_shard_size: int,
        header_bytes: int,
        settings: tuple[dict[str, Any], dict[str, Any]] | None = None,
    ) -> None:
        self.directory, self.max_shard_size = directory, max_shard_size
        self.settings = settings
        self.header_bytes = header_bytes + -header_bytes % 8
        self.total = 0
        self._shards: list[tuple[Path, dict[str, dict[str, object]]]] = []
        self._digests: dict[str, str] = {}  # of the tensors in the current file
        self._file: BufferedWriter | None = None
        self._offset = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor, on whatever device, under ``name``."""
        size = tensor.numel() * tensor.element_size()
        file = self._file
        if file is None or (self._offset and self._offset + size > self.max_shard_size):
            file = self._next()
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        self._shards[-1][1][name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [self._offset, self._offset + size],
        }
        data = tensor.detach().to("cpu").contiguous()
        parts: list[Any] = []
        if data.numel():
            # An axis of one element may have any stride, which a view of bytes refuses.
            flat = data.as_strided((data.numel(),), (1,))
            parts = [flat.view(torch.uint8).numpy().data]
            file.write(parts[0])
        if self.settings is not None:
            self._digests[name] = integrity.tensor_digest(name, dtype, shape, parts)
        self._offset += size
        self.total += size

    def _next(self) -> BufferedWriter:
        self._close()
        path = self.directory / f"shard-{len(self._shards)}"
        self._shards.append((path, {}))
        self._file = open(path, "wb")  # noqa: SIM115 (closed when the shard is full)
        self._file.write(bytes(8 + self.header_bytes))
        self._offset = 0
        return self._file

    def _close(self) -> None:
        if self._file is None:
            return
        tensors = self._shards[-1][1]
        metadata = {"format": "pt"}
        if self.settings is not None:
            digests = [self._digests[name] for name in integrity.ordered(tensors)]
            metadata |= integrity.entry(digests, *self.settings)
            self._digests = {}
        header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
        if len(header) > self.header_bytes:
            raise AssertionError(
                f"the header takes {len(header)} bytes, but {self.header_bytes} were left for it"
            )
        self._file.seek(0)
        self._file.write(self.header_bytes.to_bytes(8, "little"))
        self._file.write(header.ljust(self.header_bytes))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def _finish(self) -> None:
        self._close()
        count = len(self._shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        else:
            index = {n: names[i] for i, (_, tensors) in enumerate(self._shards) for n in tensors}
            written = {"metadata": {"total_size": self.total}, "weight_map": index}
            text = json.dumps(written, indent=2)
            (self.directory / "model.safetensors.index.json").write_text(text + "\n")
        for (path, _), name in zip(self._shards, names, strict=True):
            path.rename(self.directory / name)
