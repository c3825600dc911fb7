"""Blocks of ggml hold exactly their integers and scales, by the decoder of the gguf package."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lrqat.formats.ggml import TYPES, block_type, encode
from peft_lrqat.formats.linear import QuantizedLinear
from peft_lrqat.quant.grid import Grid, k_group
from peft_lrqat.quant.k_scales import on_blocks


gguf = pytest.importorskip("gguf")

KINDS = {
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "balanced": {"balanced": True},
}
K_GROUPS = {
    name: group
    for kind in KINDS
    for bits in range(2, 7)
    for name in [f"{kind}-{bits}"]
    if (group := k_group(bits, kind == "symmetric")) is not None
}
GRIDS = {
    f"{name}-{bits}": Grid(bits=bits, **fields)
    for name, fields in KINDS.items()
    for bits in range(2, 9 if name == "symmetric" else 8)
}
PAIRS = [
    (kind, name)
    for kind, type in TYPES.items()
    for name, grid in GRIDS.items()
    if type.holds(grid, type.size)
]


def make_linear(grid, rows, columns, groups, generator):
    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    codes = integers(grid.qmin, grid.qmax, rows, columns)
    # Both ends are there.
    codes[0, 0], codes[-1, -1] = grid.qmin, grid.qmax
    scale = (torch.rand(rows, groups, generator=generator) + 0.01).bfloat16()
    zero = None if grid.symmetric else integers(grid.qmin, grid.qmax, rows, groups)
    if zero is not None:
        zero[0, 0], zero[-1, -1] = grid.qmax, grid.qmin
    return QuantizedLinear(
        name="layer",
        grid=grid,
        codes=codes.to(torch.int8 if grid.symmetric else torch.uint8),
        scale=scale,
        zero_point=None if zero is None else zero.to(torch.uint8),
        weight=torch.empty(rows, columns),
        is_conv1d=False,
    )


def values(linear):
    """The weight by its definition, in float64, which is exact."""
    zero = -linear.grid.shift
    if linear.zero_point is not None:
        zero = linear.zero_point.double().repeat_interleave(linear.group_size, dim=1)
    scale = linear.scale.double().repeat_interleave(linear.group_size, dim=1)
    return scale * (linear.codes.double() - zero)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.integers(2, 3),
    blocks=st.integers(1, 3),
    per_channel=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_blocks_decode_to_the_values_of_the_grid(kind, name, rows, blocks, per_channel, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = blocks * TYPES[kind].size
    linear = make_linear(GRIDS[name], rows, columns, 1 if per_channel else blocks, generator)
    data = encode(kind, linear)
    assert data.shape == (rows, blocks * TYPES[kind].bytes)
    decoded = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(decoded.double(), values(linear))


@pytest.mark.parametrize("name", K_GROUPS)
@settings(max_examples=8, deadline=None)
@given(times=st.integers(0, 2), seed=st.integers(0, 2**20))
def test_k_blocks_decode_to_the_values_of_the_grid(name, times, seed):
    group = min(K_GROUPS[name] * 2**times, 128)
    grid = replace(GRIDS[name], group_size=group, k_quant=True)
    generator = torch.Generator().manual_seed(seed)
    linear = make_linear(grid, 3, 512, 512 // group, generator)
    scale = 0.01 * linear.scale.float()
    linear = replace(linear, scale=on_blocks(scale, linear.zero_point, grid).half())
    kind = block_type(grid, 512)
    assert kind == {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q6_K", 6: "Q6_K"}[grid.bits] or (
        grid.kind != "symmetric" and kind == {3: "Q4_K", 5: "Q5_K"}[grid.bits]
    )
    data = encode(kind, linear)
    decoded = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(decoded.double(), values(linear))


def test_every_kind_of_block_is_tested():
    assert {kind for kind, _ in PAIRS} == set(TYPES)
    for kind, type in TYPES.items():
        assert (type.size, type.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def test_rows_change_places():
    linear = make_linear(GRIDS["asymmetric-2"], 4, 256, 1, torch.Generator().manual_seed(0))
    turned = encode("Q2_K", linear, lambda rows: rows.flip(0))
    assert (turned == encode("Q2_K", linear)[::-1]).all()


def test_scales_that_float16_does_not_hold_are_refused():
    linear = make_linear(GRIDS["balanced-2"], 2, 256, 1, torch.Generator().manual_seed(0))
    linear.scale.fill_(2.0**-24)  # held, but half of it is not
    with pytest.raises(ValueError, match="2 of 2 scales of `layer`"):
        encode("Q2_K", linear)


@pytest.mark.parametrize(
    ("fields", "width", "kind"),
    [
        ({"bits": 2}, 512, "TQ2_0"),
        ({"bits": 2, "group_size": 256}, 512, "TQ2_0"),
        ({"bits": 2, "group_size": 128}, 512, "Q4_0"),
        ({"bits": 2}, 64, "Q4_0"),
        ({"bits": 2, "symmetric": False}, 512, "Q2_K"),
        ({"bits": 2, "symmetric": False}, 576, "Q4_0"),
        ({"bits": 2, "balanced": True}, 512, "Q2_K"),
        ({"bits": 2, "balanced": True, "group_size": 64}, 512, "Q4_0"),
        ({"bits": 3}, 512, "Q3_K"),
        ({"bits": 3}, 576, "Q4_0"),
        ({"bits": 3, "symmetric": False}, 512, "Q4_0"),
        ({"bits": 4}, 512, "Q4_0"),
        ({"bits": 4, "symmetric": False}, 512, "Q4_K"),
        ({"bits": 4, "symmetric": False, "group_size": 32}, 512, "Q5_0"),
        ({"bits": 4, "balanced": True}, 512, "Q4_K"),
        ({"bits": 5, "symmetric": False}, 512, "Q5_K"),
        ({"bits": 6}, 512, "Q6_K"),
        ({"bits": 7, "symmetric": False}, 512, "Q8_0"),
    ],
    ids=str,
)
def test_a_grid_takes_the_smallest_blocks_that_hold_it(fields, width, kind):
    assert block_type(Grid(**fields), width) == kind


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("width", [32, 96, 256, 576])
def test_every_grid_has_blocks(name, width):
    assert TYPES[block_type(GRIDS[name], width)].holds(GRIDS[name], width)
