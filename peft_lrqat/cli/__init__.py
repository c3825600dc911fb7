"""The command `lrqat`, one file per command; the program itself is `lrqat_command`."""

from lrqat_command import COMMANDS, main


__all__ = ["COMMANDS", "main"]
