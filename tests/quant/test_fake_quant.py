"""The fake-quantised linear against autograd of the plain formula, and what it keeps."""

import weakref

import pytest
import torch
import torch.utils.checkpoint
from formula import IN, OUT, make, offset, plain
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_lrqat.quant import (
    DOWNCASTS,
    Grid,
    LowRankWeight,
    WeightFormat,
    blocks,
    clipped,
    fake_quant_linear,
    inspect_rows,
    quantized_codes,
    quantized_weight,
)


KINDS = pytest.mark.parametrize(
    "symmetric", [True, False, "balanced"], ids=["symmetric", "asymmetric", "balanced"]
)


@pytest.mark.parametrize("spread", [0.0, 0.3, 30.0], ids=["untrained", "trained", "mostly clipped"])
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@KINDS
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_value_and_gradients_equal_autograd_of_the_formula(
    downcast, bits, symmetric, group_size, spread
):
    w = make(bits, symmetric, group_size, downcast, spread=spread)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    inputs = (x, w.A, w.B, w.scale, bias)
    ours, formula = fake_quant_linear(x, w, bias), plain(x, w, bias)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    for name, a, b in zip(
        ["x", "A", "B", "scale", "bias"],
        *(torch.autograd.grad(y, inputs, upstream) for y in (ours, formula)),
    ):
        torch.testing.assert_close(
            a, b, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_the_cases_above_have_clipped_entries_and_entries_inside():
    for spread, least, most in ((0.0, 0.0, 0.2), (30.0, 0.5, 1.0)):
        w = make(3, True, -1, "fixed8", spread=spread)
        z = w.format.decode(w.phi) + w.gamma * (w.B @ w.A)
        share = ((z.round() < -4) | (z.round() > 3)).double().mean()
        assert least <= share <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@KINDS
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
            a.float(),
            b.float(),
            rtol=24 * torch.finfo(dtype).eps,
            atol=24 * torch.finfo(dtype).eps * b.abs().max(),
        )


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_weight_is_step_times_integer(scale_dtype):
    for symmetric in (True, False, "balanced"):
        w = make(3, symmetric, 8, "fixed8", dtype=torch.float32, scale_dtype=scale_dtype)
        grid, codes = w.format.grid, quantized_codes(w)
        assert codes.dtype == (torch.int8 if symmetric else torch.uint8)
        assert codes.min() >= grid.qmin
        assert codes.max() <= grid.qmax
        step = w.scale.detach().to(getattr(torch, scale_dtype)).float()
        assert torch.equal(quantized_weight(w), grid.expand(step, IN) * (codes.float() - offset(w)))


@pytest.mark.parametrize("rows", [[0], [OUT - 1], [7, 2, 2], list(range(OUT))], ids=str)
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@KINDS
@pytest.mark.parametrize("downcast", DOWNCASTS)
def test_some_rows_are_those_of_all_integers(downcast, symmetric, group_size, rows):
    w, rows = (
        make(3, symmetric, group_size, downcast, dtype=torch.float32),
        torch.tensor(rows, dtype=torch.long),
    )
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


def gradients(x, w, bias=None, upstream=None, layer=fake_quant_linear):
    y = layer(x, w, bias)
    inputs = [t for t in (x, w.A, w.B, w.scale, bias) if t is not None and t.requires_grad]
    return torch.autograd.grad(y, inputs, torch.ones_like(y) if upstream is None else upstream)


@pytest.mark.parametrize("pass_through", [False, True], ids=["zero", "pass_through"])
@pytest.mark.parametrize(
    "max_share", [0.0, 0.1, 1.0], ids=["whole products", "mixed", "single entries"]
)
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@pytest.mark.parametrize("downcast", ["fixed8", "int"])
def test_chunks_and_clipped_entries_give_the_formulas_gradients(
    downcast, group_size, max_share, pass_through, monkeypatch
):
    """In chunks of 16 columns: some have more clipped weights than `MAX_SHARE`, and some fewer."""
    w = make(3, True, group_size, downcast, spread=3.0, out=40, in_=48, pass_through=pass_through)
    with torch.no_grad():
        w.A[:, 16:] *= 0.3
    z = w.format.decode(w.phi) + w.gamma * (w.B @ w.A)
    shares = ((z.round() < -4) | (z.round() > 3)).double().unflatten(1, (3, 16)).mean((0, 2))
    assert shares[0] > 0.1
    assert 0 < shares[1] < 0.1
    x = torch.randn(7, 48, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(7, 40, dtype=torch.float64)
    expected = gradients(x, w, upstream=upstream, layer=plain)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 40 * 8 * 16)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("peft_lrqat.quant.gradients.MAX_SHARE", max_share)
    monkeypatch.setattr(clipped, "PART_BYTES", 512)
    torch.testing.assert_close(fake_quant_linear(x, w), plain(x, w), rtol=1e-12, atol=1e-12)
    found = gradients(x, w, upstream=upstream)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, found, gradients(x, w, upstream=upstream)))


def test_entries_of_a_product():
    x, y = torch.randn(9, 30).bfloat16(), torch.randn(9, 20).bfloat16()
    row, column = (torch.rand(20, 30) < 0.2).nonzero(as_tuple=True)
    found = clipped.sampled_product(y, x, row, column)
    torch.testing.assert_close(found, (y.float().T @ x.float())[row, column])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_results_may_be_written_into(biased, dtype):
    """The same holds for a plain linear layer, whose result autograd does not need."""
    w = make(3, True, -1, "fixed8", dtype=torch.promote_types(dtype, torch.float32))
    object.__setattr__(w, "dtype", dtype)
    x = torch.randn(6, IN, dtype=dtype)
    bias = torch.randn(OUT, dtype=dtype) if biased else None
    y = fake_quant_linear(x, w, bias)
    y.mul_(2).add_(1)
    (written,) = torch.autograd.grad(y, w.scale, torch.ones_like(y))
    (expected,) = gradients(
        x.to(w.A.dtype),
        w,
        None if bias is None else bias.to(w.A.dtype),
        layer=lambda *a: 2 * plain(*a),
    )[-1:]
    tolerance = (
        1e-10 if dtype == torch.float64 else 24 * torch.finfo(dtype).eps * expected.abs().max()
    )
    torch.testing.assert_close(written.double(), expected.double(), rtol=0, atol=tolerance)


