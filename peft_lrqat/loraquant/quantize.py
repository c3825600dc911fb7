"""Quantises the factors of a whole adapter: budget, allocation, and batches of equal shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor
from tqdm.auto import tqdm

from ..quant.factors.allocation import Layer, allocate
from ..quant.factors.groups import GroupCodes
from ..quant.factors.paper import high_components, quantize_paper
from ..quant.factors.residual import quantize_residual
from ..quant.factors.storage import PackedFormat, pack_components
from ..quant.factors.svd import product_svd, squared_error, squared_norm
from ..quant.grid import SCALE_DTYPES
from .config import LoRAQuantConfig


SMALL = 1 << 20  # up to this many parameters, both procedures are tried
FEW = 2  # up to this many components per module, both are tried, whatever the size
BATCH_ELEMENTS = 1 << 23  # in the factors of layers that are quantised together
LARGEST = 1e4  # entry of a factor; scales may be stored in float16, which ends at 65504

Components = list[tuple[GroupCodes, GroupCodes]]


@dataclass(frozen=True, kw_only=True)
class QuantizedFactors:
    """Holds what is stored of one module, and what was lost."""

    format: PackedFormat
    tensors: dict[str, Tensor]
    squared_error: float  # ||B A - Q(B) Q(A)||_F^2
    squared_norm: float  # ||B A||_F^2

    @property
    def stored_bits(self) -> int:
        """The bits of storage of all tensors."""
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def check_factors(
    factors: Mapping[str, tuple[Tensor, Tensor]], rank_of: Callable[[str], int], scale_dtype: str
) -> None:
    """Raises ValueError unless all pairs are finite matrices whose products have the stated rank.

    ``rank_of`` returns the rank that the config states for a module.
    """
    if not factors:
        raise ValueError("the adapter has no pair of factors A and B: there is nothing to quantise")
    for name, (B, A) in factors.items():
        rank = rank_of(name)
        if B.ndim > 2 or A.ndim > 2:
            raise ValueError(
                f"`{name}` is a convolution, with factors of shapes {tuple(B.shape)} and "
                f"{tuple(A.shape)}; LORAQUANT works on linear layers and embeddings. Train the "
                "adapter without it"
            )
        if (
            B.ndim != 2
            or A.ndim != 2
            or B.shape[1] != A.shape[0]
            or len(A) != rank
            or not B.numel()
            or not A.numel()
        ):
            raise ValueError(
                f"the factors of `{name}` have shapes {tuple(B.shape)} and {tuple(A.shape)}, which "
                f"do not form a product of rank {rank}; the weights and {CONFIG_NAME} do not "
                "belong together"
            )
        for side, tensor in (("B", B), ("A", A)):
            if not tensor.is_floating_point():
                raise ValueError(
                    f"`{side}` of `{name}` must hold floating-point numbers, but holds "
                    f"{tensor.dtype}"
                )
            largest = float(tensor.double().abs().max())
            if not math.isfinite(largest):
                raise ValueError(
                    f"`{side}` of `{name}` has NaN or infinite entries; nothing was written"
                )
            if largest > LARGEST:
                raise ValueError(
                    f"`{side}` of `{name}` has an entry of {largest:.3g}, but at most "
                    f"{LARGEST:.3g} can be stored with scales of {scale_dtype}; the adapter is "
                    "damaged, or its training diverged"
                )


def quantize_factors(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    config: LoRAQuantConfig,
    scaling: Mapping[str, float],
    *,
    progress: bool = True,
) -> dict[str, QuantizedFactors]:
    """Quantises B (m, r) and A (r, n) of each module by the recipe in ``config``.

    ``scaling`` is lora_alpha / r of each module: an allocation compares the errors that enter the
    model. With ``method="residual"``, all modules share one budget of storage: what ``bits_high``
    and ``ratio`` would cost in the published procedure, or ``average_bits`` for each parameter.
    Small adapters, and those of low rank, leave little to allocate. For them, the published result
    is taken if its error is lower.
    """
    found = _by_one_method(factors, config, scaling, progress=progress)
    parameters = sum(B.numel() + A.numel() for B, A in factors.values())
    little = parameters <= SMALL or max(len(A) for _, A in factors.values()) <= FEW
    if config.method == "residual" and config.average_bits is None and little:
        published = _by_one_method(
            factors, replace(config, method="paper"), scaling, progress=progress
        )
        found = _better(published, found, scaling)
    return found


def _better(
    one: dict[str, QuantizedFactors],
    other: dict[str, QuantizedFactors],
    scaling: Mapping[str, float],
) -> dict[str, QuantizedFactors]:
    """Returns the result with the lower error as it enters the model; ``other`` if they tie."""
    errors = [
        sum(scaling[name] ** 2 * quantized.squared_error for name, quantized in result.items())
        for result in (one, other)
    ]
    return one if errors[0] < errors[1] else other


def _by_one_method(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    config: LoRAQuantConfig,
    scaling: Mapping[str, float],
    *,
    progress: bool,
) -> dict[str, QuantizedFactors]:
    """Quantises by ``config.method`` alone."""
    if config.method == "residual":
        return _on_one_grid(factors, config, scaling, zero_points=False, progress=progress)
    # Skewed vectors may need zero points; most do better without.
    with_points, without = (
        _on_one_grid(factors, config, scaling, zero_points=zero_points, progress=progress)
        for zero_points in (True, False)
    )
    return _better(with_points, without, scaling)


def _on_one_grid(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    config: LoRAQuantConfig,
    scaling: Mapping[str, float],
    *,
    zero_points: bool,
    progress: bool,
) -> dict[str, QuantizedFactors]:
    """Quantises all modules on the grid with or without zero points, in batches of equal shape."""
    scale_dtype = SCALE_DTYPES[config.scale_dtype]

    bits = _allocated(factors, config, scaling) if config.method == "residual" else {}
    found: dict[str, QuantizedFactors] = {}
    with tqdm(total=len(factors), desc="quantising", unit="module", disable=not progress) as bar:
        for names in _batches(factors):
            B = torch.stack([factors[name][0].float() for name in names])
            A = torch.stack([factors[name][1].float() for name in names])
            if config.method == "paper":
                components = quantize_paper(
                    B,
                    A,
                    bits_high=config.bits_high,
                    ratio=config.ratio,
                    zero_points=zero_points,
                    group_size=config.group_size,
                    scale_dtype=scale_dtype,
                )
            else:
                width = torch.tensor([bits[name] for name in names])
                # Components for which no module of the batch has bits are left out.
                components = quantize_residual(
                    B,
                    A,
                    width[:, : int((width > 0).sum(-1).max())],
                    group_size=config.group_size,
                    scale_dtype=scale_dtype,
                )
            norms = squared_norm(B, A)
            for row, name in enumerate(names):
                found[name] = _packed(
                    components[row], B[row], A[row], float(norms[row]), config, zero_points
                )
            bar.update(len(names))
    return {name: found[name] for name in factors}


def _packed(
    components: Components,
    B: Tensor,
    A: Tensor,
    norm: float,
    config: LoRAQuantConfig,
    zero_points: bool,
) -> QuantizedFactors:
    """Packs the components of one module and measures their error."""
    q_B, q_A = B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
    if components:
        q_B = torch.cat([b.values() for b, _ in components]).T
        q_A = torch.cat([a.values() for _, a in components])
    format, tensors = pack_components(
        components,
        rows=len(B),
        columns=A.shape[1],
        group_size=config.group_size,
        scale_dtype=SCALE_DTYPES[config.scale_dtype],
        zero_points=zero_points,
    )
    error = float(squared_error(B[None], A[None], q_B[None], q_A[None]))
    return QuantizedFactors(format=format, tensors=tensors, squared_error=error, squared_norm=norm)


def _allocated(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    config: LoRAQuantConfig,
    scaling: Mapping[str, float],
) -> dict[str, list[int]]:
    """Returns the bits of every component of every module for the residual method.

    Raises ValueError if the budget has no room for a single component.
    """
    layers = {}
    for names in _batches(factors):
        B, A = (torch.stack([factors[name][side].float() for name in names]) for side in (0, 1))
        _, values, _ = product_svd(B, A)
        for name, s in zip(names, values, strict=True):
            layers[name] = Layer(
                singular_values=s * scaling[name], rows=B.shape[1], columns=A.shape[2]
            )
    scale_bits = 8 * SCALE_DTYPES[config.scale_dtype].itemsize
    parameters = sum(B.numel() + A.numel() for B, A in factors.values())
    if config.average_bits is None:
        budget = sum(_published_cost(layer, config, scale_bits) for layer in layers.values())
    else:
        budget = int(config.average_bits * parameters)
    widths = allocate(
        list(layers.values()), budget, group_size=config.group_size, scale_bits=scale_bits
    )
    if not any(map(any, widths)) and any(layer.singular_values.any() for layer in layers.values()):
        least = (
            min(layer.cost(1, config.group_size, scale_bits) for layer in layers.values())
            / parameters
        )
        raise ValueError(
            f"`average_bits` is {config.average_bits}, which has no room for a single component; "
            f"give at least {math.ceil(1000 * least) / 1000}, or a larger `group_size`"
        )
    return dict(zip(layers, widths, strict=True))


def _published_cost(layer: Layer, config: LoRAQuantConfig, scale_bits: int) -> int:
    """Returns the bits of storage of a module in the published procedure, without zero points."""
    high = int(high_components(layer.singular_values[None], config.ratio))
    if not high:
        return 0
    low = len(layer.singular_values) - high
    return high * layer.cost(config.bits_high, config.group_size, scale_bits) + low * layer.cost(
        1, config.group_size, scale_bits
    )


def stored_zero_points(found: Mapping[str, QuantizedFactors]) -> bool:
    """Whether components above 1 bit have zero points; the same for all modules of an adapter."""
    return any(quantized.format.zero_points for quantized in found.values())


def nominal_bits(
    factors: Mapping[str, tuple[Tensor, Tensor]], found: Mapping[str, QuantizedFactors]
) -> float:
    """Returns bits per parameter as papers count them: only those of the codes."""
    codes = sum(
        sum(map(int, quantized.format.bits)) * (quantized.format.rows + quantized.format.columns)
        for quantized in found.values()
    )
    return codes / sum(B.numel() + A.numel() for B, A in factors.values())


def _batches(factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[list[str]]:
    """Yields the names of modules of equal shape, as many together as memory allows."""
    shapes: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (B, A) in factors.items():
        shapes.setdefault((B.shape, A.shape), []).append(name)
    for (shape_b, shape_a), names in shapes.items():
        size = max(1, BATCH_ELEMENTS // (shape_b.numel() + shape_a.numel()))
        yield from (names[start : start + size] for start in range(0, len(names), size))


def report(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    found: Mapping[str, QuantizedFactors],
    stored_bytes: int,
) -> dict[str, Any]:
    """Returns what the conversion did, for the saved configuration.

    It holds the errors of the products, and the bits and bytes of the factors.
    """
    parameters = sum(B.numel() + A.numel() for B, A in factors.values())
    error, norm = (
        sum(getattr(q, name) for q in found.values()) for name in ("squared_error", "squared_norm")
    )
    return {
        "relative_error": round((error / norm) ** 0.5, 6) if norm else 0.0,
        "bits_per_parameter": round(8 * stored_bytes / parameters, 4),
        "nominal_bits_per_parameter": round(nominal_bits(factors, found), 4),
        "bytes": stored_bytes,
        "bytes_before": sum(
            t.numel() * t.element_size() for pair in factors.values() for t in pair
        ),
        "relative_error_of_modules": {
            name: round((q.squared_error / q.squared_norm) ** 0.5, 4) if q.squared_norm else 0.0
            for name, q in found.items()
        },
    }
