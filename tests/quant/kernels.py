"""The Triton kernels against the formula, on a GPU or, with TRITON_INTERPRET=1, on the CPU.

    TRITON_INTERPRET=1 python -m pytest tests/quant/kernels.py
    python -m pytest -n 8 tests/quant/kernels.py    # on a machine with a GPU; -n: compiles in turn

Not collected by its name: `test_triton_kernels.py` runs this file in a process of its own, because
Triton decides when it is imported whether it interprets.
"""

from itertools import product

import numpy as np
import pytest
import torch
import triton.language as tl
from formula import make, offset, plain
from torch.nn.functional import linear

from peft_lrqat.quant import (
    DOWNCASTS,
    HeldWeight,
    fake_quant_linear,
    gpu_gradients,
    inspect_rows,
    low_rank,
    quantized_codes,
    quantized_weight,
    triton_ops,
)


DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
KINDS = ["symmetric", "asymmetric", "balanced"]
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False, "balanced"], ids=KINDS)
GROUP_SIZES = [-1, 8, 24]
GROUPS = pytest.mark.parametrize("group_size", GROUP_SIZES, ids=["per-row", "g8", "g24"])


def each_with_a_group(**axes):
    """All combinations, with the group sizes in turn: each with every pair of other values."""
    combinations = [
        (*(value for _, value in picks), GROUP_SIZES[sum(number for number, _ in picks) % 3])
        for picks in product(*map(enumerate, axes.values()))
    ]
    return pytest.mark.parametrize((*axes, "group_size"), combinations, ids=str)


# Shapes that no tile divides.
OUT, IN = 67, 72


@pytest.fixture(scope="session", autouse=True)
def device():
    """Tensors are made there. GPUs round to bfloat16; the interpreter would cut bits off."""
    torch.set_default_device(DEVICE)
    if not triton_ops.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        values = torch.from_numpy(np.array(values, dtype=np.float32))
        return values.bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded
    yield
    interpreter._convert_float = convert


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def without_kernels(monkeypatch):
    """A function that gives what PyTorch's own operators compute."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(triton_ops, "serves_device", lambda device: False)
            return function(*arguments)

    return run


def weight(bits=4, symmetric=True, group_size=-1, downcast="fixed8", dtype=torch.float32, **more):
    """A weight deployed in ``dtype``. Z is exact in float32, whatever the order of its sum."""
    shape = {"out": OUT, "in_": IN}
    w = make(bits, symmetric, group_size, downcast, torch.float32, **{**shape, **more})
    with torch.no_grad():
        for factor in (w.A, w.B):
            factor.copy_((factor * 64).round() / 64)
    object.__setattr__(w, "gamma", 0.75)
    object.__setattr__(w, "dtype", dtype)
    return w


# The integers


@each_with_a_group(downcast=DOWNCASTS, bits=range(2, 9), symmetric=[True, False, "balanced"])
def test_integers_are_those_of_float64_but_near_a_tie(downcast, bits, symmetric, group_size):
    """Within `low_rank`'s bound of the middle between two integers, and nowhere else."""
    w = make(bits, symmetric, group_size, downcast, torch.float32, spread=0.5, out=OUT, in_=IN)
    grid, rank = w.format.grid, len(w.A)
    phi, A, B = w.format.decode(w.phi).double(), w.A.detach().double(), w.B.detach().double()
    z = phi + w.gamma * (B @ A)
    bound = (rank + 4) * 2.0**-24 * (phi.abs() + w.gamma * (B.abs() @ A.abs()))
    codes = quantized_codes(w).double()
    differ = codes != z.round().clamp(grid.qmin, grid.qmax)
    to_tie = (z - z.floor() - 0.5).abs()
    assert (to_tie <= bound)[differ].all()
    assert codes.unique().numel() > 2


@SYMMETRIES
@pytest.mark.parametrize("rank", [1, 3, 16, 40])
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_integers_are_the_cpus_where_sums_are_exact(downcast, rank, symmetric, without_kernels):
    """Factors of small integers: no order of the sum rounds anything, and ties are many."""
    w = weight(4, symmetric, 8, downcast)
    A, B = torch.randint(-2, 3, (rank, IN)).float(), torch.randint(-2, 3, (OUT, rank)).float()
    for name, value in {"A": A, "B": B, "gamma": 0.25}.items():
        object.__setattr__(w, name, value)
    assert torch.equal(quantized_codes(w), without_kernels(quantized_codes, w))
    rows = torch.tensor([3, 0, 66, 3])
    for ours, eager in zip(inspect_rows(w, rows), without_kernels(inspect_rows, w, rows)):
        assert torch.equal(ours, eager)


