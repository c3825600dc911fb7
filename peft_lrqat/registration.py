"""Makes PEFT know a type that PEFT does not ship, and load its adapters whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    PeftType,
    hotswap,
    register_peft_method,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from .activations import attention
from .shared.adapter_files import check_adapter, read_config, sign_adapter
from .shared.config import CARDS, AdapterConfig
from .shared.hotswap import hotswap_adapter
from .shared.integrity import is_signed
from .shared.model_files import is_stored_base, sign_settings
from .shared.saved import check_trained_is_saved
from .shared.transaction import unchanged_on_failure


# The types that were registered here; their adapters are published by hub.py.
OWN_TYPES: set[PeftType] = set()


def _extend_peft_type(name: str) -> PeftType:
    """Adds the member ``name`` to the enum ``PeftType``, or returns the one that is there.

    ``register_peft_method`` only takes names that are in the enum, and PEFT has no way to add one.
    A real member, unlike a plain string, also works where PEFT and transformers read ``.value``.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType._member_names_))
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Python 3.13 and later.
    getattr(PeftType, "_hashable_values_", []).append(name)
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
    """Registers a tuner under ``name`` (lower case; the enum has it in upper case) with PEFT.
    Calling it again changes nothing.

    ``card(folder, config, subfolder)`` creates or updates the model card of a saved adapter.
    """
    peft_type = _extend_peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    OWN_TYPES.add(peft_type)
    CARDS[peft_type.value] = card


def override_load_adapter() -> None:
    """Lets PEFT and transformers load adapters of this package whole or not at all.

    Their own methods leave an adapter that they refuse in the model, under its name and untrained.
    Adapters of other types go where they went before. Calling it again changes nothing.
    """
    _override(PeftModel, "load_adapter", _load_adapter)
    _override(PeftAdapterMixin, "load_adapter", _load_adapter_natively)
    inherited = vars(PeftModel)["from_pretrained"].__func__
    if getattr(inherited, "knows_peft_lrqat", False):
        return

    @functools.wraps(inherited)
    def from_pretrained(
        cls: type[PeftModel], model: nn.Module, model_id: str, *args: Any, **kwargs: Any
    ) -> PeftModel:
        # Before the model is touched; it costs a look at the files.
        _check_files(model_id, kwargs)
        return inherited(cls, model, model_id, *args, **kwargs)

    vars(from_pretrained)["knows_peft_lrqat"] = True
    # A class method is replaced.
    setattr(PeftModel, "from_pretrained", classmethod(from_pretrained))  # noqa: B010


def override_save_pretrained() -> None:
    """Lets PEFT and transformers save all that was trained, or say so, and sign what they save.

    Models without an adapter or a base of this package are saved as before. Calling it again
    changes nothing.
    """
    _override(PeftModel, "save_pretrained", _save_adapters)
    _override(PreTrainedModel, "save_pretrained", _save_natively)


def override_hotswap() -> None:
    """Lets PEFT's hot-swapping take adapters of this package. Calling it again changes nothing."""
    _override(hotswap, "hotswap_adapter", _hotswap_adapter)
    _override(hotswap, "check_hotswap_configs_compatible", _check_hotswap)


