"""The files of a saved adapter, signed as one: tensors and configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from . import integrity


# Fields of a configuration that change nothing in what an adapter computes.
WITHOUT_EFFECT = {
    "base_model_name_or_path",
    "inference_mode",
    "library_version",
    "peft_version",
    "report",
    "revision",
    "training_record",
}


def sign_adapter(folder: str | os.PathLike[str]) -> None:
    """Signs a saved adapter whose files were edited on purpose, or that has no digests yet.

    The digests are made of the files as they are now. Raises ValueError if the files cannot be
    read.

    Example:
        ```py
        from peft_lrqat import sign_adapter

        sign_adapter("my-adapter")  # after editing `lora_alpha` in its adapter_config.json
        ```
    """
    _sign(Path(folder), anew=True)


def update_signature(folder: Path) -> None:
    """Signs an adapter whose configuration was just written; digests of tensors are kept."""
    _sign(folder, anew=False)


def _sign(folder: Path, *, anew: bool) -> None:
    settings = _split(read_config(folder / CONFIG_NAME))
    integrity.sign_file(folder / SAFETENSORS_WEIGHTS_NAME, *settings, anew=anew)


def check_adapter(config_path: Path, weights_path: Path) -> None:
    """Raises ValueError unless the two files are those that were saved together."""
    way = f"call `peft_lrqat.sign_adapter({str(config_path.parent)!r})`"
    integrity.check_file(weights_path, *_split(read_config(config_path)), way=way)


def read_config(path: Path) -> dict[str, Any]:
    """The object in a configuration's file; ValueError if there is none."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} in {path.parent} cannot be read ({error})") from error
    if not isinstance(written, dict):
        raise ValueError(
            f"{path.name} in {path.parent} must hold a JSON object, but holds a "
            f"{type(written).__name__}"
        )
    return written


def _split(written: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that decide the result, and the others."""
    others = {name: value for name, value in written.items() if name in WITHOUT_EFFECT}
    return {name: v for name, v in written.items() if name not in others}, others
