"""Rounding with the help of data loses less than rounding to nearest."""

import weakref

import pytest
import torch
from torch import nn

from peft_lrqat.calibration.calibrate import REPORTED, Calibration, Ranges, block_loss
from peft_lrqat.calibration.gptq import GPTQ
from peft_lrqat.calibration.methods import METHODS
from peft_lrqat.calibration.reconstruct import Reconstruction
from peft_lrqat.calibration.replay import Replay
from peft_lrqat.calibration.shelf import Shelf
from peft_lrqat.calibration.weights import StoredLinear, rounded, store
from peft_lrqat.quant import DOWNCASTS, Grid, WeightFormat, estimate_range


RANGES = Ranges(estimator="minmax", p=4.0)


def format_for(width, bits=2, symmetric=False, group_size=16, downcast="fixed8"):
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size)
    return WeightFormat(grid=grid, downcast=downcast, scale_dtype="bfloat16", in_features=width)


def calibration_of(model, method, batches=4, activations=None, **fields):
    formats = {
        name: format_for(module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    data = [{"input_ids": ids} for ids in torch.randint(3, 90, (batches, 4, 16))]
    replay = Replay(model, data, list(formats))
    made = Calibration(
        replay,
        formats,
        RANGES,
        method,
        activations=activations,
        shelf=Shelf(10**9),
        progress=False,
        **fields,
    )
    return made, formats


@pytest.mark.parametrize("activations", [None, Grid(bits=8, symmetric=False)], ids=["", "A8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_block_loses_less_than_rounded_to_nearest(method, activations, make_base):
    model = make_base("llama")
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    calibration, formats = calibration_of(model, METHODS[method](), activations=activations)
    seen = set()
    for block, result in calibration.run():
        assert result.after < (0.8 if method == "blocks" else 0.95) * result.before
        for name, stored in result.weights.items():
            assert stored.phi.dtype == torch.int8
            assert stored.zero_point.dtype == torch.uint8
            assert name.startswith(f"{block.name}.")
            seen.add(name)
    assert seen == formats.keys()
    # The model that was calibrated is the caller's; its weights are as they were.
    assert all(torch.equal(expected[n], weight) for n, weight in model.state_dict().items())


def test_the_reported_loss_is_that_of_what_is_stored(make_base):
    """A model with the stored weights in it, run as a whole, has the loss that was reported."""
    model = make_base("llama")
    calibration, formats = calibration_of(model, Reconstruction(epochs=1))
    outputs = []
    last = calibration.replay.blocks[-1].module
    last.register_forward_hook(lambda module, args, output: outputs.append(output))
    batches = calibration.replay.batches
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        results = [result for _, result in calibration.run()]
        del outputs[len(batches) :]
        for result in results:
            for name, stored in result.weights.items():
                weight = rounded(stored, formats[name], torch.float32)
                model.get_submodule(name).weight.copy_(weight)
        for batch in batches:
            model(**batch)
    plain, quantised = outputs[: len(batches)], outputs[len(batches) :]
    losses = [block_loss(a, b, None) for a, b in zip(quantised, plain, strict=True)]
    assert float(torch.stack(losses).mean()) == pytest.approx(results[-1].after, rel=1e-5)


def test_hidden_states_are_kept_twice(make_base):
    """Those of the unquantised model and of the rounded one: outputs take the place of inputs."""
    calibration, _ = calibration_of(make_base("llama"), GPTQ(), batches=4)
    kept, most = [], []
    keep = calibration.shelf.keep

    def counted(hidden):
        copy = keep(hidden)
        kept.append(weakref.ref(copy))
        most.append(sum(reference() is not None for reference in kept))
        return copy

    calibration.shelf.keep = counted
    assert len(list(calibration.run())) == 2
    assert max(most) == 2 * 4 + 1  # an output, just before its input goes


def test_a_finished_block_is_taken_to_where_its_weights_are(make_base):
    model = make_base("llama")
    results = {block.name: r for block, r in calibration_of(model, GPTQ())[0].run()}
    places = []

    class Elsewhere(StoredLinear):
        def to(self, device):
            places.append(device)
            return super().to(device)

    for result in results.values():
        result.weights.update({n: Elsewhere(**vars(w)) for n, w in result.weights.items()})
    again, formats = calibration_of(model, GPTQ(), known=results.get)
    assert all(result is results[block.name] for block, result in again.run())
    assert places == [model.device] * len(formats)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [0, 1])
def test_what_is_not_finite_is_named(method, at, make_base):
    model = make_base("llama")
    with torch.no_grad():
        model.model.layers[at].input_layernorm.weight[0] = torch.nan
    blocks = calibration_of(model, METHODS[method]())[0].run()
    with pytest.raises(ValueError, match=rf"the loss of `model\.layers\.{at}` .* is nan"):
        list(blocks)


def test_a_method_that_ruins_a_block_is_named(make_base):
    def ruin(work, report):
        found = GPTQ()(work, report)
        next(iter(found.values())).scale[0] = torch.nan
        return found

    calibration, _ = calibration_of(make_base("llama"), ruin)
    with pytest.raises(ValueError, match=r"`model\.layers\.0`.* lower the learning rate"):
        next(calibration.run())


def test_runs_with_one_seed_are_equal(make_base):
    first, second = (
        [r for _, r in calibration_of_seed(make_base("llama")).run()] for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        for name, stored in one.weights.items():
            assert torch.equal(stored.phi, other.weights[name].phi)
            assert torch.equal(stored.scale, other.weights[name].scale)


def calibration_of_seed(model):
    torch.manual_seed(5)
    return calibration_of(model, Reconstruction(epochs=1))[0]


def test_padding_does_not_count():
    output, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    expected = block_loss(output, target, mask)
    output[1, 2:] = 1e6
    assert torch.equal(block_loss(output, target, mask), expected)
    output[1, 2:] = torch.nan
    assert torch.equal(block_loss(output.requires_grad_(), target, mask), expected)
    (gradient,) = torch.autograd.grad(block_loss(output, target, mask), output)
    assert gradient.isfinite().all()
    output = output.detach()
    size = target[mask].square().sum()
    assert expected == pytest.approx(float((output - target)[mask].square().sum() / size))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 64, 96, 192], ids=str)
def test_gptq_lowers_the_error_of_the_outputs(group_size, symmetric):
    width = 384
    x = torch.randn(2000, 40) @ torch.randn(40, width) + 0.3 * torch.randn(2000, width)
    weight = torch.randn(24, width)
    format = format_for(width, 3, symmetric, group_size)
    scale, zero_point = estimate_range(
        weight, format.grid, estimator="lp", scale_dtype="bfloat16", p=4.0
    )
    nearest = format.grid.units(weight, scale, None if symmetric else zero_point.float())
    codes = nearest.round().clamp(format.grid.qmin, format.grid.qmax)
    nearest = format.grid.values(codes, scale, None if symmetric else zero_point)
    stored = GPTQ().round(weight, x.T @ x, format, Ranges(estimator="lp", p=4.0))
    made = rounded(stored, format, torch.float32)

    def error(other):
        return float(((weight - other) @ x.T).square().sum())

    assert error(made) < 0.5 * error(nearest)


@pytest.mark.parametrize("downcast", DOWNCASTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_gptq_makes_up_for_the_integers_that_are_stored(bits, downcast):
    """Of 256 columns that are nearly alike, what one row loses is less than half a step of one."""
    format = format_for(256, bits, group_size=-1, downcast=downcast)
    weight = torch.rand(200, 256)
    hessian = torch.ones(256, 256) + 1e-3 * torch.eye(256)
    stored = GPTQ(damping=0.0).round(weight, hessian, format, RANGES)
    lost = (rounded(stored, format, torch.float32) - weight).sum(1).abs()
    assert (lost < 0.75 * stored.scale[:, 0]).all()


def test_gptq_without_correlation_rounds_to_nearest():
    format = format_for(32, bits=4, group_size=-1)
    weight = torch.randn(6, 32)
    stored = GPTQ(damping=0.0).round(weight, torch.eye(32), format, RANGES)
    scale, zero_point = estimate_range(
        weight, format.grid, estimator="minmax", scale_dtype="bfloat16", p=4.0
    )
    assert torch.equal(stored.scale, scale)
    assert torch.equal(stored.zero_point, zero_point)
    expected = store(weight, scale, zero_point, format)
    assert torch.equal(stored.phi, expected.phi)
    codes = format.decode(format.encode(format.grid.units(weight, scale, zero_point.float())))
    assert torch.equal(format.decode(stored.phi).round(), codes.round())


def test_gptq_spreads_the_errors_of_a_balanced_grid():
    """Columns that are all alike: what one loses by rounding, the others make up for."""
    grid = Grid(bits=2, balanced=True)
    format = WeightFormat(grid=grid, downcast="fixed8", scale_dtype="bfloat16", in_features=32)
    weight = torch.rand(6, 32)  # to nearest, half of it is off by up to half a step
    hessian = torch.ones(32, 32) + 1e-3 * torch.eye(32)
    stored = GPTQ().round(weight, hessian, format, RANGES)
    made = rounded(stored, format, torch.float32)
    scale, _ = estimate_range(weight, grid, estimator="minmax", scale_dtype="bfloat16", p=4.0)
    nearest = grid.units(weight, scale, None).round().clamp(grid.qmin, grid.qmax)
    nearest = grid.values(nearest, scale, None)
    lost, without = ((other - weight).sum(1).abs().mean() for other in (made, nearest))
    assert lost < 0.3 * without


def test_gptq_of_a_module_that_gets_no_finite_input(make_base):
    """In a batch whose loss is not looked at."""
    model = make_base("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[2] = float("inf")
    calibration, _ = calibration_of(model, GPTQ(), batches=REPORTED + 1)
    calibration.replay.batches[-1]["input_ids"][0, 0] = 2
    with pytest.raises(ValueError, match=r"finite inputs of `model.layers.0"):
        next(calibration.run())
