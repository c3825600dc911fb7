"""`lrqat env`: versions and devices, to paste into a bug report."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peft_lrqat import __version__

from .options import JsonOptions
from .parser import Parser


# The packages that results depend on; the last three are optional.
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "triton",
    "compressed-tensors",
    "gguf",
)


@dataclass(kw_only=True)
class EnvArguments(JsonOptions):
    """How the environment is printed."""


def environment() -> dict[str, str]:
    """Versions and devices by name; "not installed" for a package that is missing."""
    return {
        "peft-lrqat": __version__,
        **{name: _version_of(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "devices": ", ".join(_devices()) or "none but the CPU",
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    """Name and memory of every accelerator."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'})"
        )
    if torch.backends.mps.is_available():
        found.append("Apple GPU (mps)")
    found += [torch.xpu.get_device_name(index) for index in range(torch.xpu.device_count())]
    return found


def run_env(argv: Sequence[str]) -> int:
    """`lrqat env`."""
    parser = Parser(
        "env",
        "[options]",
        [EnvArguments],
        "Prints the versions and devices that results depend on, to paste into a bug report.",
        "  lrqat env\n  lrqat env --json",
    )
    (args,) = parser.parse(argv)
    found = environment()
    if args.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"- {name}: {value}")
    return 0
