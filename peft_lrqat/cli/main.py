"""The command `lrqat`, for callers that have imported the package: see `lrqat_command`."""

from lrqat_command import COMMANDS, main


__all__ = ["COMMANDS", "main"]
