"""What the configurations of both adapter types share: versions, saving, the model card."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType

from .._version import __version__
from .adapter_files import update_signature
from .checks import check_integer


# Writes the card of an adapter: by the name of its type, (folder, config, subfolder).
CARDS: dict[str, Callable[[str, Any, str | None], None]] = {}


@dataclass
class AdapterConfig(PeftConfig):
    """Base class of `LRQATConfig` and `LoRAQuantConfig`."""

    # The newest version of the saved format that this release reads.
    newest_format: ClassVar[int] = 1
    # Fields that give values by a key of the module's name; the first key that fits counts.
    patterns: ClassVar[tuple[str, ...]] = ()

    format_version: int = field(
        default=1, metadata={"help": "Version of the saved format; leave it to the library."}
    )
    library_version: Optional[str] = field(
        default=None,
        compare=False,
        metadata={"help": "The release of peft_lrqat that saved the adapter; filled in."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in self.patterns:
            setattr(self, name, _from_pairs(getattr(self, name)))
        check_integer("format_version", self.format_version, 1)
        if self.format_version > self.newest_format:
            raise ValueError(
                f"`format_version` is {self.format_version}, but this peft_lrqat reads up to "
                f"{self.newest_format}: the adapter was saved by a newer release; run "
                "`pip install -U peft-lrqat`"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved, with the version of the library that saves them.

        PEFT sorts the keys of a dict in the file. Patterns in another order become lists of pairs.
        """
        fields = super().to_dict() | {"library_version": __version__}
        for name in self.patterns:
            if list(fields[name]) != sorted(fields[name]):
                fields[name] = [list(item) for item in fields[name].items()]
        # The order of a set differs from process to process, and the digest of settings with it.
        return {name: sorted(v) if isinstance(v, set) else v for name, v in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the configuration, and updates the model card of an adapter in that folder."""
        super().save_pretrained(save_directory, **kwargs)
        if os.path.exists(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)):
            update_signature(Path(save_directory))
        # For the card: without a task, only this names the class of the base model.
        if mapping := kwargs.get("auto_mapping_dict"):
            self.auto_mapping = mapping
        weights = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        if any(os.path.exists(os.path.join(save_directory, name)) for name in weights):
            self.write_card(save_directory)

    def write_card(self, folder: str, subfolder: str | None = None) -> None:
        """Creates or updates the card in ``folder`` of an adapter there or in ``subfolder``."""
        CARDS[PeftType(self.peft_type).value](folder, self, subfolder)


def _from_pairs(pattern: Any) -> Any:
    """A dict of the pairs that `AdapterConfig.to_dict` writes; anything else as it is."""
    if not isinstance(pattern, list) or not pattern:
        return pattern
    pairs = all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pattern)
    return dict(pattern) if pairs else pattern
