"""Import paths of release 0.1.0 whose modules moved; they still work."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


MOVED = {
    "peft_lrqat.cache": "peft_lrqat.shared.tensor_cache",
    "peft_lrqat.config": "peft_lrqat.lrqat.config",
    "peft_lrqat.data": "peft_lrqat.trainer.data",
    "peft_lrqat.downcast": "peft_lrqat.base.downcast",
    "peft_lrqat.kv_cache": "peft_lrqat.activations.attention",
    "peft_lrqat.layer": "peft_lrqat.lrqat.layer",
    "peft_lrqat.low_bit_cache": "peft_lrqat.activations.cache",
    "peft_lrqat.metrics": "peft_lrqat.trainer.metrics",
    "peft_lrqat.model": "peft_lrqat.lrqat.model",
    "peft_lrqat.size": "peft_lrqat.lrqat.size",
    "peft_lrqat.staging": "peft_lrqat.shared.staging",
}


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        place = MOVED[spec.name]
        warnings.warn(
            f"`{spec.name}` is now `{place}`; import it from there",
            DeprecationWarning,
            stacklevel=2,
        )
        module = import_module(place)
        # The import system writes the old name's spec into it; `exec_module` puts this one back.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def find_moved_modules() -> None:
    """Lets the import system find the old names. Calling it again changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
