"""Packing there and back is the identity, and the bytes are where the layout says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_lrqat.quant import pack, packed_bytes, unpack
from peft_lrqat.quant.packing import unpack_small


def by_hand(row: list[int], bits: int) -> bytes:
    """The layout's definition: one little-endian integer; value i starts at bit i * bits."""
    number = sum(value << (i * bits) for i, value in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(1, 4), n=st.integers(1, 40))
def test_bytes_equal_the_definition_and_come_back(data, bits, rows, n):
    values = data.draw(
        st.lists(
            st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n),
            min_size=rows,
            max_size=rows,
        )
    )
    packed = pack(torch.tensor(values), bits)
    assert packed.shape == (rows, packed_bytes(n, bits))
    assert [bytes(row.tolist()) for row in packed] == [by_hand(row, bits) for row in values]
    assert torch.equal(unpack(packed, bits, n), torch.tensor(values, dtype=torch.uint8))
    assert torch.equal(unpack_small(packed, bits, n), torch.tensor(values).float())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", ["lowest", "highest"])
def test_extreme_codes(bits, value):
    values = torch.full((3, 17), 0 if value == "lowest" else 2**bits - 1)
    assert torch.equal(unpack(pack(values, bits), bits, 17).long(), values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_outside_the_width_are_refused(bits):
    for bad in (-1, 2**bits):
        with pytest.raises(ValueError, match=f"0..{2**bits - 1}"):
            pack(torch.tensor([[0, bad]]), bits)


def test_data_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="take 4 bytes a row, but the data has 5"):
        unpack(torch.zeros(2, 5, dtype=torch.uint8), 3, 10)


def test_unpacked_bytes_do_not_share_memory_with_the_packed_ones():
    packed = torch.zeros(1, 4, dtype=torch.uint8)
    unpack(packed, 8, 4).add_(1)
    assert not packed.any()
