"""The blocks of a model rounded one after another, each on what the rounded ones before it give.

Two versions of the model are computed side by side: the unquantised one, which gives the targets,
and the rounded one. Memory holds the hidden states of both, and what one block needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..quant import Grid, WeightFormat, estimate_range, fake_quantize_tokens
from .replay import Block, Replay, Stream
from .shelf import Shelf
from .weights import StoredLinear, TrainedWeight, rounded


Linear: TypeAlias = nn.Linear | Conv1D
# Batches whose loss is measured before a block is rounded and after.
REPORTED = 4


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """How the first scale and zero point of a weight are found."""

    estimator: str
    p: float

    def find(self, weight: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of a weight (out, in), each (out, groups); no zero point: None."""
        scale, zero_point = estimate_range(
            weight,
            format.grid,
            estimator=self.estimator,
            scale_dtype=format.scale_dtype,
            p=self.p,
        )
        return scale, None if format.grid.symmetric else zero_point


@dataclass(frozen=True, kw_only=True)
class RoundedBlock:
    """One block's result: the stored weights by name of the module, and what rounding costs.

    ``before`` and ``after`` are the `block_loss` of its output, rounded to nearest and in the end.
    """

    weights: dict[str, StoredLinear]
    before: float
    after: float


class BlockAtWork:
    """One block, its weights, and its passes over the calibration data.

    Attributes:
        linears: the modules that are rounded, by name.
        formats: how each is stored.
        ranges: how first scales are found.
        targets: the unquantised block's output, by batch.
        masks: bool (batch, tokens), the tokens that count, by batch; None: all of them.
    """

    def __init__(
        self,
        calibration: Calibration,
        number: int,
        targets: list[Tensor],
    ) -> None:
        self._calibration, self._number, self.targets = calibration, number, targets
        self.ranges = calibration.ranges
        block = calibration.replay.blocks[number]
        prefix = f"{block.name}."
        self.formats = {n: f for n, f in calibration.formats.items() if n.startswith(prefix)}
        self.linears: dict[str, Linear] = {
            name: block.module.get_submodule(name.removeprefix(prefix))  # type: ignore[misc]
            for name in self.formats
        }
        self.masks = [_mask(batch, block) for batch in calibration.replay.batches]

    def weight(self, name: str) -> Tensor:
        """The unquantised weight, (out, in)."""
        linear = self.linears[name]
        weight: Tensor = linear.weight.detach()
        return weight.T if isinstance(linear, Conv1D) else weight

    def first(self, name: str) -> TrainedWeight:
        """A weight with the scale and zero point that range estimation gives it."""
        format, ranges = self.formats[name], self.ranges
        weight = self.weight(name)
        scale, zero_point = ranges.find(weight, format)
        return TrainedWeight(weight, scale, zero_point, format, weight.dtype)

    def run(self, batch: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output for one batch of the rounded model, with ``weights`` (out, in)."""
        return self.run_with_tail(batch, weights or {})[0]

    def run_with_tail(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """The same, and what else the block returns."""
        calibration = self._calibration
        with ExitStack() as stack:
            for name, weight in weights.items():
                linear = self.linears[name]
                dense = weight.T if isinstance(linear, Conv1D) else weight
                stack.enter_context(_in_place_of_weight(linear, dense))
            if calibration.activations is not None:
                for linear in self.linears.values():
                    stack.enter_context(_rounded_inputs(linear, calibration.activations))
            return calibration.replay.run(self._number, batch, calibration.rounded_stream)


Method: TypeAlias = Callable[[BlockAtWork, Callable[[float], None]], dict[str, StoredLinear]]


@contextmanager
def _in_place_of_weight(linear: nn.Module, dense: Tensor) -> Iterator[None]:
    """``linear`` computes with ``dense``, which may have a gradient, instead of its parameter."""
    own = linear._parameters.pop("weight")
    vars(linear)["weight"] = dense
    try:
        yield
    finally:
        del vars(linear)["weight"]
        linear._parameters["weight"] = own


@contextmanager
def _rounded_inputs(linear: nn.Module, grid: Grid) -> Iterator[None]:
    def round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return fake_quantize_tokens(args[0], grid), *args[1:]

    hook = linear.register_forward_pre_hook(round_input)
    try:
        yield
    finally:
        hook.remove()


class Calibration:
    """Rounds the blocks of a model one after another.

    Args:
        replay: the model and its calibration data.
        formats: how each target is stored, by name of the module.
        ranges: how first scales are found.
        method: makes the stored weights of one block.
        activations: the grid of the inputs of the targets; None: they are not rounded.
        shelf: keeps hidden states.
        known: the result of a block that an earlier run has finished, or None.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        replay: Replay,
        formats: Mapping[str, WeightFormat],
        ranges: Ranges,
        method: Method,
        *,
        activations: Grid | None = None,
        shelf: Shelf,
        known: Callable[[str], RoundedBlock | None] = lambda name: None,
        progress: bool = True,
    ) -> None:
        self.replay, self.formats, self.ranges, self.method = replay, formats, ranges, method
        self.activations, self.known = activations, known
        self.shelf, self.progress = shelf, progress
        self.unquantised_stream, self.rounded_stream = replay.stream(), replay.stream()

    @torch.no_grad()
    def run(self) -> Iterator[tuple[Block, RoundedBlock]]:
        """Yields each block with its result, when nothing needs its weights any more."""
        blocks = self.replay.blocks
        with tqdm(total=len(blocks), unit="block", disable=not self.progress) as bar:
            for number, block in enumerate(blocks):
                bar.set_description(block.name)
                self.replay.load(block.name)
                yield block, self._round(number, block, bar)
                bar.update()

    def _round(self, number: int, block: Block, bar: tqdm) -> RoundedBlock:
        batches = range(len(self.replay.batches))
        plain = [self._outputs(number, i, self.unquantised_stream) for i in batches]
        self.replay.advance(number, self.unquantised_stream, plain)
        work = BlockAtWork(self, number, [hidden for hidden, _ in plain])
        result = self.known(block.name)
        before = after = 0.0
        if result is None:
            first = {name: work.first(name)() for name in work.linears}
            before = self._loss(work, [work.run(i, first) for i in batches[:REPORTED]])
            del first
            _check_finite(before, block, "check the data and the model")
            bar.set_postfix_str(f"loss {before:.2e}")
            weights = self.method(work, lambda loss: bar.set_postfix_str(f"loss {loss:.2e}"))
        else:
            at = {name: work.weight(name).device for name in work.linears}
            weights = {name: stored.to(at[name]) for name, stored in result.weights.items()}
        dense = {
            name: rounded(weight, work.formats[name], work.weight(name).dtype)
            for name, weight in weights.items()
        }
        made = []
        for i in batches:
            made.append(self._kept(work.run_with_tail(i, dense)))
            self.rounded_stream.release(i)
        if result is None:
            after = self._loss(work, [hidden for hidden, _ in made[:REPORTED]])
            _check_finite(after, block, "lower the learning rate of the method")
            result = RoundedBlock(weights=weights, before=before, after=after)
        self.replay.advance(number, self.rounded_stream, made)
        return result

    def _outputs(self, number: int, batch: int, stream: Stream) -> tuple[Tensor, Any]:
        """The block's output for one batch, in the place of its input."""
        output = self._kept(self.replay.run(number, batch, stream))
        stream.release(batch)
        return output

    def _kept(self, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        hidden, tail = output
        return self.shelf.keep(hidden), tail

    def _loss(self, work: BlockAtWork, outputs: list[Tensor]) -> float:
        pairs = zip(outputs, work.targets, work.masks, strict=False)
        losses = [block_loss(output, target, mask) for output, target, mask in pairs]
        return float(torch.stack(losses).mean())


def block_loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The squared distance over all tokens, relative to the targets' squares; float32 scalar.

    Not the mean of each token's own ratio: tokens that attention leans on have large hidden states,
    and must come out right.
    ``output`` and ``target`` are (..., width); ``mask`` is bool (...), or None for all tokens.
    """
    output, target = output.float(), target.to(output.device).float()
    if mask is not None:
        # To choose the tokens would wait for a GPU, to know how many there are.
        counted = mask.to(output.device).unsqueeze(-1)
        output, target = torch.where(counted, output, 0), torch.where(counted, target, 0)
    return (output - target).square().sum() / target.square().sum().clamp(min=1e-30)


def _check_finite(loss: float, block: Block, advice: str) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of `{block.name}` on the calibration data is {loss}: its output, rounded or "
            f"not, has NaN or infinite entries, or is too large for its dtype; {advice}"
        )


def _mask(batch: Mapping[str, Any], block: Block) -> Tensor | None:
    """The tokens of a batch that are no padding; None: all of them."""
    of_decoder = block.stack > 0 and "decoder_input_ids" in batch
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()
