"""Downcast storage of phi: what comes back, and the bytes it takes."""

import pytest
import torch

from peft_lrqat.quant import DOWNCASTS, Grid, WeightFormat


def make(downcast, bits=4, symmetric=True, in_features=24, group_size=-1):
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size)
    return WeightFormat(
        grid=grid, downcast=downcast, scale_dtype="bfloat16", in_features=in_features
    )


def coordinates(fmt, rows=7):
    """Makes coordinates inside and outside the grid, with both of its ends."""
    grid = fmt.grid
    phi = torch.empty(rows, fmt.in_features).uniform_(grid.qmin - 2, grid.qmax + 2)
    phi[0, 0], phi[0, 1] = grid.qmin, grid.qmax
    return phi


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_decode_errs_by_at_most_half_a_unit_of_the_storage(downcast, bits, symmetric):
    fmt = make(downcast, bits, symmetric)
    phi = coordinates(fmt)
    stored = fmt.encode(phi)
    assert stored.dtype == fmt.storage_dtype
    assert stored.shape == (7, fmt.row_elements)
    restored = fmt.decode(stored)
    assert restored.dtype == torch.float32
    clipped = phi.clamp(fmt.grid.qmin, fmt.grid.qmax)
    if downcast == "int":
        assert torch.equal(restored, clipped.round())
    elif downcast == "fixed8":
        assert (restored - clipped).abs().max() <= 0.5 / 2 ** (8 - bits)
    else:
        assert torch.equal(restored, phi.to(fmt.storage_dtype).float())
    # What is stored is a fixed point of storing it again.
    assert torch.equal(fmt.encode(restored), stored)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_the_integers_of_what_is_stored_are_known_without_storing_it(downcast, bits, symmetric):
    fmt = make(downcast, bits, symmetric)
    phi, grid = coordinates(fmt, rows=100), fmt.grid
    units = fmt.as_stored(phi)
    assert units.data_ptr() != phi.data_ptr()
    found, expected = (u.round().clamp(grid.qmin, grid.qmax) for u in (units, phi))
    kept = fmt.decode(fmt.encode(phi)).round().clamp(grid.qmin, grid.qmax)
    assert torch.equal(found, kept)
    # The rounding of storage does change integers, where it is coarse.
    if downcast == "fixed8" and 4 <= bits < 8:
        assert not torch.equal(found, expected)


@pytest.mark.parametrize(
    ("bits", "in_features", "expected"), [(4, 24, 12), (3, 24, 9), (2, 24, 6), (3, 5, 2), (8, 5, 5)]
)
def test_int_takes_bits_over_eight_bytes_a_weight(bits, in_features, expected):
    assert make("int", bits, in_features=in_features).row_elements == expected


def test_fixed8_is_the_papers_q4_4():
    stored = make("fixed8").encode(
        torch.tensor([[-8.0, -0.0625, 0.03, 3.5, 7.0, 99.0] + [0.0] * 18])
    )
    assert stored[0, :6].tolist() == [-128, -1, 0, 56, 112, 112]


def test_a_value_beyond_float16_stays_finite():
    assert torch.isfinite(make("fp16").encode(torch.full((1, 24), 1e6))).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("downcast", "int4"), ("scale_dtype", "bf16"), ("in_features", 25)],
    ids=lambda v: str(v),
)
def test_bad_values_are_refused(field, value):
    fields = {
        "grid": Grid(bits=4, group_size=8),
        "downcast": "int",
        "scale_dtype": "bfloat16",
        "in_features": 24,
    }
    with pytest.raises(ValueError, match=str(value)):
        WeightFormat(**{**fields, field: value})


@pytest.mark.parametrize("columns", [(0, 8), (8, 16), (16, 21), (0, 21)], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_some_columns_decode_as_in_the_whole(downcast, bits, columns):
    fmt = make(downcast, bits, in_features=21)
    stored = fmt.encode(coordinates(fmt))
    assert torch.equal(fmt.decode(stored, slice(*columns)), fmt.decode(stored)[:, slice(*columns)])
