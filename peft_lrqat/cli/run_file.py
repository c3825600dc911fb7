"""Options from a YAML file: `--config run.yaml`, for every command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .fields import given_names


OPTION = "--config"
NAME = "run.yaml"
# How one run went on from another, which is no setting of the result.
NOT_KEPT = {"resume_from_checkpoint", "overwrite_checkpoints"}


def with_run_file(argv: Sequence[str]) -> list[str]:
    """The words of a command line, with the options of its run file that it does not name itself.

    Raises:
        ValueError: the file is not there, or is not a mapping of options to values.
    """
    words = list(argv)
    place = next(
        (n for n, w in enumerate(words) if w == OPTION or w.startswith(f"{OPTION}=")), None
    )
    if place is None:
        return words
    word = words.pop(place)
    if "=" in word:
        file = word.partition("=")[2]
    elif place < len(words):
        file = words.pop(place)
    else:
        raise ValueError(f"{OPTION} needs a YAML file")
    given = given_names(words)
    for name, value in read_run_file(file).items():
        if name not in given and value is not None:
            words += [f"--{name}", *_words(value)]
    return words


def read_run_file(file: str) -> dict[str, Any]:
    """Options and values; names with underscores."""
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{OPTION} {file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{OPTION} {file} must hold options and values, such as `bits: 3`")
    return {name.replace("-", "_"): value for name, value in found.items()}


def write_run_file(folder: str, options: dict[str, Any], argv: Sequence[str]) -> None:
    """Writes the options that were given into ``folder``, so that `--config` repeats the run.

    Args:
        folder: that holds the result.
        options: all values, parsed.
        argv: with the options of a run file, see `with_run_file`.
    """
    given = given_names(argv) - NOT_KEPT
    kept = {name: _plain(value) for name, value in options.items() if name in given}
    temporary = Path(folder) / f"{NAME}.tmp"
    temporary.write_text(yaml.safe_dump(kept, sort_keys=True), encoding="utf-8")
    temporary.replace(Path(folder) / NAME)


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value)]


def _plain(value: Any) -> Any:
    """A value as YAML writes it: enumerations by their value."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
