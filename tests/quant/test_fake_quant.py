"""The fake-quantised linear against autograd of the plain formula, and what it keeps for the backward pass."""

import pytest
import torch
from torch.nn.functional import linear

from peft_lrqat.quant import (
    DOWNCASTS,
    Grid,
    LowRankWeight,
    WeightFormat,
    blocks,
    effective_scale,
    estimate_range,
    fake_quant_linear,
    inspect_rows,
    quantized_codes,
    quantized_weight,
)


OUT, IN, RANK = 10, 24, 3


def make(
    bits, symmetric, group_size, downcast, dtype=torch.float64, spread=1.0, scale_dtype="bfloat16", out=OUT, in_=IN
):
    """A trained-looking weight: random factors that move about `spread` grid steps, scales off the first ones."""
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size)
    fmt = WeightFormat(grid=grid, downcast=downcast, scale_dtype=scale_dtype, in_features=in_)
    weight = torch.randn(out, in_)
    scale, zero_point = estimate_range(weight, grid, estimator="lp", scale_dtype=scale_dtype, p=4.0)
    phi = fmt.encode(weight / grid.expand(scale, in_) + grid.expand(zero_point.float(), in_))
    return LowRankWeight(
        format=fmt,
        phi=phi,
        zero_point=None if symmetric else zero_point,
        A=torch.randn(RANK, in_, dtype=dtype).requires_grad_(),
        B=(spread * torch.randn(out, RANK, dtype=dtype)).requires_grad_(),
        scale=(scale * (1 + 0.1 * torch.rand_like(scale))).to(dtype).requires_grad_(),
        gamma=0.7,
        dtype=dtype,
    )


def straight_through(rounded, smooth):
    return smooth + (rounded - smooth).detach()


def plain(x, w, bias=None):
    """METHODS: the formula as anyone would write it, left to autograd."""
    grid = w.format.grid
    z = w.format.decode(w.phi).to(w.A.dtype) + w.gamma * (w.B @ w.A)
    codes = straight_through(z.round(), z).clamp(grid.qmin, grid.qmax)
    if w.zero_point is not None:
        codes = codes - grid.expand(w.zero_point.to(z.dtype), z.shape[1])
    step = straight_through(effective_scale(w.scale, w.format.scale_dtype), w.scale)
    return linear(x, grid.expand(step, z.shape[1]) * codes, bias)