@SYMMETRIES
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_any_tile_gives_the_same_integers(downcast, symmetric, monkeypatch):
    """Whole, by some rows, by some columns, and in tiles of another shape."""
    w = weight(3, symmetric, 8, downcast)
    whole = low_rank.dense(w, torch.float32)
    assert torch.equal(low_rank.dense(w, torch.float32, slice(13, 47)), whole[13:47])
    assert torch.equal(low_rank.dense(w, torch.float32, columns=slice(16, 48)), whole[:, 16:48])
    integers = low_rank.rounded(w, slice(5, 66), slice(8, 71))
    qmin, qmax = w.format.grid.qmin, w.format.grid.qmax
    codes = quantized_codes(w)[5:66, 8:71].float()
    assert torch.equal(integers.clamp(qmin, qmax), codes)
    assert qmin - 1 <= integers.min() < qmin
    assert qmax < integers.max() <= qmax + 1
    monkeypatch.setattr(triton_ops, "TILE_COLUMNS", 16)
    monkeypatch.setattr(triton_ops, "TILE_ELEMENTS", 256)
    assert torch.equal(low_rank.dense(w, torch.float32), whole)


@pytest.mark.parametrize("factors", DTYPES, ids=str)
def test_factors_of_every_dtype(factors, without_kernels):
    w = weight(4, True, -1, "fixed8", dtype=torch.bfloat16)
    for name in ("A", "B", "scale"):
        object.__setattr__(w, name, getattr(w, name).detach().to(factors))
    differ = quantized_codes(w) != without_kernels(quantized_codes, w)
    assert differ.float().mean() < 1e-3


# W_hat


@each_with_a_group(
    dtype=DTYPES,
    scale_dtype=["float32", "bfloat16", "float16"],
    symmetric=[True, False, "balanced"],
)
def test_weight_is_step_times_integer(dtype, scale_dtype, symmetric, group_size):
    w = weight(3, symmetric, group_size, "int", dtype, scale_dtype=scale_dtype)
    grid = w.format.grid
    with torch.no_grad():
        w.scale[:6, 0] = torch.tensor([0.0, -1.0, 1e-40, 3e38, 70000.0, float("nan")])
    expected = grid.expand(w.step().detach(), IN) * (quantized_codes(w).float() - offset(w))
    found = quantized_weight(w)
    # Half of the least step is a subnormal number, which some processors take for 0.
    tiny = torch.finfo(torch.float32).tiny
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=tiny, equal_nan=True)
    for handed_over in DTYPES:
        again = low_rank.dense(w, handed_over)
        torch.testing.assert_close(again, found.to(handed_over), rtol=0, atol=tiny, equal_nan=True)


def test_a_nan_stays_one(without_kernels):
    w = weight()
    with torch.no_grad():
        w.A[0, 5] = float("nan")
    assert quantized_weight(w)[:, 5].isnan().all()
    assert torch.equal(quantized_weight(w).isnan(), without_kernels(quantized_weight, w).isnan())


@GROUPS
@SYMMETRIES
def test_clipped_weights_are_counted_and_listed(symmetric, group_size):
    w = weight(2, symmetric, group_size, spread=1.0)
    outside = inspect_rows(w, torch.arange(OUT))[1]
    count = torch.zeros(1, dtype=torch.int32)
    for rows in (slice(0, 32), slice(32, OUT)):
        low_rank.dense(w, torch.float32, rows, count=count)
    assert 0 < int(count) == int(outside.sum()) < outside.numel()
    places, filled = torch.full((int(count),), -1), torch.zeros(1, dtype=torch.int32)
    for columns in (slice(0, 24), slice(24, IN)):
        low_rank.dense(w, torch.float32, columns=columns, count=filled, places=places)
    assert torch.equal(places.sort().values, outside.flatten().nonzero().squeeze(1))


def test_more_clipped_weights_than_places_are_not_written():
    w = weight(2, spread=3.0)
    places, count = torch.full((8,), -1), torch.zeros(1, dtype=torch.int32)
    low_rank.dense(w, torch.float32, count=count, places=places[:5])
    assert (places[:5] >= 0).all()
    assert (places[5:] == -1).all()


# Gradients


def gradients(x, w, bias, upstream, layer):
    y = layer(x, w, bias)
    inputs = [t for t in (x, w.A, w.B, w.scale, bias) if t is not None and t.requires_grad]
    return torch.autograd.grad(y, inputs, upstream.to(y.dtype))


