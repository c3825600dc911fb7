"""Memory of files that are mapped: given back as soon as a tensor in them has been read."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable

from torch import Tensor


DONT_NEED = 4  # MADV_DONTNEED of Linux


def release_pages(tensor: Tensor, files: Iterable[str]) -> None:
    """Gives back the memory of a tensor that lies in one of ``files``, mapped and never changed.

    The values stay: they are read from the file again if they are used. Changes nothing for any
    other tensor, and elsewhere than on Linux. Loaders keep their files mapped to the end, so
    that otherwise a whole checkpoint counts as resident.
    """
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = tensor.data_ptr()
    stop = start + tensor.nbytes
    # Whole pages inside of it: its neighbours may be in use.
    start += -start % mmap.PAGESIZE
    stop -= stop % mmap.PAGESIZE
    paths = {os.path.realpath(file) for file in files}
    if start < stop and tensor.is_contiguous() and _lies_in(paths, start, stop):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DONT_NEED)


def _lies_in(paths: set[str], start: int, stop: int) -> bool:
    """Whether one mapping of a file in ``paths`` holds these addresses."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, _, rest = line.partition(" ")
            first, last = (int(address, 16) for address in addresses.split("-"))
            if first <= start < last:
                return stop <= last and rest.split(maxsplit=4)[-1].strip() in paths
    return False
