"""The parser that all commands share: options from dataclasses, errors in one line."""

import argparse
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .run_file import with_run_file


# Options at the end of a help text.
LAST = {"window", "json"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples; adds a default where the help does not name it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Each option has a second spelling with dashes, which would double the length of the text.
        if not action.option_strings or "-h" in action.option_strings:
            return super()._format_action_invocation(action)
        name = max(action.option_strings, key=lambda word: ("_" in word, len(word)))
        is_switch = action.nargs in (0, "?")
        return name if is_switch else f"{name} {self._format_args(action, 'VALUE')}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(word.startswith("--no_") for word in action.option_strings):
            return f"the opposite of --{action.dest}"
        if action.default is None or "default" in (action.help or "").lower():
            return action.help
        return super()._get_help_string(action)


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line, without the usage of a hundred options."""

    def __init__(
        self,
        command: str,
        usage: str,
        dataclass_types: Sequence[Any],
        description: str,
        examples: str,
    ):
        super().__init__(
            dataclass_types,
            prog=f"lrqat {command}",
            usage=f"lrqat {command} {usage}",
            description=description,
            epilog="--like-this may be written for --like_this. --config FILE reads options from\n"
            f"a YAML file; the command line wins.\n\nexamples:\n{examples}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        for group in self._action_groups:
            # Options that commands share come first in the dataclasses; these belong at the end.
            group._group_actions.sort(key=lambda action: action.dest in LAST)

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2, the message, and where to find the options."""
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """One object for each dataclass, then one for the other arguments if there are any.

        ``words`` is then the command line with the options of a run file.
        """
        with self.user_errors():
            self.words = argv = with_run_file(argv)
            *parsed, unknown = self.parse_args_into_dataclasses(
                argv, look_for_args_file=False, return_remaining_strings=True
            )
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{self._suggestion(unknown)}")
        return tuple(parsed)

    def _suggestion(self, unknown: Sequence[str]) -> str:
        """The known options that are spelt like the unknown ones."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        given = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        close = [match for word in given for match in difflib.get_close_matches(word, known, n=1)]
        return f"; did you mean {', '.join(close)}?" if close else ""

    @contextmanager
    def user_errors(self) -> Iterator[None]:
        """Ends the program with one clear line if a check of the user's input fails.

        Only checks belong inside, not training itself, so that bugs keep their traceback.
        TypeError is what an adapter raises for layers that it cannot quantise.
        """
        try:
            yield
        except (ValueError, OSError, ImportError, TypeError) as error:
            self.exit(2, f"{self.prog}: error: {' '.join(str(error).split())}\n")


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *others = (f"{cell:{'>' if n else '<'}{widths[n]}}" for n, cell in enumerate(row))
        print("  ".join([first, *others]).rstrip())


def print_table(rows: dict[str, str]) -> None:
    """Prints names and values in two columns."""
    names, values = (max(map(len, column)) for column in (rows.keys(), rows.values()))
    for name, value in rows.items():
        print(f"{name:{names}}  {value:>{values}}")
