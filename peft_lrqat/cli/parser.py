"""The parser that all commands share: options from dataclasses, errors in one line."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import HfArgumentParser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and names the defaults that the help texts do not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or "").lower():
            return action.help
        return super()._get_help_string(action)


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line: the usage of a hundred options would bury them."""

    def __init__(
        self,
        command: str,
        usage: str,
        dataclass_types: Sequence[type],
        description: str,
        examples: str,
    ):
        super().__init__(
            dataclass_types,
            prog=f"lrqat {command}",
            usage=f"lrqat {command} {usage}",
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        with self.user_errors():
            *parsed, unknown = self.parse_args_into_dataclasses(
                argv, look_for_args_file=False, return_remaining_strings=True
            )
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}")
        return tuple(parsed)

    @contextmanager
    def user_errors(self) -> Iterator[None]:
        """Ends the program with one clear line where a check of the user's input fails; bugs keep their traceback.

        Only checks belong inside, not training itself. TypeError: an adapter refuses layers it cannot quantise with it.
        """
        try:
            yield
        except (ValueError, OSError, ImportError, TypeError) as error:
            self.exit(2, f"{self.prog}: error: {' '.join(str(error).split())}\n")


def escaped(option: dataclasses.Field) -> dict[str, str]:
    """The help text of a config field for argparse."""
    return {"help": option.metadata["help"].replace("%", "%%")}


def print_table(rows: dict[str, str]) -> None:
    names, values = (max(map(len, column)) for column in (rows.keys(), rows.values()))
    for name, value in rows.items():
        print(f"{name:{names}}  {value:>{values}}")
