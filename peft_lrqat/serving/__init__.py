"""Packed adapters in servers that know no other than LoRA."""

from .unpacked import UnpackedAdapters


__all__ = ["UnpackedAdapters"]