WAYS = {
    "none clipped": {"spread": 0.02, "bits": 4},
    "few clipped": {"spread": 0.4, "bits": 4},
    "many clipped": {"spread": 3.0, "bits": 3},
    "pass-through": {"spread": 3.0, "bits": 3, "pass_through": True},
}


@pytest.fixture
def ways(monkeypatch):
    """A list of the ways that gradients took; one weight in twenty may be clipped by rank."""
    taken = []
    monkeypatch.setattr(gpu_gradients, "MAX_SHARE", 0.05)
    for name in ("_by_rank", "_by_weight", "_leave_out_clipped"):
        way = getattr(gpu_gradients, name)

        def record(*arguments, way=way, name=name):
            taken.append(name)
            return way(*arguments)

        monkeypatch.setattr(gpu_gradients, name, record)
    return taken


def expected_ways(way, group_size):
    if group_size != -1 or way == "many clipped":
        return ["_by_weight"]
    return ["_by_rank", "_leave_out_clipped"] if way == "few clipped" else ["_by_rank"]


@each_with_a_group(way=WAYS, biased=[True, False], symmetric=[True, False, "balanced"])
def test_gradients_are_those_of_the_formula(way, biased, symmetric, group_size, ways):
    w = weight(symmetric=symmetric, group_size=group_size, **WAYS[way])
    x, upstream = torch.randn(2, 19, IN, requires_grad=True), torch.randn(2, 19, OUT)
    bias = torch.randn(OUT, requires_grad=True) if biased else None
    ours = gradients(x, w, bias, upstream, fake_quant_linear)
    assert ways == expected_ways(way, group_size)
    for found, exact in zip(ours, gradients(x, w, bias, upstream, plain)):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=2e-5 * float(exact.abs().max()))
    again = gradients(x, w, bias, upstream, fake_quant_linear)
    assert all(map(torch.equal, ours, again))


@GROUPS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_in_half_precision(dtype, way, group_size, ways):
    w = weight(group_size=group_size, dtype=dtype, **WAYS[way])
    x = torch.randn(38, IN, dtype=dtype, requires_grad=True)
    upstream = torch.randn(38, OUT).to(dtype)
    y = fake_quant_linear(x, w)
    assert torch.equal(y, linear(x, quantized_weight(w)))
    ours = gradients(x, w, None, upstream, fake_quant_linear)
    assert ways[: len(expected_ways(way, group_size))] == expected_ways(way, group_size)
    assert [g.dtype for g in ours] == [dtype, *[torch.float32] * 3]
    wide = x.detach().float().requires_grad_()
    # Products by weight are of bfloat16 numbers, for float16 too: steps could underflow there.
    for found, exact in zip(ours, gradients(wide, w, None, upstream.float(), plain)):
        error = (found.float() - exact).norm() / exact.norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps


