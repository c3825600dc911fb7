"""Another adapter in the place of a loaded one, under its name: PEFT's hot-swapping."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from .transaction import unchanged_on_failure
from .words import some


# They change what a layer computes, and are no part of what is swapped.
SAME = ("activation_grid", "kv_cache_grid", "trainable_token_indices", "use_dora")


def hotswap_adapter(
    model: Any,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Puts a saved adapter in the place of a loaded one of the same type, under its name.

    The same as `peft.utils.hotswap.hotswap_adapter`, which calls this for adapters of this package.
    Tensors are written into those that are there, where they have the same shape. So a compiled
    model is not compiled again for LRQAT adapters of one rank and ``lora_alpha``. The new adapter
    is loaded and checked before the old one is touched: a swap that fails changes nothing.

    While it lasts, no other thread may run the adapter, and memory holds both.

    Args:
        model: a `PeftModel`, compiled or not.
        model_name_or_path: the saved adapter, a directory or a repository of the Hub.
        adapter_name: which loaded adapter it replaces.
        torch_device: where it is loaded to; default: as `PeftModel.load_adapter` does.
        **kwargs: go to `PeftModel.load_adapter`, such as ``subfolder`` and ``revision``.

    Raises:
        ValueError: the model has no such adapter, it is merged, or the two do not fit each other.
    """
    known: dict[str, PeftConfig] = model.peft_config
    if adapter_name not in known:
        raise ValueError(
            f"there is no adapter `{adapter_name}` to swap; loaded are {some(known)}. Use "
            "load_adapter() to add one"
        )
    if any(adapter_name in getattr(m, "merged_adapters", ()) for m in model.modules()):
        raise ValueError(f"the adapter `{adapter_name}` is merged; call unmerge_adapter() first")
    fresh = f"{adapter_name}_swapped"
    while fresh in known:
        fresh += "_"
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with unchanged_on_failure(model, adapter_name):
        _check_type(known[adapter_name], model_name_or_path, kwargs)
        model.load_adapter(model_name_or_path, fresh, torch_device=torch_device, **kwargs)
        try:
            _check(known[adapter_name], known[fresh])
            _take_over(model, adapter_name, fresh)
            config = known[fresh]
            config.inference_mode = known[adapter_name].inference_mode
        finally:
            model.delete_adapter(fresh)
        known[adapter_name] = config
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


def _check_type(old: PeftConfig, source: str, options: dict[str, Any]) -> None:
    known = ("subfolder", "revision", "cache_dir", "token")
    place = {key: options[key] for key in known if key in options}
    name = PeftConfig._get_peft_type(source, **place)
    if name != old.peft_type:
        raise ValueError(
            f"the loaded adapter is of type {old.peft_type.value} and the saved one of type "
            f"{name}; delete the one and load the other"
        )


def _check(old: PeftConfig, new: PeftConfig) -> None:
    for name in SAME:
        mine, other = getattr(old, name, None), getattr(new, name, None)
        if mine != other:
            raise ValueError(
                f"the adapters differ in `{name}` ({mine} and {other}), which cannot be swapped; "
                "delete the one and load the other"
            )


def _take_over(model: nn.Module, adapter_name: str, fresh: str) -> None:
    having: dict[str, set[str]] = {adapter_name: set(), fresh: set()}
    parts: list[nn.Module] = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            present = module._adapters
        elif hasattr(module, "take_over"):
            present = module._get_available_adapters()
        else:
            continue
        for adapter, names in having.items():
            if adapter in present:
                names.add(name)
        if fresh in present:
            parts.append(module)
    if differing := having[adapter_name] ^ having[fresh]:
        raise ValueError(
            f"the adapters have different layers: only one of them has {some(differing)}; delete "
            "the one and load the other"
        )
    for module in parts:
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save
            trained[adapter_name].load_state_dict(trained[fresh].state_dict())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            deltas = module.token_adapter.trainable_tokens_delta
            with torch.no_grad():
                deltas[adapter_name].copy_(deltas[fresh])
        else:
            module.take_over(adapter_name, fresh)  # type: ignore[operator]


@torch.no_grad()
def write_into(parameters: nn.ParameterDict, name: str, value: Tensor) -> None:
    """Gives a parameter new values, and new shape and dtype where it must."""
    old = parameters[name]
    if (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
        old.copy_(value)
    else:
        requires_grad = old.requires_grad
        parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=requires_grad)