def _hotswap_adapter(
    inherited: Callable[..., Any],
    model: Any,
    model_name_or_path: str,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    own = has_own_adapter(model)
    function = hotswap_adapter if own else inherited
    function(model, model_name_or_path, adapter_name, *args, **kwargs)


def _check_hotswap(inherited: Callable[..., Any], config0: PeftConfig, config1: PeftConfig) -> None:
    """Names our function where PEFT's own was imported before this package."""
    for config in (config0, config1):
        if config.peft_type in OWN_TYPES:
            raise ValueError(
                f"PEFT cannot hot-swap {config.peft_type.value} adapters; use "
                "`from peft_lrqat import hotswap_adapter`, which takes the same arguments"
            )
    inherited(config0, config1)


def _override(owner: Any, name: str, method: Callable[..., Any]) -> None:
    inherited = getattr(owner, name)
    # functools.wraps hands the mark on, so that a method that somebody put around this one is
    # left in place, too.
    if getattr(inherited, "knows_peft_lrqat", False):
        return

    @functools.wraps(inherited)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(inherited, self, *args, **kwargs)

    vars(call)["knows_peft_lrqat"] = True
    setattr(owner, name, call)


def _save_adapters(
    inherited: Callable[..., Any], self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any
) -> Any:
    if has_own_adapter(self):
        given = signature(inherited).bind(self, save_directory, *args, **kwargs).arguments
        embeddings = given.get("save_embedding_layers", "auto")
        check_trained_is_saved(self, kwargs.get("state_dict"), embeddings)
    return inherited(self, save_directory, *args, **kwargs)


def _save_natively(
    inherited: Callable[..., Any],
    self: PreTrainedModel,
    save_directory: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' own method, which writes one adapter where there are adapters."""
    adapters = getattr(self, "peft_config", {}) if hasattr(self, "_hf_peft_config_loaded") else {}
    own = any(config.peft_type in OWN_TYPES for config in adapters.values())
    if own:
        check_trained_is_saved(self, kwargs.get("state_dict"))
    result = inherited(self, save_directory, *args, **kwargs)
    main = args[0] if args else kwargs.get("is_main_process", True)
    folder = Path(save_directory)
    if main and own and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        # The configuration was written before the tensors, so nothing has signed them yet.
        sign_adapter(folder)
    elif main and not adapters and hasattr(self, "hf_quantizer") and is_stored_base(folder):
        sign_settings(folder)
    return result


def _load_adapter(
    inherited: Callable[..., Any],
    self: PeftModel,
    model_id: str,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not has_own_adapter(self):
        return inherited(self, model_id, adapter_name, *args, **kwargs)
    with _whole_or_not_at_all(self, adapter_name):
        _check_files(model_id, kwargs)
        return inherited(self, model_id, adapter_name, *args, **kwargs)


def _load_adapter_natively(
    inherited: Callable[..., Any],
    self: nn.Module,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    own = _check_files(peft_model_id, kwargs | (kwargs.get("adapter_kwargs") or {}))
    if not own:
        return inherited(self, peft_model_id, adapter_name, *args, **kwargs)
    name = adapter_name or "default"
    with _whole_or_not_at_all(self, name):
        result = inherited(self, peft_model_id, adapter_name, *args, **kwargs)
        # transformers reports what other adapters of the type have, too.
        missing = sorted(key for key in result.missing_keys if name in key.split("."))
        if missing:
            raise ValueError(
                f"the saved adapter has no `{missing[0]}` ({len(missing)} tensors are missing); "
                "its file is not whole, or for another model"
            )
        # PEFT's loaders check this before anything is loaded.
        for module in self.modules():
            check = getattr(module, "check_loaded", None)
            if callable(check):
                check(name)
        return result


@contextmanager
def _whole_or_not_at_all(model: nn.Module, adapter_name: str) -> Iterator[None]:
    try:
        with unchanged_on_failure(model, adapter_name):
            yield
    except BaseException:
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                attention.route(part)
        raise


def _check_files(source: str | None, place: dict[str, Any]) -> bool:
    """Whether a saved adapter is of a type that was registered here, and if so, whole.

    ValueError if it is not whole; False if ``source`` cannot be read here at all, which the
    inherited method explains.
    """
    config_path = _find(source, CONFIG_NAME, place)
    if config_path is None:
        return False
    try:
        written = read_config(config_path)
    except ValueError:
        # Only the weights can say whose it is.
        weights_path = _find(source, SAFETENSORS_WEIGHTS_NAME, place)
        if weights_path is not None and is_signed(weights_path):
            raise
        return False
    own = {peft_type.value for peft_type in OWN_TYPES}
    weights_path = None
    if written.get("peft_type") in own or Path(str(source)).is_dir():
        weights_path = _find(source, SAFETENSORS_WEIGHTS_NAME, place)
    if weights_path is None:
        return written.get("peft_type") in own
    if written.get("peft_type") in own or _is_signed(weights_path):
        check_adapter(config_path, weights_path)
    return written.get("peft_type") in own


def _is_signed(weights_path: Path) -> bool:
    try:
        return is_signed(weights_path)
    except ValueError:
        return False  # an adapter of another type


def _find(source: object, name: str, place: dict[str, Any]) -> Path | None:
    """A file of a saved adapter, in a directory or downloaded from the Hub; None: not there."""
    if source is None:
        return None
    subfolder = place.get("subfolder")
    local = Path(str(source), subfolder or "", name)
    if local.parent.is_dir():
        return local if local.is_file() else None
    known = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
    options = {key: place[key] for key in known if key in place}
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **options))
    except (OSError, ValueError):  # missing or unreachable
        return None
