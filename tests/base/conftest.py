"""Checkpoints in the layouts of others, packed by hand from their definitions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file


def words_of(values, bits, step=None):
    """Rows of integers as int32 words, value ``i`` at bit ``i * step``, one at a time."""
    step = bits if step is None else step
    rows = []
    for row in values.tolist():
        number = sum((value % 2**bits) << (i * step) for i, value in enumerate(row))
        length = -(-len(row) * step // 32)
        rows.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(length)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


class Gptq:
    """One module as AutoGPTQ stores it, and the weight that it computes."""

    def __init__(self, out, width, *, bits, group_size, version, symmetric, order=None):
        groups = 1 if group_size == -1 else width // group_size
        self.codes = torch.randint(2**bits, (width, out))
        self.zeros = torch.randint(1, 2**bits, (groups, out))
        if symmetric:
            self.zeros[:] = 2 ** (bits - 1)
        self.scales = (torch.rand(groups, out) * 0.02 + 0.001).half()
        self.g_idx = torch.arange(width) // (width // groups)
        if order is not None:
            self.g_idx = order(self.g_idx)
        stored = self.zeros - int(version == "gptq")
        self.tensors = {
            "qweight": words_of(self.codes.T, bits).T.contiguous(),
            "qzeros": words_of(stored, bits),
            "scales": self.scales,
            "g_idx": self.g_idx.int(),
        }

    @property
    def weight(self):
        """(out, in) float16, as its layers compute it."""
        centered = (self.codes - self.zeros[self.g_idx]).half()
        return (self.scales[self.g_idx] * centered).T


class Awq:
    """One module as AutoAWQ stores it for its gemm kernels, and the weight that it computes."""

    ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

    def __init__(self, out, width, *, group_size):
        groups = 1 if group_size == -1 else width // group_size
        self.codes = torch.randint(16, (width, out))
        self.zeros = torch.randint(16, (groups, out))
        self.scales = (torch.rand(groups, out) * 0.02 + 0.001).half()
        self.group_size = width // groups
        self.tensors = {
            "qweight": words_of(self._in_order(self.codes), 4),
            "qzeros": words_of(self._in_order(self.zeros), 4),
            "scales": self.scales,
        }

    def _in_order(self, values):
        return torch.stack(
            [values[:, first + i] for first in range(0, values.shape[1], 8) for i in self.ORDER],
            dim=1,
        )

    @property
    def weight(self):
        """(out, in) float16, as its layers compute it."""
        zeros = self.zeros.repeat_interleave(self.group_size, dim=0)
        scales = self.scales.repeat_interleave(self.group_size, dim=0)
        return ((self.codes - zeros).half() * scales).T


@pytest.fixture
def make_gptq():
    return Gptq


@pytest.fixture
def make_awq():
    return Awq


@pytest.fixture
def quantise_folder():
    """``quantise_folder(folder, settings, make)``: a plain checkpoint becomes a quantised one.

    ``make(name, weight)`` gives a module's tensors and weight, or None to leave it; returns the
    weights by module.
    """

    def quantise(folder, settings, make):
        file = folder / "model.safetensors"
        tensors, weights = {}, {}
        for key, tensor in load_file(file).items():
            name = key.removesuffix(".weight")
            made = make(name, tensor) if key.endswith("proj.weight") else None
            if made is None:
                tensors[key] = tensor
                continue
            weights[name] = made.weight
            tensors.update({f"{name}.{kind}": part for kind, part in made.tensors.items()})
        save_file(tensors, file, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings
        (folder / "config.json").write_text(json.dumps(config))
        return weights

    return quantise
