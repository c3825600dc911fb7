"""The Triton kernels: their laws in the interpreter, their code for two generations of GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[2]
triton = pytest.importorskip("triton", reason="Triton is for Linux")


def run(*command, **environment):
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    path = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


# Each share takes about half a minute.
SHARES = {
    "integers": "integers",
    "gradients": "gradient and not half",
    "the rest": "not integers and not (gradient and not half)",
}


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_laws_of_the_kernels_hold_in_the_interpreter(share):
    file = Path(__file__).with_name("kernels.py")
    # NumPy, in which the interpreter computes, warns of infinities that the tests ask for.
    options = ["--noconftest", "-p", "no:cacheprovider", "-x", "-o", "filterwarnings=ignore"]
    done = run("-m", "pytest", *options, "-k", share, str(file), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


SETTINGS = {
    "per row": {},
    "groups of int3": {
        "downcast": "int",
        "bits": 3,
        "symmetric": False,
        "group_size": 128,
        "dtype": torch.float16,
    },
}


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_kernels_compile_for_gpus_that_are_not_here(settings, benchmarks, tmp_path, monkeypatch):
    """A step and a token through a held weight, for compute capabilities 8.0 and 9.0."""
    import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = compiled.launches_of(**settings)
    assert {"weight_kernel", "renew_kernel"} <= {kernel.__name__ for kernel, *_ in launches}
    for launch in launches:
        for capability in (80, 90):
            found = compiled.compile_launch(launch, capability)
            # More registers than there are would be kept in memory, which shows as a stack; a
            # few bytes of it are the compiler's own.
            assert found["local"] == 0, (launch[0].__name__, capability, found)
            assert found["stack"] <= 16, (launch[0].__name__, capability, found)
            assert found["shared"] <= 48 * 1024, (launch[0].__name__, capability, found)


def test_few_launches_and_at_most_one_wait(benchmarks):
    """LoRA's layer in PEFT takes 17 launches; 512 clipped weights are taken out one by one."""
    import launches

    for clipped in (0, 512, 10**6):
        found = launches.count(clipped)
        lora = found.pop("LoRA (PEFT)")
        held = found.pop("LR-QAT, held weight, one token")
        assert lora == {"kernels": 17, "waits": 0}
        assert held["kernels"] <= 3
        assert held["waits"] == 0
        for name, count in found.items():
            limit = 23 if clipped == 512 else 15
            assert count["kernels"] <= limit, name
            assert count["waits"] == (0 if "groups" in name else 1), name