def test_a_large_bias_does_not_drown_the_scales_gradient():
    w = make(4, True, -1, "fixed8", dtype=torch.float32)
    object.__setattr__(w, "dtype", torch.bfloat16)
    x, bias = torch.randn(64, IN).bfloat16(), torch.full((OUT,), 1000.0).bfloat16()
    upstream = torch.randn(64, OUT).bfloat16()
    *_, without = gradients(x, w, None, upstream)
    *_, found = gradients(x, w, bias, upstream)
    torch.testing.assert_close(found, without, rtol=0, atol=0.02 * without.abs().max())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_rows_that_leave_nothing_in_the_result_get_their_scales_gradient(biased, dtype):
    """A row of zeros has the smallest of all steps, but its integers may move."""
    w = make(4, True, -1, "fixed8", dtype=torch.promote_types(dtype, torch.float32))
    object.__setattr__(w, "dtype", dtype)
    with torch.no_grad():
        w.scale[2], w.scale[5] = 0.0, -0.3
        w.scale[7] = 1e-5
    x, upstream = torch.randn(64, IN, dtype=dtype), torch.randn(64, OUT, dtype=dtype)
    bias = torch.full((OUT,), 3.0, dtype=dtype) if biased else None
    (found,) = gradients(x, w, bias, upstream)[-1:]
    (expected,) = gradients(x.to(w.A.dtype), w, None, upstream.to(w.A.dtype), layer=plain)[-1:]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-3}.get(dtype, 0.02)
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max())
    )


def test_checkpointing_keeps_nothing_and_gives_the_same():
    w = make(3, True, -1, "fixed8", dtype=torch.float32, spread=2.0)
    x = torch.randn(6, IN, requires_grad=True)

    def checkpointed(x, w, bias):
        return torch.utils.checkpoint.checkpoint(fake_quant_linear, x, w, bias, use_reentrant=False)

    assert all(map(torch.equal, gradients(x, w), gradients(x, w, layer=checkpointed)))


@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
def test_only_x_and_per_row_y_are_kept_for_backward(group_size):
    """The gradient of a row's scale uses the layer's result, which most models keep anyway."""
    out, in_ = 96, 128
    w = make(4, True, group_size, "int", dtype=torch.float32, out=out, in_=in_)
    kept: list[torch.Tensor] = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = fake_quant_linear(torch.randn(5, in_), w)
    own = {t.data_ptr() for t in (w.phi, w.A, w.B, w.scale, w.zero_point) if t is not None}
    kept = [t for t in kept if t is not None and t.data_ptr() not in own]
    expected = 5 * in_ * 4 + (5 * out * 4 if group_size == -1 else 0)
    assert sum(t.numel() * t.element_size() for t in kept) == expected
    assert any(t.data_ptr() == y.data_ptr() for t in kept) == (group_size == -1)


class Live(TorchDispatchMode):
    """Measures the most bytes that tensors made in this mode take at the same time."""

    def __init__(self):
        super().__init__()
        self.most, self.tensors = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if torch.is_tensor(leaf)
        }
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.tensors[id(leaf)] = weakref.ref(leaf)
        alive = {
            t.untyped_storage().data_ptr(): t
            for t in (ref() for ref in self.tensors.values())
            if t is not None
        }
        self.most = max(self.most, sum(t.untyped_storage().nbytes() for t in alive.values()))
        return out


@pytest.mark.parametrize("spread", [0.01, 3.0], ids=["few clipped", "many clipped"])
@pytest.mark.parametrize("group_size", [-1, 128], ids=["per-row", "grouped"])
def test_temporaries_do_not_grow_with_the_layer(group_size, spread):
    """A bfloat16 layer with a weight of 64 MB takes at most 32 MB at any time.

    Results and gradients are not counted.
    """
    out, in_, tokens = 8192, 4096, 16
    fmt = WeightFormat(
        grid=Grid(bits=4, group_size=group_size),
        downcast="fixed8",
        scale_dtype="bfloat16",
        in_features=in_,
    )
    w = LowRankWeight(
        format=fmt,
        phi=torch.randint(-100, 100, (out, in_), dtype=torch.int8),
        zero_point=None,
        A=torch.randn(8, in_, requires_grad=True),
        B=(spread * torch.randn(out, 8)).requires_grad_(),
        scale=torch.full(
            (out, 1 if group_size == -1 else in_ // group_size), 0.01, requires_grad=True
        ),
        gamma=1.0,
        dtype=torch.bfloat16,
    )
    x = torch.randn(tokens, in_, dtype=torch.bfloat16, requires_grad=True)
    with Live() as live:
        y = fake_quant_linear(x, w)
        torch.autograd.grad(y, (x, w.A, w.B, w.scale), torch.ones_like(y))
    results = 2 * tokens * (in_ + 2 * out) + 4 * (w.A.numel() + w.B.numel() + w.scale.numel())
    assert live.most - results <= 32 * 2**20


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
        backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # an object, not a module
        inside = backend.fp32_precision
        assert torch.equal(quantized_codes(w), codes)
        assert backend.fp32_precision == inside
    finally:
        torch.set_float32_matmul_precision(setting)
