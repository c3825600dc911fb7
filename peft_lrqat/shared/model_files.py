"""The files of a stored model, signed as one: tensors and ``config.json``.

Exports have their digests in the safetensors files, as adapters have (`integrity`). A low-bit base
has those of its tensors in ``config.json`` already, so that of its settings lies beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import integrity
from .adapter_files import read_config


CONFIG = "config.json"
# Fields of `config.json` that change nothing in what a model computes.
WITHOUT_EFFECT = {"_name_or_path", "transformers_version"}
ENTRY, DIGEST = "quantization_config", "settings_digest"


def sign_model(folder: str | os.PathLike[str]) -> None:
    """Signs an exported model or a low-bit base whose files were edited on purpose.

    The digests of an export are made of the files as they are now; of a low-bit base only that of
    ``config.json``. Raises ValueError if the files cannot be read.

    Example:
        ```py
        from peft_lrqat import sign_model

        sign_model("export")  # after editing `rope_parameters` in its config.json
        ```
    """
    folder = Path(folder)
    written = read_config(folder / CONFIG)
    if _is_base(written):
        sign_settings(folder)
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors file to sign")
    for path in files:
        integrity.sign_file(path, *split_settings(written), anew=True)


def check_model(folder: Path, files: Iterable[Path]) -> None:
    """Raises ValueError unless the files of an export are those that were written together."""
    settings = split_settings(read_config(folder / CONFIG))
    integrity.check_files(files, *settings, way=_way(folder))


def check_signed(files: Iterable[str | os.PathLike[str]]) -> None:
    """`check_model` for those of the files that have digests; others are somebody else's."""
    folders: dict[Path, list[Path]] = {}
    for path in map(Path, files):
        if integrity.is_signed(path):
            folders.setdefault(path.parent, []).append(path)
    for folder, signed in folders.items():
        check_model(folder, signed)


def split_settings(written: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of ``config.json`` that decide the result, and the others."""
    others = {name: value for name, value in written.items() if name in WITHOUT_EFFECT}
    return {name: value for name, value in written.items() if name not in others}, others


def is_stored_base(folder: Path) -> bool:
    """Whether a directory holds a low-bit base, and not an export or another model."""
    return (folder / CONFIG).is_file() and _is_base(read_config(folder / CONFIG))


def _is_base(written: dict[str, Any]) -> bool:
    entry = written.get(ENTRY)
    return isinstance(entry, dict) and entry.get("quant_method") == "lrqat" and "digests" in entry


def sign_settings(folder: Path) -> None:
    """Writes the digest of the settings into the ``config.json`` of a low-bit base."""
    path = folder / CONFIG
    written = read_config(path)
    written[ENTRY] = {**written[ENTRY], DIGEST: _digest(written)}
    temporary = path.with_name(f".{path.name}.signed")
    try:
        temporary.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_settings(folder: Path) -> None:
    """Raises ValueError unless the ``config.json`` of a low-bit base is what was signed."""
    written = read_config(folder / CONFIG)
    entry = written.get(ENTRY)
    if not isinstance(entry, dict) or entry.get(DIGEST) is None:
        return
    if entry[DIGEST] != _digest(written):
        raise ValueError(
            f"the settings in {folder / CONFIG} are not those that were saved: the file is "
            f"damaged. Restore it, or, if you changed it on purpose, {_way(folder)}"
        )


def _digest(written: dict[str, Any]) -> str:
    settings, _ = split_settings(written)
    entry = {name: value for name, value in written[ENTRY].items() if name != DIGEST}
    return integrity.settings_digest({**settings, ENTRY: entry})


def _way(folder: Path) -> str:
    return f"call `peft_lrqat.sign_model({str(folder)!r})`"
