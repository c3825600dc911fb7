"""Memory of this process by the kernel's own count (Linux), for the benchmarks."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


MB = 1 << 20


def resident(field: str = "VmRSS") -> int:
    """Bytes of the resident set; ``VmHWM``: its largest so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def reset_peak() -> None:
    """VmHWM counts from here."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_bytes(run: Callable[[], Any]) -> int:
    """The largest resident set while ``run`` runs."""
    reset_peak()
    run()
    return resident("VmHWM")


def in_own_process(script: str, *arguments: str, for_memory: bool = True) -> Any:
    """What ``script`` prints last, read as JSON; ``for_memory``: with an allocator that gives back
    at once, which takes time.
    """
    env = dict(os.environ)
    if for_memory:
        # glibc keeps freed blocks below its mmap threshold in the heap, which would count as ours.
        env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", script, *arguments]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
