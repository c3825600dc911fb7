"""Damage by chance to files: what no reader may load with other values and no word."""

import os

import torch


# `make fuzz` tries many more.
CASES = int(os.environ.get("FUZZ_CASES", "60"))


def damaged(data, generator):
    """One to eight bytes flipped, cut or put in."""

    def random(most):
        return int(torch.randint(most, (), generator=generator))

    changed = bytearray(data)
    kind, count = random(3), 1 + random(8)
    for _ in range(count if kind == 0 else 1):
        place = random(len(changed))
        if kind == 0:
            changed[place] ^= 1 << random(8)
        elif kind == 1:
            del changed[place : place + count]
        else:
            changed[place:place] = bytes(random(256) for _ in range(count))
    return bytes(changed)