def test_small_steps_do_not_underflow_in_float16(ways):
    w = weight(group_size=8, dtype=torch.float16, spread=0.4, scale_dtype="float32")
    with torch.no_grad():
        w.scale.fill_(1e-6)
    x, upstream = torch.randn(38, IN).half(), torch.randn(38, OUT).half() * 1e-2
    _, grad_B, _ = gradients(x, w, None, upstream, fake_quant_linear)
    _, exact, _ = gradients(x.float(), w, None, upstream.float(), plain)
    assert (grad_B - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@pytest.mark.parametrize("trained", ["x", "A", "B", "scale"])
def test_only_what_is_asked_for_gets_a_gradient(trained, group_size):
    w = weight(2, group_size=group_size)
    tensors = {"x": torch.randn(4, IN), "A": w.A, "B": w.B, "scale": w.scale}
    exact = torch.autograd.grad(plain(tensors["x"].requires_grad_(), w).sum(), tensors[trained])[0]
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    fake_quant_linear(tensors["x"], w).sum().backward()
    torch.testing.assert_close(tensors[trained].grad, exact, rtol=1e-4, atol=1e-4)
    assert all(t.grad is None for name, t in tensors.items() if name != trained)


@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
def test_chunks_change_nothing(group_size, ways, monkeypatch):
    """Chunks of 24 columns and of rows, as layers too large for one would get."""
    w = weight(group_size=group_size, **WAYS["few clipped"])
    x, upstream = torch.randn(7, IN, requires_grad=True), torch.randn(7, OUT)
    whole = gradients(x, w, None, upstream, fake_quant_linear)
    for name in ("CHUNK_BYTES", "DEVICE_CHUNK_BYTES"):
        monkeypatch.setattr(f"peft_lrqat.quant.blocks.{name}", 24 * OUT * 4)
    assert len(gpu_gradients._columns(w, x)) == 3
    torch.testing.assert_close(fake_quant_linear(x, w), plain(x, w), rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(x, w, None, upstream, fake_quant_linear), whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_rows_that_leave_nothing_in_the_result_get_their_scales_gradient(biased):
    w = weight(4, spread=0.02)
    with torch.no_grad():
        w.scale[2], w.scale[5], w.scale[66] = 0.0, -0.3, 1e-38
    x, upstream = torch.randn(41, IN), torch.randn(41, OUT)
    bias = torch.full((OUT,), 3.0) if biased else None
    if biased:
        with torch.no_grad():
            w.scale[7] = 1e-5
    *_, found = gradients(x, w, bias, upstream, fake_quant_linear)
    *_, exact = gradients(x, w, None, upstream, plain)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3 * float(exact.abs().max()))


def test_many_tokens_are_summed_in_parts():
    w = weight(4, spread=0.02, out=5, in_=16)
    x, upstream = torch.randn(300, 16), torch.randn(300, 5)
    for found, exact in zip(
        gradients(x, w, None, upstream, fake_quant_linear), gradients(x, w, None, upstream, plain)
    ):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_gradients_of_sums_are_views_without_strides():
    """`y.sum().backward()` hands on a gradient of one element, expanded."""
    w = weight(**WAYS["few clipped"])
    x = torch.randn(7, IN)
    found = torch.autograd.grad(fake_quant_linear(x, w).sum(), (w.A, w.B, w.scale))
    exact = torch.autograd.grad(plain(x, w).sum(), (w.A, w.B, w.scale))
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_wider_factors_take_pytorchs_own_operators():
    w = make(4, True, -1, "fixed8", dtype=torch.float64)
    assert not low_rank.served(w)
    x = torch.randn(3, w.shape[1], dtype=torch.float64)
    torch.testing.assert_close(fake_quant_linear(x, w), plain(x, w), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 5, 70])
def test_sparse_products_of_long_and_short_segments(n):
    """One key with most of the entries, and many with one."""
    keys = torch.cat([torch.full((n - n // 3,), 4), torch.arange(5, 5 + n // 3)])
    others, values, factor = torch.randint(0, 30, (n,)), torch.randn(n), torch.randn(30, 70)
    total = torch.randn(200, 70)
    expected = total.index_add(0, keys, values[:, None] * factor[others])
    triton_ops.add_sparse_product(total, (keys * 30 + others).sort().values, None, values, factor)
    order = torch.argsort(keys * 30 + others, stable=True)
    again = total.new_zeros(70, 200)
    places = (keys * 30 + others)[order]
    triton_ops.add_sparse_product(again.T, places, order, values, factor)
    exact = torch.zeros(200, 70).index_add(0, keys, values[:, None] * factor[others])
    torch.testing.assert_close(again.T, exact, rtol=1e-5, atol=1e-5)
    if torch.equal(order, torch.arange(n)):
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


# Held weights


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each takes a share of the tensors; the interpreter runs them one after another."""
    monkeypatch.setattr(triton_ops, "RENEW_PROGRAMS", 4)


def test_held_weights_are_left_alone_until_something_changes():
    w = weight(dtype=torch.bfloat16)
    held = HeldWeight.make(w, 1)
    fresh = held.weight.clone()
    held.weight.fill_(7)  # shows whether it is made again
    assert torch.equal(held.current(w, 1), torch.full_like(fresh, 7))
    for name in ("A", "B", "scale"):
        tensor = getattr(w, name)
        tensor.data[-1, -1] *= 3
        assert torch.equal(held.current(w, 1), quantized_weight(w))
        held.weight.fill_(7)
        assert torch.equal(held.current(w, 1), torch.full_like(fresh, 7))
        held.weight.copy_(quantized_weight(w))


def test_a_nan_is_no_reason_to_make_a_held_weight_again():
    w = weight()
    w.A.data[0, 0] = float("nan")
    held = HeldWeight.make(w, 1)
    held.weight.fill_(7)
    assert (held.current(w, 1) == 7).all()


def test_held_weights_do_not_serve_another_base_or_gamma():
    w = weight()
    held = HeldWeight.make(w, 1)
    assert held.current(w, 2) is None
    object.__setattr__(w, "gamma", 0.5)
    assert held.current(w, 1) is None


def test_weights_held_in_inference_mode_can_be_renewed_outside():
    w = weight()
    with torch.inference_mode():
        held = HeldWeight.make(w, 1)
    w.A.data.mul_(2)
    with torch.no_grad():
        assert torch.equal(held.current(w, 1), quantized_weight(w))
