"""Range estimation: bounds of the error, and the same result for all blocks and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lrqat.quant import Grid, blocks, estimate_range, ranges


GRIDS = [
    Grid(bits=b, symmetric=s, group_size=g)
    for b in (2, 3, 4, 8)
    for s in (True, False)
    for g in (-1, 8)
]


def dequantized(weight, grid, scale, zero_point):
    step, offset = (
        grid.expand(scale, weight.shape[1]),
        grid.expand(zero_point.float(), weight.shape[1]),
    )
    codes = (weight / step + offset).round().clamp(grid.qmin, grid.qmax)
    return step * (codes - offset)


def estimate(weight, grid, estimator, scale_dtype="float32", p=4.0):
    return estimate_range(weight, grid, estimator=estimator, scale_dtype=scale_dtype, p=p)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_minmax_errs_by_at_most_the_step(grid):
    weight = torch.randn(5, 24)
    scale, zero_point = estimate(weight, grid, "minmax")
    error = (dequantized(weight, grid, scale, zero_point) - weight).abs()
    # Half a step by rounding; a rounded zero point may shift the ends of the grid by another half.
    bound = 0.5001 if grid.symmetric else 1.0001
    assert (error <= bound * grid.expand(scale, 24)).all()


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4, 4.0])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_lp_is_never_worse_than_minmax(grid, p):
    weight = torch.randn(5, 24) ** 3
    loss = {}
    for estimator in ("minmax", "lp"):
        error = dequantized(weight, grid, *estimate(weight, grid, estimator, p=p)) - weight
        loss[estimator] = grid.split(error.double().abs() ** p).sum(-1)
    assert (loss["lp"] <= loss["minmax"] * (1 + 1e-5)).all()


def test_lp_finds_the_best_candidate_of_an_exhaustive_search():
    weight, grid = torch.randn(1, 64), Grid(bits=3)
    top = weight.abs().max() / grid.qmax
    losses = [
        ((dequantized(weight, grid, top.view(1, 1) * s, torch.zeros(1, 1)) - weight) ** 4).sum()
        for s in ranges.SEARCH_SHARES
    ]
    best = top * ranges.SEARCH_SHARES[int(torch.stack(losses).argmin())]
    assert estimate(weight, grid, "lp")[0].item() == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 2.4, 4.0, 8.0])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shares_that_are_passed_over_would_not_win(bits, symmetric, group_size, p, monkeypatch):
    """For these, clipping alone costs more than the best share so far."""
    weight = torch.randn(24, 256) * torch.rand(24, 1) + 0.3 * torch.rand(24, 1)
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size)
    found = estimate(weight, grid, "lp", "bfloat16", p)
    monkeypatch.setattr(ranges, "_clipping_loss", lambda *_: torch.zeros(1))
    assert all(map(torch.equal, found, estimate(weight, grid, "lp", "bfloat16", p)))


@pytest.mark.parametrize("estimator", ["minmax", "lp"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_and_threads_change_nothing(estimator, symmetric, monkeypatch):
    weight, grid = torch.randn(33, 48), Grid(bits=3, symmetric=symmetric, group_size=16)
    whole = estimate(weight, grid, estimator, "bfloat16")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        parts = estimate(weight, grid, estimator, "bfloat16")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


@settings(max_examples=30, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    estimator=st.sampled_from(["minmax", "lp"]),
    scale_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    factor=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e4]),
)
def test_any_magnitude_gives_a_usable_step(bits, symmetric, estimator, scale_dtype, factor):
    weight = torch.linspace(-1, 1, 24).view(2, 12) * factor
    scale, zero_point = estimate(
        weight, Grid(bits=bits, symmetric=symmetric), estimator, scale_dtype
    )
    assert scale.shape == zero_point.shape == (2, 1)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert torch.equal(scale, scale.to(getattr(torch, scale_dtype)).float())
    assert not (symmetric and zero_point.any())


@pytest.mark.parametrize("estimator", ["minmax", "lp"])
def test_one_weight_and_rows_of_one_sign(estimator):
    for weight in (torch.tensor([[0.7]]), torch.tensor([[-0.7]]), torch.rand(2, 8) + 1):
        for symmetric in (True, False):
            grid = Grid(bits=8, symmetric=symmetric)
            scale, zero_point = estimate(weight, grid, estimator)
            assert (
                dequantized(weight, grid, scale, zero_point) - weight
            ).abs().max() <= weight.abs().max() / 127
