"""Digests in the metadata of safetensors files, which show damage by chance when they are loaded.

A signed file has the entry ``peft_lrqat`` in its metadata, a JSON object of

    version    of this scheme, 1
    library    the release of peft_lrqat that wrote it
    tensors    8 characters for each tensor, one after another, in the order of their data (and of
               their names, where two have no data): 48 bits of BLAKE2b over the name, the dtype,
               the shape and the bytes
    settings   the same for the settings that decide the result
    others     the same for all other settings

Digests detect chance, not intent: whoever edits a file on purpose signs it again (`sign_file`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from .._version import __version__


logger = logging.get_logger(__name__)
ENTRY, VERSION, SIZE = "peft_lrqat", 1, 8
PART_BYTES = 1 << 24  # read at a time


def tensor_digest(name: str, dtype: str, shape: Iterable[int], data: Iterable[bytes]) -> str:
    """8 characters; ``dtype`` as safetensors names it, ``data`` little-endian bytes in parts."""
    digest = hashlib.blake2b(json.dumps([name, dtype, list(shape)]).encode(), digest_size=6)
    for part in data:
        digest.update(part)
    return base64.urlsafe_b64encode(digest.digest()).decode()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """8 characters; ``settings`` as a JSON file holds them, in any order."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return base64.urlsafe_b64encode(hashlib.blake2b(text.encode(), digest_size=6).digest()).decode()


def entry(
    tensors: Iterable[str], settings: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a signed file. ``tensors``: their digests, in the order of their data."""
    signature = {
        "version": VERSION,
        "library": __version__,
        "tensors": "".join(tensors),
        "settings": settings_digest(settings),
        "others": settings_digest(others),
    }
    return {ENTRY: json.dumps(signature)}


def is_signed(path: Path) -> bool:
    """Whether a safetensors file has digests; ValueError if it is not whole."""
    return _signature(_header(path)[0], path) is not None


def sign_file(
    path: Path,
    settings: Mapping[str, Any],
    others: Mapping[str, Any],
    *,
    anew: bool = False,
) -> None:
    """Writes digests into the metadata of a safetensors file; the tensors stay as they are.

    Digests of tensors that are there already are kept, so that damage in between is not signed,
    except ``anew``. The file is replaced in one step. Raises ValueError if it is not whole.
    """
    header, start = _header(path)
    old = _signature(header, path)
    if old is None or anew:
        tensors: Iterable[str] = _digests(path, header, start)
    else:
        tensors = [old["tensors"]]
    metadata = {**header.get("__metadata__", {}), **entry(tensors, settings, others)}
    if metadata == header.get("__metadata__"):
        return
    text = json.dumps({**header, "__metadata__": metadata}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.signed")
    try:
        with open(path, "rb") as source, open(temporary, "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            source.seek(start)
            while part := source.read(PART_BYTES):
                target.write(part)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(
    path: Path, settings: Mapping[str, Any], others: Mapping[str, Any], *, way: str
) -> None:
    """Raises ValueError unless a safetensors file and its settings are those that were signed.

    ``way`` says how to sign it. A file without a signature, and settings that were changed but do
    not decide the result, get a warning.
    """
    check_files([path], settings, others, way=way)


def check_files(
    paths: Iterable[Path], settings: Mapping[str, Any], others: Mapping[str, Any], *, way: str
) -> None:
    """`check_file` for the files of one model, which share their settings and the warnings."""
    unsigned, changed = [], []
    for path in paths:
        signature = _checked_signature(path, settings, way)
        if signature is None:
            unsigned.append(path)
        elif signature["others"] != settings_digest(others):
            changed.append(path)
    if unsigned:
        logger.warning(
            f"{unsigned[0]} has no digests, as files of peft_lrqat 0.1 have none, so damage would "
            f"go unnoticed; save it again, or {way}"
        )
    if changed:
        logger.warning(
            f"settings beside {changed[0]} were changed after it was saved; they do not decide "
            f"the result. To accept them, {way}"
        )


def _checked_signature(path: Path, settings: Mapping[str, Any], way: str) -> dict[str, Any] | None:
    """The signature of a file whose tensors and settings are those that were signed."""
    header, start = _header(path)
    signature = _signature(header, path)
    if signature is None:
        return None
    found = dict(zip(ordered(header), _digests(path, header, start), strict=True))
    expected = signature["tensors"]
    if len(expected) != SIZE * len(found):
        raise ValueError(
            f"{path} has {len(found)} tensors, but {len(expected) // SIZE} were saved; restore "
            f"the file, or, if you changed it on purpose, {way}"
        )
    changed = [
        name
        for i, (name, digest) in enumerate(found.items())
        if digest != expected[SIZE * i : SIZE * (i + 1)]
    ]
    if changed:
        raise ValueError(
            f"`{changed[0]}` in {path} is not what was saved ({len(changed)} of {len(found)} "
            f"tensors differ): the file is damaged. Restore it, or, if you changed it on purpose, "
            f"{way}"
        )
    if signature["settings"] != settings_digest(settings):
        raise ValueError(
            f"the settings beside {path} are not those that it was saved with. Restore them, or, "
            f"if you changed them on purpose, {way}"
        )
    return signature


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data start."""
    try:
        with safe_open(path, framework="np"):  # its checks: bounds, overlaps, gaps
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size)), 8 + size
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path.name} in {path.parent} is not whole ({error})") from error


def _signature(header: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    metadata = header.get("__metadata__", {})
    written = metadata.get(ENTRY)
    if written is None:
        if any('"tensors"' in text and '"settings"' in text for text in metadata.values()):
            raise ValueError(f"the digests in {path} have another name: the file is damaged")
        return None
    try:
        signature = json.loads(written)
        if signature["version"] != VERSION:
            raise ValueError(f"version {signature['version']!r} of the digests")
        if not all(isinstance(signature[key], str) for key in ("tensors", "settings", "others")):
            raise ValueError("digests that are not text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the digests in {path} cannot be read ({error}): the file is damaged, or was written "
            "by a newer release; restore it, or run `pip install -U peft-lrqat`"
        ) from None
    return signature


def ordered(header: Mapping[str, Any]) -> list[str]:
    """The names of the tensors in a file's header, in the order of their data."""
    names = [name for name in header if name != "__metadata__"]
    return sorted(names, key=lambda name: (*header[name]["data_offsets"], name))


def _digests(path: Path, header: Mapping[str, Any], start: int) -> list[str]:
    digests = []
    with open(path, "rb") as file:
        for name in ordered(header):
            described = header[name]
            first, last = described["data_offsets"]
            file.seek(start + first)
            parts = (
                file.read(min(PART_BYTES, last - position))
                for position in range(first, last, PART_BYTES)
            )
            digests.append(tensor_digest(name, described["dtype"], described["shape"], parts))
    return digests
