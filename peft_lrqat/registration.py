"""Makes PEFT know a type that PEFT does not ship."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


# The types that were registered here; their adapters are published by hub.py.
OWN_TYPES: set[PeftType] = set()


def _extend_peft_type(name: str) -> PeftType:
    """Adds the member ``name`` to the enum ``PeftType``, or returns the one that is there.

    ``register_peft_method`` only takes names that are in the enum, and PEFT has no way to add one. A real member, unlike a
    plain string, also works where PEFT and transformers read ``.value``.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 and later
        PeftType._hashable_values_.append(name)
    # The enum's own __setattr__ refuses names that are in its member map.
    type.__setattr__(PeftType, name, member)
    return member


def has_own_adapter(model: PeftModel) -> bool:
    """Whether any adapter of ``model`` is of a type that was registered here."""
    return any(config.peft_type in OWN_TYPES for config in model.peft_config.values())


def _override_push_to_hub() -> None:
    """Sends ``push_to_hub`` of models with adapters of this package to hub.py, and of all others where it went before.

    The inherited method saves the adapter with its card and then writes a card of its own over it.
    """
    inherited = PeftModel.push_to_hub
    # functools.wraps hands the mark on, so that a method which somebody put around this one is left in place, too.
    if getattr(inherited, "knows_peft_lrqat", False):
        return

    @functools.wraps(inherited)
    def push_to_hub(self: PeftModel, *args: Any, **kwargs: Any) -> str:
        if not has_own_adapter(self):
            return inherited(self, *args, **kwargs)
        from .hub import push_to_hub as push_own  # hub.py builds on this file

        return push_own(self, *args, **kwargs)

    push_to_hub.knows_peft_lrqat = True
    PeftModel.push_to_hub = push_to_hub


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Registers a tuner under ``name`` (lower case; the enum has it in upper case) with PEFT. Calling it again changes nothing.

    ``config_cls`` has a method ``write_card(folder, subfolder=None)``, as `LRQATConfig` has.
    """
    peft_type = _extend_peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    OWN_TYPES.add(peft_type)
    _override_push_to_hub()