@pytest.mark.parametrize("spread", [0.0, 0.3, 30.0], ids=["untrained", "trained", "mostly clipped"])
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_value_and_gradients_equal_autograd_of_the_formula(downcast, bits, symmetric, group_size, spread):
    w = make(bits, symmetric, group_size, downcast, spread=spread)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    inputs = (x, w.A, w.B, w.scale, bias)
    ours, formula = fake_quant_linear(x, w, bias), plain(x, w, bias)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    for name, a, b in zip(
        ["x", "A", "B", "scale", "bias"], *(torch.autograd.grad(y, inputs, upstream) for y in (ours, formula))
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_the_cases_above_have_clipped_entries_and_entries_inside():
    for spread, least, most in ((0.0, 0.0, 0.2), (30.0, 0.5, 1.0)):
        w = make(3, True, -1, "fixed8", spread=spread)
        z = w.format.decode(w.phi) + w.gamma * (w.B @ w.A)
        share = ((z.round() < -4) | (z.round() > 3)).double().mean()
        assert least <= share <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_model_dtypes(dtype, symmetric):
    w = make(4, symmetric, 8, "int", dtype=torch.float32)
    object.__setattr__(w, "dtype", dtype)
    x = torch.randn(6, IN, dtype=dtype, requires_grad=True)
    y = fake_quant_linear(x, w)
    assert y.dtype == dtype
    assert torch.equal(y, linear(x, quantized_weight(w)))
    ours = torch.autograd.grad(y, (x, w.A, w.B, w.scale), torch.ones_like(y))
    formula = torch.autograd.grad(plain(x.float(), w), (x, w.A, w.B, w.scale), torch.ones(6, OUT))
    assert [g.dtype for g in ours] == [dtype, torch.float32, torch.float32, torch.float32]
    # The weight, x and G are rounded to the dtype; each sum is over at most 24 products.
    for a, b in zip(ours, formula):
        torch.testing.assert_close(
            a.float(), b.float(), rtol=24 * torch.finfo(dtype).eps, atol=24 * torch.finfo(dtype).eps * b.abs().max()
        )


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_weight_is_step_times_integer(scale_dtype):
    for symmetric in (True, False):
        w = make(3, symmetric, 8, "fixed8", dtype=torch.float32, scale_dtype=scale_dtype)
        grid, codes = w.format.grid, quantized_codes(w)
        assert codes.dtype == (torch.int8 if symmetric else torch.uint8)
        assert codes.min() >= grid.qmin
        assert codes.max() <= grid.qmax
        offset = 0 if symmetric else grid.expand(w.zero_point.float(), IN)
        step = w.scale.detach().to(getattr(torch, scale_dtype)).float()
        assert torch.equal(quantized_weight(w), grid.expand(step, IN) * (codes.float() - offset))


@pytest.mark.parametrize("rows", [[0], [OUT - 1], [7, 2, 2], list(range(OUT))], ids=str)
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_some_rows_are_those_of_all_integers(downcast, symmetric, group_size, rows):
    w, rows = make(3, symmetric, group_size, downcast, dtype=torch.float32), torch.tensor(rows, dtype=torch.long)
    codes, clipped = inspect_rows(w, rows)
    whole = quantized_codes(w)
    assert codes.dtype == whole.dtype
    assert torch.equal(codes, whole[rows])
    rounded = (w.format.decode(w.phi).float() + w.gamma * (w.B @ w.A)).detach().round()[rows]
    assert torch.equal(clipped, (rounded < w.format.grid.qmin) | (rounded > w.format.grid.qmax))
    assert clipped.any() or len(rows) < OUT


@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_blocks_of_rows_change_nothing(downcast, monkeypatch):
    w = make(3, False, 8, downcast, dtype=torch.float32)
    x = torch.randn(6, IN, requires_grad=True)

    def run():
        y = fake_quant_linear(x, w)
        return [
            quantized_codes(w),
            quantized_weight(w),
            y,
            *torch.autograd.grad(y, (x, w.A, w.B, w.scale), torch.ones_like(y)),
        ]

    whole = run()
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 3 * IN)
    parts = run()
    for a, b in zip(whole[:3], parts[:3]):
        assert torch.equal(a, b)
    for a, b in zip(whole[3:], parts[3:]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_weights_size_is_kept_for_backward():
    out, in_ = 96, 128
    w = make(4, True, -1, "int", dtype=torch.float32, out=out, in_=in_)
    kept: list[torch.Tensor] = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fake_quant_linear(torch.randn(5, in_), w)
    own = {t.data_ptr() for t in (w.phi, w.A, w.B, w.scale)}
    assert sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own) == 5 * in_ * 4


@pytest.mark.parametrize("trained", ["x", "A", "B", "scale"])
def test_only_what_is_asked_for_gets_a_gradient(trained):
    w = make(3, True, -1, "fixed8", dtype=torch.float32)
    tensors = {"x": torch.randn(4, IN), "A": w.A, "B": w.B, "scale": w.scale}
    alone = plain(tensors["x"].requires_grad_(), w).sum()
    expected = torch.autograd.grad(alone, tensors[trained])[0]
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    fake_quant_linear(tensors["x"], w).sum().backward()
    torch.testing.assert_close(tensors[trained].grad, expected, rtol=1e-4, atol=1e-4)
    assert all(t.grad is None for n, t in tensors.items() if n != trained)


def test_autocast_does_not_reach_the_integers():
    w = make(3, True, -1, "fixed8", dtype=torch.float32, out=64, in_=256)
    codes, x = quantized_codes(w), torch.randn(4, 256)
    y = fake_quant_linear(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantized_codes(w), codes)
        assert torch.equal(fake_quant_linear(x, w), y)


def test_matmul_precision_does_not_reach_the_integers():
    """On processors that multiply bfloat16, "medium" lets float32 products use it."""
    w = make(3, True, -1, "fixed8", dtype=torch.float32, out=64, in_=256)
    codes, setting = quantized_codes(w), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        inside = torch.backends.mkldnn.matmul.fp32_precision
        assert torch.equal(quantized_codes(w), codes)
        assert torch.backends.mkldnn.matmul.fp32_precision == inside
    finally:
        torch.set_float32_matmul_precision(setting)
