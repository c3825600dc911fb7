"""Options made from the fields of a configuration, with the help text that the fields have."""

import argparse
import dataclasses
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import field
from typing import Any, get_args, get_origin, get_type_hints


# A module's name; anything else in `--target_modules` is a regular expression.
NAME = re.compile(r"[\w.]+")


def escaped(option: dataclasses.Field) -> dict[str, str]:
    """The help text of a config field for argparse."""
    return {"help": option.metadata["help"].replace("%", "%%")}


def json_object(text: str) -> dict[str, Any]:
    """A dict from the command line, such as ``'{"down_proj": 4}'``."""
    message = f'must be a JSON object such as {{"down_proj": 4}}, but is {text!r}'
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{message} ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(message)
    return value


def _command_line_type(hint: Any) -> Any:
    """The type hint of a config field as `HfArgumentParser` understands it."""
    lists = [option for option in get_args(hint) if get_origin(option) is list]
    if lists:
        # A single value becomes a list of one; `config_values` tells names and patterns apart.
        return lists[0] | None
    return json_object if get_origin(hint) is dict else hint


def options_of(config: type, name: str, title: str, left_out: Collection[str]) -> Any:
    """A dataclass ``name`` of options, one for each field of ``config`` but those ``left_out``."""
    hints = get_type_hints(config)
    fields: list[tuple[str, Any, dataclasses.Field]] = []
    for option in dataclasses.fields(config):
        if option.name in left_out:
            continue
        metadata = escaped(option)
        kind, factory = _command_line_type(hints[option.name]), option.default_factory
        if option.name == "target_modules":
            # The command line quantises the whole model, not PEFT's default targets for LoRA.
            copy: Any = field(default_factory=lambda: ["all-linear"], metadata=metadata)
        else:
            copy = field(default=option.default, default_factory=factory, metadata=metadata)
        fields.append((option.name, kind, copy))
    return dataclasses.make_dataclass(name, fields, namespace={"_argument_group_name": title})


def config_values(options: Any) -> dict[str, Any]:
    """The fields of a configuration from parsed options."""
    values = dataclasses.asdict(options)
    for name in ("target_modules", "exclude_modules"):
        given = values[name]
        if (
            given is not None
            and len(given) == 1
            and (given[0] == "all-linear" or not NAME.fullmatch(given[0]))
        ):
            values[name] = given[0]
    return values


def given_names(argv: Sequence[str]) -> set[str]:
    """The options that a command line names, as names of fields."""
    words = {word.partition("=")[0] for word in argv if word.startswith("--")}
    names = {word.removeprefix("--").replace("-", "_") for word in words}
    return names | {name.removeprefix("no_") for name in names}
