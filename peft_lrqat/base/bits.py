"""Bits for each layer of a model, by what rounding it costs on a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator

from ..calibration.calibrate import Ranges
from ..calibration.replay import Batch
from ..calibration.sensitivity import measure_costs, spend
from ..quant import WeightFormat
from .calibrated import make_batches
from .config import LowBitConfig
from .embedding import width_of
from .quantizer import find_targets


def choose_bits(
    model: PreTrainedModel,
    dataset: Iterable[Mapping[str, Any]],
    config: LowBitConfig,
    *,
    average_bits: float,
    widths: Sequence[int] = (2, 3, 4, 5, 6, 8),
    fused: Iterable[Sequence[str]] = (),
    batch_size: int = 4,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator,
    progress: bool = True,
) -> dict[str, int]:
    """Chooses the bits of each layer, so that rounding costs little and all take an average.

    One backward pass over the data, on the plain model, estimates what each layer costs at each
    width. Scales and zero points come on top of the average, as they do on ``bits``.

    Args:
        model: the plain model, which gives a loss; it is left as it was.
        dataset: rows that the model takes, such as ``{"input_ids": [...]}``. Without labels, the
            input ids are the labels.
        config: targets, group size, symmetry and range estimator. Its ``bits`` are not used.
        average_bits: at most this many bits per weight of the targets.
        widths: the numbers of bits to choose from.
        fused: last parts of names that get the same bits within a parent, because a runtime joins
            them.
        batch_size: rows in a batch.
        data_collator: makes a batch of rows.
        progress: whether to show a bar.

    Returns:
        Bits by name of the layer, for `LRQATConfig(bits_pattern=...)` or
        `LowBitConfig(bits_pattern=...)`.

    Raises:
        ValueError: for an average below the fewest of ``widths``, data without rows, and what
            `measure_costs` refuses.
    """
    widths, fused = sorted(set(widths)), list(fused)
    if not widths or not widths[0] <= average_bits <= widths[-1]:
        raise ValueError(
            f"`average_bits` must lie within the widths, {', '.join(map(str, widths))}, but is "
            f"{average_bits}"
        )
    targets = find_targets(model, config)
    formats = {
        name: _formats(config.weight_format(name, width_of(module)), widths)
        for name, module in targets.items()
    }
    batches = [
        _with_labels(batch, model.device)
        for batch in make_batches(dataset, batch_size, data_collator)
    ]
    ranges = Ranges(estimator=config.range_estimator, p=config.range_p)
    with tqdm(total=len(batches), desc="Gradients", unit="batch", disable=not progress) as bar:
        costs = measure_costs(model, batches, formats, ranges, bar.update)
    joined: dict[str, list[str]] = {}
    for name in costs:
        joined.setdefault(_unit(name, fused), []).append(name)
    chosen = spend(
        {
            unit: {bits: sum(costs[name][bits] for name in names) for bits in widths}
            for unit, names in joined.items()
        },
        {
            unit: sum(targets[name].weight.numel() for name in names)
            for unit, names in joined.items()
        },
        average_bits,
    )
    return {name: chosen[_unit(name, fused)] for name in costs}


def as_pattern(bits: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most common number of bits, and the pattern of the layers that have others."""
    common = Counter(bits.values()).most_common(1)[0][0]
    return common, {name: width for name, width in bits.items() if width != common}


def _formats(format: WeightFormat, widths: Iterable[int]) -> dict[int, WeightFormat]:
    # Rounded integers: what is deployed.
    return {
        bits: replace(format, grid=replace(format.grid, bits=bits), downcast="int")
        for bits in widths
    }


def _unit(name: str, fused: Iterable[Sequence[str]]) -> str:
    """The name that stands for a layer and for those it is joined with."""
    parent, dot, part = name.rpartition(".")
    return next((f"{parent}{dot}{parts[0]}" for parts in fused if part in parts), name)


def _with_labels(batch: Mapping[str, Any], device: torch.device) -> Batch:
    labels = {"labels": batch["input_ids"]} if "input_ids" in batch else {}
    return {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in (labels | {**batch}).items()
    }
