"""The plug-in for vLLM: adapters of type LORAQUANT are served like LoRA.

vLLM calls `register` in each of its processes. Where one loads an adapter that is packed, its
directory is unpacked first, see `peft_lrqat.serving`. So packed adapters work wherever vLLM takes
the path of one: ``--lora-modules``, ``/v1/load_lora_adapter``, `LoRARequest`.

With ``PEFT_LRQAT_ADAPTERS``, a directory, requests may name adapters that lie in it, without any
registration before. This file lies outside `peft_lrqat` because importing that takes seconds, and a
server without packed adapters needs none of it.

    PEFT_LRQAT_ADAPTERS      a directory: the adapter NAME lies in DIRECTORY/NAME
    PEFT_LRQAT_HUB_REPOS     repositories of the Hub that may be asked for, separated by commas
    PEFT_LRQAT_UNPACKED      where unpacked adapters lie; default: in memory, /dev/shm
    PEFT_LRQAT_UNPACKED_GB   how large they may become, all together; default: 1
"""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any


CONFIG = "adapter_config.json"
FILES = [CONFIG, "adapter_model.safetensors"]
TYPES = ("LORA", "LORAQUANT")


def register() -> None:
    """The entry point ``vllm.general_plugins``."""
    unpack_before_loading()
    directory = os.environ.get("PEFT_LRQAT_ADAPTERS")
    repositories = [r for r in os.environ.get("PEFT_LRQAT_HUB_REPOS", "").split(",") if r]
    if directory is None and not repositories:
        return
    if directory is not None and not Path(directory).is_dir():
        raise ValueError(f"PEFT_LRQAT_ADAPTERS must be a directory, but is {directory!r}")
    from vllm.lora.resolver import LoRAResolverRegistry

    resolver = make_resolver(None if directory is None else Path(directory), repositories)
    LoRAResolverRegistry.register_resolver("peft_lrqat", resolver)


def unpack_before_loading() -> None:
    """Lets vLLM's workers load packed adapters. Calling it again changes nothing."""
    from vllm.lora import worker_manager

    inherited = worker_manager.get_adapter_absolute_path
    if getattr(inherited, "unpacks", False):
        return

    def get_adapter_absolute_path(lora_path: str) -> str:
        path: str = inherited(lora_path)
        return str(unpacked().path(path)) if type_of(Path(path)) == "LORAQUANT" else path

    get_adapter_absolute_path.unpacks = True  # type: ignore[attr-defined]
    worker_manager.get_adapter_absolute_path = get_adapter_absolute_path


@cache
def unpacked() -> Any:
    """The directory of unpacked adapters, as the environment describes it."""
    from peft_lrqat.serving import UnpackedAdapters

    gigabytes = float(os.environ.get("PEFT_LRQAT_UNPACKED_GB", "1"))
    return UnpackedAdapters(
        os.environ.get("PEFT_LRQAT_UNPACKED"), max_bytes=round(gigabytes * 2**30)
    )


def settings_of(directory: Path) -> dict[str, Any]:
    """What the configuration of an adapter says; empty if there is none to be read."""
    try:
        found = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def type_of(directory: Path) -> object:
    """The type of an adapter; None if there is none."""
    return settings_of(directory).get("peft_type")


def find(directory: Path | None, repositories: list[str], name: str) -> Path | None:
    """The directory of an adapter by its name; None if there is none, or it lies elsewhere."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts and Path(name).parts
    if directory is not None and inside and type_of(directory / name) in TYPES:
        return (directory / name).absolute()
    if name in repositories:
        from huggingface_hub import snapshot_download

        place = Path(snapshot_download(name, allow_patterns=FILES))
        return place if type_of(place) in TYPES else None
    return None


def fits(adapter: Path, base: str) -> bool:
    """Whether an adapter was trained on the model that is served, by the last part of its name."""
    trained = settings_of(adapter).get("base_model_name_or_path")
    return isinstance(trained, str) and Path(trained).name == Path(base).name


def make_resolver(directory: Path | None, repositories: list[str]) -> Any:
    """A `LoRAResolver` of vLLM that finds adapters by name."""
    from vllm.logger import init_logger
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    logger = init_logger(f"vllm.{__name__}")

    class PackedAdapters(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            adapter = await asyncio.to_thread(find, directory, repositories, lora_name)
            if adapter is None:
                return None
            if not fits(adapter, base_model_name):
                trained = settings_of(adapter).get("base_model_name_or_path")
                logger.warning(
                    "the adapter %s was trained on %s, but %s is served: not loaded",
                    lora_name,
                    trained,
                    base_model_name,
                )
                return None
            # The server counts anew; only the name must be its own.
            number = 1 + zlib.crc32(lora_name.encode())
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(adapter))

    return PackedAdapters()
