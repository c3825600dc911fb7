"""The factors of whole adapters become components: cost, loss and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_lrqat.loraquant import LoRAQuantConfig
from peft_lrqat.loraquant.quantize import nominal_bits, quantize_factors
from peft_lrqat.quant.factors import groups, paper, residual
from peft_lrqat.quant.factors.allocation import relative_errors
from peft_lrqat.quant.factors.storage import expand


SHAPES = {"a": (96, 64), "b": (96, 64), "c": (10, 100)}


@pytest.fixture
def quick(monkeypatch):
    """Makes conversions quick; what is computed once for all tests is computed in full."""
    for group_size in (7, 32, 128, 1000):
        relative_errors(group_size)
    monkeypatch.setattr(groups, "CANDIDATES", 3)
    monkeypatch.setattr(residual, "MAX_SWEEPS", 1)
    monkeypatch.setattr(paper, "STEPS", 10)


def make_factors(rank=8, decay=0.7, shapes=SHAPES):
    """Makes products whose singular values fall as trained ones do.

    Each module has its own level.
    """
    falling = decay ** torch.arange(rank)
    return {
        name: (torch.randn(m, rank) * falling * 2.0**-i, torch.randn(rank, n) / n**0.5)
        for i, (name, (m, n)) in enumerate(shapes.items())
    }


def quantize(factors, scaling=1.0, **recipe):
    rank = max(len(A) for _, A in factors.values())
    config = LoRAQuantConfig(**{"r": rank, "group_size": 32, **recipe})
    return quantize_factors(factors, config, dict.fromkeys(factors, scaling), progress=False)


def stored_bits(found):
    return sum(quantized.stored_bits for quantized in found.values())


def relative_error(found):
    error, norm = (
        sum(getattr(q, name) for q in found.values()) for name in ("squared_error", "squared_norm")
    )
    return (error / norm) ** 0.5


def parameters(factors):
    return sum(B.numel() + A.numel() for B, A in factors.values())


@pytest.mark.parametrize("method", ["residual", "paper"])
@pytest.mark.parametrize(
    "group_size", [1000, 32, 7], ids=["one-group", "divides", "does-not-divide"]
)
@pytest.mark.parametrize("rank", [1, 3, 12], ids=["rank-1", "rank-3", "rank-above-m"])
def test_the_errors_are_those_of_what_is_stored(method, group_size, rank, quick):
    factors = make_factors(rank, decay=0.9)
    found = quantize(factors, method=method, group_size=group_size)
    assert list(found) == list(factors)
    for name, (B, A) in factors.items():
        q_B, q_A = expand(found[name].format, found[name].tensors, torch.float64)
        product = B.double() @ A.double()
        assert found[name].squared_norm == pytest.approx(float(product.square().sum()), rel=1e-6)
        assert found[name].squared_error == pytest.approx(
            float((product - q_B @ q_A).square().sum()), rel=1e-4
        )
        assert len(found[name].format.bits) <= min(rank, *SHAPES[name])
    assert relative_error(found) < 1


@pytest.mark.parametrize("decay", [0.6, 0.85])
@pytest.mark.parametrize(
    "variant", [(2, 0.8), (2, 0.9), (3, 0.8), (3, 0.9)], ids="{0[0]}@{0[1]}".format
)
def test_residual_takes_no_more_storage_than_the_paper_and_loses_a_quarter_less(variant, decay):
    shapes = dict.fromkeys("ab", (256, 192))
    factors = make_factors(16, decay, shapes)
    recipe = {"bits_high": variant[0], "ratio": variant[1], "group_size": 128}
    residual, paper = (
        quantize(factors, method=method, **recipe) for method in ("residual", "paper")
    )
    assert stored_bits(residual) <= stored_bits(paper)
    assert relative_error(residual) < 0.75 * relative_error(paper)


@pytest.mark.parametrize("average_bits", [0.3, 1.65, 3.0])
def test_average_bits_are_met(average_bits, quick):
    factors = make_factors(16, decay=0.8, shapes=dict.fromkeys("abcd", (256, 192)))
    found = quantize(factors, average_bits=average_bits, group_size=128)
    budget = average_bits * parameters(factors)
    # One more component, at the next number of bits, would not fit.
    assert budget - (256 + 192 + 4 * 16) * 2 < stored_bits(found) <= budget


def test_a_budget_of_nothing_is_refused():
    factors = make_factors()
    with pytest.raises(
        ValueError, match="has no room for a single component; give at least"
    ) as refusal:
        quantize(factors, average_bits=1e-6)
    least = float(str(refusal.value).partition("at least ")[2].partition(",")[0])
    assert sorted(q.format.bits for q in quantize(factors, average_bits=least).values()) == [
        "",
        "",
        "1",
    ]


SMALL = [(16, 200), (32, 32), (96, 200)]


@pytest.mark.parametrize("bits_high", [2, 3, 4])
@pytest.mark.parametrize("group_size", [4, 128])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_no_adapter_is_worse_than_as_published(shape, rank, group_size, bits_high):
    """This holds even if one module of low rank leaves little to allocate.

    It also holds where zero points of small groups are worth their bits.
    """
    factors = {"a": (torch.randn(shape[0], rank), torch.randn(rank, shape[1]))}
    options = {"bits_high": bits_high, "ratio": 1.0, "group_size": group_size}
    published, found = (
        quantize(factors, method=method, **options) for method in ("paper", "residual")
    )
    assert stored_bits(found) <= stored_bits(published)
    assert relative_error(found) <= relative_error(published)


def test_large_adapters_are_quantised_once(monkeypatch, quick):
    called = []
    monkeypatch.setattr(
        "peft_lrqat.loraquant.quantize.quantize_paper", lambda *_, **__: called.append(1)
    )
    monkeypatch.setattr("peft_lrqat.loraquant.quantize.SMALL", 10)
    quantize(make_factors())
    assert not called


@pytest.mark.parametrize("method", ["residual", "paper"])
@pytest.mark.parametrize("zero", ["a", "abc"], ids=["one", "all"])
def test_zero_products_have_no_components(method, zero, quick):
    factors = make_factors()
    for name in zero:
        factors[name] = torch.zeros_like(factors[name][0]), factors[name][1]
    found = quantize(factors, method=method)
    assert [name for name, quantized in found.items() if not quantized.format.bits] == list(zero)
    assert all(found[name].squared_error == found[name].squared_norm == 0 for name in zero)


def test_bits_go_where_the_scaled_product_is_large():
    """`scaling` counts: two modules have equal factors, but the model multiplies one by more."""
    B, A = make_factors(shapes={"a": (64, 64)})["a"]
    config = LoRAQuantConfig(r=8, average_bits=1.0, group_size=32)
    found = quantize_factors(
        {"weak": (B, A), "strong": (B, A)}, config, {"weak": 1.0, "strong": 8.0}, progress=False
    )
    assert found["strong"].stored_bits > found["weak"].stored_bits
    assert found["strong"].squared_error < found["weak"].squared_error


def test_the_ratio_1_takes_every_component():
    found = quantize(make_factors(), method="paper", ratio=1.0, bits_high=3)
    assert [quantized.format.bits for quantized in found.values()] == ["3" * 8] * 3


@pytest.mark.parametrize("method", ["residual", "paper"])
@pytest.mark.parametrize("power", [-20, 3])
def test_the_size_of_the_entries_does_not_matter(method, power, quick):
    factors = make_factors()
    moved = {name: (B * 2.0**power, A * 2.0**power) for name, (B, A) in factors.items()}
    before, after = quantize(factors, method=method), quantize(moved, method=method)
    assert [q.format.bits for q in before.values()] == [q.format.bits for q in after.values()]
    assert relative_error(after) == pytest.approx(relative_error(before), rel=0.02)


@pytest.mark.parametrize("method", ["residual", "paper"])
def test_two_runs_are_equal(method, quick):
    factors = make_factors()
    first, second = quantize(factors, method=method), quantize(factors, method=method)
    for name in factors:
        assert first[name].format == second[name].format
        assert all(
            torch.equal(first[name].tensors[kind], t) for kind, t in second[name].tensors.items()
        )


def test_nominal_bits_are_those_of_the_codes_alone():
    factors = make_factors()
    assert nominal_bits(factors, quantize(factors, method="paper", ratio=1.0, bits_high=2)) == 2


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("method", ["residual", "paper"])
def test_nothing_of_the_size_of_a_weight_is_formed(method, quick):
    factors = make_factors(4, shapes={"a": (600, 700)})
    with Largest() as largest:
        quantize(factors, method=method, group_size=128)
    # The factors, padded to whole groups; for the error, also those of the difference.
    assert largest.elements <= 2 * 4 * 768 < 600 * 700 / 10
