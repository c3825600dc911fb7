"""The packed format: there and back, its sizes and bytes, and what is refused."""

import dataclasses

import pytest
import torch

from peft_lrqat.quant.factors.groups import GroupCodes
from peft_lrqat.quant.factors.storage import (
    PackedFormat,
    check_bits,
    check_packed,
    expand,
    pack_components,
)
from peft_lrqat.quant.packing import unpack


SHAPES = [(16, 24), (5, 13), (1, 9), (9, 1), (1, 1), (130, 257)]


def values(components, side):
    return torch.cat([pair[side].values() for pair in components])


def packed(
    make_components,
    bits,
    rows=16,
    columns=24,
    group_size=7,
    scale_dtype=torch.bfloat16,
    zero_points=False,
):
    recipe = {"group_size": group_size, "scale_dtype": scale_dtype, "zero_points": zero_points}
    components = make_components(bits, rows, columns, **recipe)
    return components, *pack_components(components, rows=rows, columns=columns, **recipe)


@pytest.mark.parametrize("zero_points", [False, True], ids=["mid-rise", "zero-points"])
@pytest.mark.parametrize("group_size", [1, 7, 8, 10**9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", ["1", "2", "4321", "3311", "87654321"])
def test_expanding_gives_the_very_values_that_were_packed(
    bits, shape, group_size, zero_points, make_components
):
    # The codes' own values() spreads a scale over a whole group, however long.
    group_size = min(group_size, 300)
    rows, columns = shape
    components, format, tensors = packed(
        make_components, bits, rows, columns, group_size, zero_points=zero_points
    )
    assert format.bits == bits
    B, A = expand(format, tensors, torch.float32)
    assert torch.equal(B.T, values(components, 0))
    assert torch.equal(A, values(components, 1))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(scale_dtype, dtype, make_components):
    components, format, tensors = packed(make_components, "4311", scale_dtype=scale_dtype)
    assert tensors["scales"].dtype == scale_dtype
    B, A = expand(format, tensors, dtype)
    assert torch.equal(B.T, values(components, 0).to(dtype))
    assert torch.equal(A, values(components, 1).to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_and_zero_scales(bits):
    codes = torch.tensor([[0, 2**bits - 1] * 4 + [2**bits - 1]], dtype=torch.uint8)
    scale = torch.tensor([[0.0, 2.0, 0.5]])
    vector = GroupCodes(
        codes=codes, scale=scale, zero_point=None, bits=torch.tensor([bits]), group_size=3
    )
    format, tensors = pack_components(
        [(vector, vector)],
        rows=9,
        columns=9,
        group_size=3,
        scale_dtype=torch.float32,
        zero_points=False,
    )
    B, A = expand(format, tensors, torch.float32)
    top = (2**bits - 1) / 2
    assert A.tolist() == [[0.0] * 3 + [2 * top, -2 * top, 2 * top] + [-top / 2, top / 2, top / 2]]
    assert torch.equal(B, A.T)


def test_no_components(make_components):
    _, format, tensors = packed(make_components, "")
    assert format.sizes == {"codes": 0, "scales": 0}
    B, A = expand(format, tensors, torch.float32)
    assert (B.shape, A.shape) == ((16, 0), (0, 24))
    assert torch.equal(B @ A, torch.zeros(16, 24))


def test_autocast_and_inference_mode_change_nothing(make_components):
    components, format, tensors = packed(make_components, "8531")
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        _, A = expand(format, tensors, torch.float32)
    assert torch.equal(A, values(components, 1))


def test_larger_components_come_first_and_empty_ones_are_left_out(make_components):
    components = make_components("13", 16, 24)
    empty = dataclasses.replace(components[0][0], bits=torch.tensor([0])), components[0][1][:1]
    empty = empty[0], dataclasses.replace(empty[1], bits=torch.tensor([0]))
    format, tensors = pack_components(
        [*components, empty],
        rows=16,
        columns=24,
        group_size=7,
        scale_dtype=torch.bfloat16,
        zero_points=False,
    )
    assert format.bits == "31"
    assert torch.equal(expand(format, tensors, torch.float32)[1], values(components[::-1], 1))


def test_pairs_may_hold_several_components(make_components):
    components = make_components("331", 16, 24)
    joined = [
        GroupCodes(
            codes=torch.cat([pair[side].codes for pair in components]),
            scale=torch.cat([pair[side].scale for pair in components]),
            zero_point=None,
            bits=torch.tensor([3, 3, 1]),
            group_size=7,
        )
        for side in (0, 1)
    ]
    recipe = {
        "rows": 16,
        "columns": 24,
        "group_size": 7,
        "scale_dtype": torch.bfloat16,
        "zero_points": False,
    }
    single, joint = (
        pack_components(components, **recipe)[1],
        pack_components([tuple(joined)], **recipe)[1],
    )
    assert all(torch.equal(single[kind], joint[kind]) for kind in single)


def test_the_layout_is_that_of_the_specification(make_components):
    """Checks two components of 3 bits and one of 1 bit on (5, 13), in groups of 4, byte by byte."""
    components, format, tensors = packed(make_components, "331", 5, 13, 4, zero_points=True)
    # codes: 2 of ceil(15/8) and 2 of ceil(39/8) bytes; 1 of ceil(5/8) and 1 of ceil(13/8). Groups:
    # 2 and 4.
    assert format.sizes == {
        "codes": 2 * 2 + 2 * 5 + 1 + 2,
        "scales": 3 * 2 + 3 * 4,
        "zero_points": 2 * 1 + 2 * 2,
    }
    codes, scales, zero_points = tensors["codes"], tensors["scales"], tensors["zero_points"]
    b, a = [pair[0] for pair in components], [pair[1] for pair in components]

    def stack(vectors, field):
        return torch.cat([getattr(vector, field) for vector in vectors])

    assert torch.equal(unpack(codes[:4].view(2, 2), 3, 5), stack(b[:2], "codes"))
    assert torch.equal(unpack(codes[4:14].view(2, 5), 3, 13), stack(a[:2], "codes"))
    assert torch.equal(unpack(codes[14:15].view(1, 1), 1, 5), b[2].codes)
    assert torch.equal(unpack(codes[15:].view(1, 2), 1, 13), a[2].codes)
    assert torch.equal(scales[:4].view(2, 2), stack(b[:2], "scale"))
    assert torch.equal(scales[4:12].view(2, 4), stack(a[:2], "scale"))
    assert torch.equal(
        torch.cat([scales[12:14], scales[14:]]), torch.cat([b[2].scale[0], a[2].scale[0]])
    )
    assert torch.equal(unpack(zero_points[:2].view(2, 1), 3, 2), stack(b[:2], "zero_point"))
    assert torch.equal(unpack(zero_points[2:].view(2, 2), 3, 4), stack(a[:2], "zero_point"))


def test_golden_bytes():
    """At 2 bits: B = (1.5, -0.5) is 3, 1 or 0b0111; A = (0.5, -1.5, 1.5) is 2, 0, 3 or 0b110010."""
    format = PackedFormat(
        bits="2", rows=2, columns=3, group_size=8, scale_dtype=torch.float16, zero_points=False
    )
    tensors = {
        "codes": torch.tensor([0b0111, 0b110010], dtype=torch.uint8),
        "scales": torch.tensor([1.0, 2.0], dtype=torch.float16),
    }
    check_packed(format, tensors)
    B, A = expand(format, tensors, torch.float32)
    assert B.tolist() == [[1.5], [-0.5]]
    assert A.tolist() == [[1.0, -3.0, 3.0]]


@pytest.mark.parametrize("bits", ["12", "9", "0", "4410", "a", "²", " 2", 44, None, ["4"]])
def test_bits_that_are_refused(bits):
    with pytest.raises(ValueError, match="digits from 1 to 8 that do not increase"):
        check_bits(bits)


def spoil(kind, index, value):
    def apply(tensors):
        tensors[kind] = tensors[kind].clone()
        tensors[kind][index] = value

    return apply


DAMAGE = {
    "codes missing": (lambda t: t.pop("codes"), "the codes are missing"),
    "scales missing": (lambda t: t.pop("scales"), "the scales are missing"),
    "zero points missing": (lambda t: t.pop("zero_points"), "the zero_points are missing"),
    "unknown": (lambda t: t.update(other=t["codes"]), "other are stored"),
    "truncated": (
        lambda t: t.update(codes=t["codes"][:-1]),
        r"the codes must be 17 of torch.uint8 .* but are \(16,\)",
    ),
    "too long": (
        lambda t: t.update(scales=t["scales"].repeat(2)),
        r"the scales must be 18 of .* but are \(36,\)",
    ),
    "two dimensions": (lambda t: t.update(codes=t["codes"][None]), r"but are \(1, 17\)"),
    "codes as floats": (
        lambda t: t.update(codes=t["codes"].float()),
        "but are .* of torch.float32",
    ),
    "other scales": (lambda t: t.update(scales=t["scales"].half()), "but are .* of torch.float16"),
    "nan": (spoil("scales", 3, torch.nan), "finite and not negative, but 1 of 18 are NaN"),
    "inf": (spoil("scales", 3, torch.inf), "1 of 18 are infinite"),
    "negative": (spoil("scales", slice(0, 2), -1.0), "2 of 18 are negative"),
    "padding of B": (spoil("codes", 1, 0x80), "codes of B at 3 bits"),
    "padding of A": (spoil("codes", 13, 0x80), "codes of A at 3 bits"),
    "padding at 1 bit": (spoil("codes", 16, 0x20), "codes of A at 1 bits"),
    "padding of zero points": (spoil("zero_points", 0, 0x40), "zero_points of B at 3 bits"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(damage, make_components):
    _, format, tensors = packed(make_components, "331", 5, 13, 4, zero_points=True)
    apply, message = DAMAGE[damage]
    apply(tensors)
    with pytest.raises(ValueError, match=message):
        check_packed(format, tensors)


def test_an_absurd_size_is_refused_before_anything_is_allocated(make_components):
    _, format, tensors = packed(make_components, "2")
    absurd = dataclasses.replace(format, rows=10**15)
    with pytest.raises(ValueError, match="the codes must be"):
        check_packed(absurd, tensors)


def test_components_that_do_not_fit_are_not_packed(make_components):
    recipe = {
        "rows": 16,
        "columns": 24,
        "group_size": 7,
        "scale_dtype": torch.bfloat16,
        "zero_points": False,
    }
    (pair,) = make_components("2", 16, 24)
    unequal = pair[0], dataclasses.replace(pair[1], bits=torch.tensor([3]))
    with pytest.raises(ValueError, match="equal bits"):
        pack_components([unequal], **recipe)
    for field, value in {
        "rows": 15,
        "group_size": 8,
        "scale_dtype": torch.float16,
        "zero_points": True,
    }.items():
        with pytest.raises(ValueError, match="a component of 2 bits must have"):
            pack_components([pair], **{**recipe, field: value})
    (pair,) = make_components("2", 16, 24, zero_points=True)
    single = tuple(dataclasses.replace(x, bits=torch.tensor([1])) for x in pair)
    with pytest.raises(ValueError, match="a component of 1 bits must have"):
        pack_components([single], **{**recipe, "zero_points": True})
