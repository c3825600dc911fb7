"""A weight that is trained together with its grid: gradients by autograd, and what is stored."""

import pytest
import torch
from formula import straight_through

from peft_lrqat.calibration.weights import TrainedWeight, rounded, store
from peft_lrqat.quant import DOWNCASTS, Grid, WeightFormat, effective_scale, estimate_range


WIDTH = 24


def trained_weight(bits, symmetric, group_size, downcast, dtype=torch.float32):
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size)
    format = WeightFormat(grid=grid, downcast=downcast, scale_dtype="bfloat16", in_features=WIDTH)
    weight = torch.randn(10, WIDTH)
    scale, zero_point = estimate_range(weight, grid, estimator="lp", scale_dtype="bfloat16", p=4.0)
    made = TrainedWeight(weight, scale, None if symmetric else zero_point, format, dtype)
    with torch.no_grad():  # as in the midst of training: some weights are clipped
        made.weight.mul_(1.3)
        made.scale.mul_(1.01)
        if made.zero_point is not None:
            made.zero_point.add_(0.3)
    return made


def plain(made):
    """W_hat as anyone would write it, left to autograd."""
    grid, format = made.format.grid, made.format
    step = straight_through(effective_scale(made.scale, "bfloat16"), made.scale)
    step = grid.expand(step, WIDTH)
    units = made.weight / step
    if made.zero_point is not None:
        whole = made.zero_point.detach().round().clamp(grid.qmin, grid.qmax)
        zero = grid.expand(straight_through(whole, made.zero_point), WIDTH)
        units = units + zero
    inside = (units > grid.qmin - 0.5) & (units < grid.qmax + 0.5)
    whole = format.decode(format.encode(units.detach().clone())).round()
    whole = whole.clamp(grid.qmin, grid.qmax)
    codes = torch.where(inside, straight_through(whole, units), whole)
    return step * (codes - zero if made.zero_point is not None else codes)


@pytest.mark.parametrize("downcast", DOWNCASTS)
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_plain_formula(bits, symmetric, group_size, downcast):
    made = trained_weight(bits, symmetric, group_size, downcast)
    others = torch.randn(10, WIDTH)
    parameters = list(made.parameters())
    expected = torch.autograd.grad((plain(made) * others).sum(), parameters)
    found = torch.autograd.grad((made() * others).sum(), parameters)
    torch.testing.assert_close(made(), plain(made), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert found[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("downcast", DOWNCASTS)
@pytest.mark.parametrize("group_size", [-1, 8], ids=["per-row", "grouped"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_what_is_stored_is_what_was_trained(bits, symmetric, group_size, downcast, dtype):
    made = trained_weight(bits, symmetric, group_size, downcast, dtype)
    stored = made.stored()
    assert torch.equal(rounded(stored, made.format, dtype), made().detach())
    assert stored.phi.dtype == made.format.storage_dtype
    assert torch.equal(stored.scale, effective_scale(stored.scale, "bfloat16"))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "balanced"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_fixed_point_value_is_halfway_between_two_integers(bits, kind):
    """The first step of training would tip all of those over, however small it is."""
    grid = Grid(bits=bits, symmetric=kind != "asymmetric", balanced=kind == "balanced")
    format = WeightFormat(
        grid=grid, downcast="fixed8", scale_dtype="bfloat16", in_features=4 * 2**bits
    )
    units = torch.arange(grid.qmin - 1, grid.qmax + 1, 0.25)[None, : format.in_features]
    units = torch.nn.functional.pad(units, (0, format.in_features - units.shape[1]), value=0.5)
    scale = torch.ones(1, 1)
    zero_point = None if grid.symmetric else torch.full((1, 1), 1.0)
    weight = grid.values(units.clone(), scale, zero_point)
    found = store(weight, scale, zero_point, format)
    plain = format.encode(grid.units(weight, scale, zero_point))
    stored, expected = format.decode(found.phi), format.decode(plain)
    assert (stored - stored.round()).abs().max() < 0.5
    ties = (expected - expected.round()).abs() == 0.5
    assert ties.any() == (bits < 8)
    assert torch.equal(stored.round(), expected.round())
    assert torch.equal(stored[~ties], expected[~ties])
    assert ((stored - expected)[ties].abs() == 2.0 ** (bits - 8)).all()
