"""Makes PEFT know a type that PEFT does not ship."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


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


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Registers a tuner under ``name`` (lower case; the enum has it in upper case) with PEFT. Calling it again changes nothing."""
    if _extend_peft_type(name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
