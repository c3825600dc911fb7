"""The command `lrqat`, one file per command."""
