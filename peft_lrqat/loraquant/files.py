"""Reads saved adapters from a directory or the Hub, and writes them whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..shared.adapter_files import check_adapter, read_config
from ..shared.integrity import is_signed, sign_file
from ..shared.names import PREFIX
from ..shared.staging import whole_directory


Config = TypeVar("Config", bound=PeftConfig)


def save_tensors(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Writes the adapter's file; raises OSError and leaves nothing if that fails."""
    try:
        save_file(dict(tensors), directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:  # for example, if the disk is full
        raise OSError(
            f"{SAFETENSORS_WEIGHTS_NAME} could not be written ({error}); no part of it is left"
        ) from error


def write_adapter(
    target: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: PeftConfig
) -> None:
    """Writes an adapter's directory, with a card if the config writes one.

    Raises OSError and leaves nothing if that fails.
    """
    with whole_directory(target) as directory:
        save_tensors(tensors, directory)
        config.save_pretrained(str(directory))


def write_packed(
    target: str | os.PathLike[str],
    packed: Mapping[str, Mapping[str, Tensor]],
    rest: Mapping[str, Tensor],
    finished: Callable[[int], Config],
) -> Config:
    """Writes an adapter as `write_adapter` does, with ``packed`` tensors by module and kind.

    The tensors in ``rest`` are stored unchanged under their own names. ``finished`` receives the
    number of bytes of the file, without those of ``rest``, and returns the config to write.
    """
    tensors = {
        f"{PREFIX}{module}.loraquant_{kind}": tensor
        for module, kinds in packed.items()
        for kind, tensor in kinds.items()
    }
    with whole_directory(target) as directory:
        save_tensors({**tensors, **rest}, directory)
        # The digests count, too. Those of the config come later, but take the same room.
        sign_file(directory / SAFETENSORS_WEIGHTS_NAME, {}, {})
        size = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
        config = finished(
            size - sum(tensor.numel() * tensor.element_size() for tensor in rest.values())
        )
        config.save_pretrained(str(directory))
    return config


def from_model(model: PeftModel, adapter_name: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Returns the config and tensors of an adapter of a live model, named as in its files.

    Raises ValueError if the model has no such adapter.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"the model has no adapter `{adapter_name}`, but {sorted(model.peft_config)}; give "
            "`adapter_name`"
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    # Copies: safetensors refuses tied weights that share memory, and training may change them.
    return model.peft_config[adapter_name], {
        name: tensor.detach().cpu().clone() for name, tensor in state.items()
    }


def from_files(
    source: str,
    check: Callable[[dict[str, Any]], None],
    *,
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Returns the config and tensors of a saved adapter, from a directory or the Hub.

    Pickles are never read. ``check`` receives the content of the configuration's file before
    anything is built from it. Raises ValueError if the files are missing, damaged or refused.
    """
    locate = partial(_locate, revision=revision, subfolder=subfolder, token=token)
    config_path = locate(source, CONFIG_NAME)
    if config_path is None:
        raise ValueError(
            f"{source} has no {CONFIG_NAME}; give a directory or repository that holds a saved "
            "adapter"
        )
    written = read_config(config_path)
    check(written)
    try:
        config = PeftConfig.from_pretrained(str(config_path.parent))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{CONFIG_NAME} in {source} does not describe an adapter ({error})"
        ) from error
    path = locate(source, SAFETENSORS_WEIGHTS_NAME)
    if path is None:
        raise ValueError(
            f"{source} has no {SAFETENSORS_WEIGHTS_NAME}; weights in other formats can run code "
            "when they are read. Load the adapter with PEFT and save it with `save_pretrained`"
        )
    if config.peft_type != PeftType.LORA or is_signed(path):
        check_adapter(config_path, path)
    try:
        return config, load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{SAFETENSORS_WEIGHTS_NAME} in {source} is not whole ({error})"
        ) from error


def _locate(
    source: str, name: str, *, revision: str | None, subfolder: str | None, token: str | bool | None
) -> Path | None:
    """Returns the path of ``name`` in a directory or a downloaded repository; None if missing."""
    if Path(source).is_dir():
        path = Path(source, subfolder or "", name)
        return path if path.is_file() else None
    try:
        return Path(
            hf_hub_download(source, name, revision=revision, subfolder=subfolder, token=token)
        )
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise ValueError(
            f"{source} is not a directory, and not a repository that can be reached ({error})"
        ) from error
