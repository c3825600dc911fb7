"""Blocks of ggml hold exactly their integers and scales, by the decoder of the gguf package."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lrqat.formats.ggml import BLOCK_BYTES, BLOCK_SIZES, block_type, encode
from peft_lrqat.quant.grid import Grid


gguf = pytest.importorskip("gguf")

RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127), "TQ2_0": (-2, 1)}


@pytest.mark.parametrize("kind", RANGES)
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 3),
    blocks=st.integers(1, 3),
    per_channel=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_blocks_decode_to_scale_times_integer(kind, rows, blocks, per_channel, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = RANGES[kind]
    columns = blocks * BLOCK_SIZES[kind]
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int16)
    scale = (torch.rand(rows, 1 if per_channel else blocks, generator=generator) + 0.01).half()
    data = encode(kind, codes, scale)
    assert data.shape == (rows, blocks * BLOCK_BYTES[kind])
    decoded = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(
        decoded, codes * scale.float().repeat_interleave(columns // scale.shape[1], dim=1)
    )


def test_both_ends_of_every_grid_fit_its_blocks():
    for bits in range(2, 9):
        for symmetric in (True, False):
            grid = Grid(bits=bits, symmetric=symmetric, group_size=32)
            if bits == 8 and not symmetric:
                continue
            kind = block_type(grid, 64)
            ends = (grid.qmin, grid.qmax) if symmetric else (-grid.qmax, grid.qmax)
            assert RANGES[kind][0] <= ends[0]
            assert ends[1] <= RANGES[kind][1]


def test_two_bits_take_the_smallest_blocks_that_fit():
    assert block_type(Grid(bits=2), 512) == "TQ2_0"
    assert block_type(Grid(bits=2, group_size=256), 512) == "TQ2_0"
    assert block_type(Grid(bits=2, group_size=128), 512) == "Q4_0"
    assert block_type(Grid(bits=2), 64) == "Q4_0"
    assert block_type(Grid(bits=2, symmetric=False), 512) == "Q4_0"
    assert block_type(Grid(bits=4, symmetric=False), 512) == "Q5_0"
