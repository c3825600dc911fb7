"""Makes PEFT know a type that PEFT does not ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

from .shared.config import CARDS, AdapterConfig


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


def register(
    name: str,
    config_cls: type[AdapterConfig],
    model_cls: type[BaseTuner],
    card: Callable[[str, Any, str | None], None],
) -> None:
    """Registers a tuner under ``name`` (lower case; the enum has it in upper case) with PEFT. Calling it again changes nothing.

    ``card(folder, config, subfolder)`` creates or updates the model card of a saved adapter.
    """
    peft_type = _extend_peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    OWN_TYPES.add(peft_type)
    CARDS[peft_type.value] = card
