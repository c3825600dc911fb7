"""GPTQ: columns are rounded one after another, and the others make up for each error.

    H    = 2 * X^T X + damping             X (tokens, in), the inputs of the layer
    e_j  = (w_j - round(w_j)) / U_jj       U the upper Cholesky factor of H^-1
    w_k -= e_j * U_jk                      for all columns k > j

Frantar et al., "GPTQ", arXiv 2210.17323, algorithm 1, without reordering of columns: every format
then holds the result. No weight is trained. What is stored of a column is its value just before it
is rounded, so that phi keeps the fraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..quant import WeightFormat, estimate_range, k_scales
from .calibrate import BlockAtWork, Ranges
from .weights import StoredLinear, store


COLUMNS = 128  # whose errors are spread over the columns behind them in one product


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """How GPTQ rounds a block."""

    damping: float = field(
        default=0.01,
        metadata={"help": "added to the diagonal of H, as a share of its mean; 0.01 in the paper"},
    )

    def __call__(
        self, work: BlockAtWork, report: Callable[[float], None]
    ) -> dict[str, StoredLinear]:
        """Rounds the weights of one block, and returns what is stored of them."""
        hessians: dict[str, list[Tensor]] = {}
        for batch, mask in enumerate(work.masks):
            with ExitStack() as stack:
                for name, linear in work.linears.items():
                    stack.enter_context(_collected(linear, name, mask, hessians))
                work.run(batch)
        for name in work.linears:
            if name not in hessians or not all(h.isfinite().all() for h in hessians[name]):
                raise ValueError(
                    f"GPTQ needs finite inputs of `{name}`, and the calibration data gives it "
                    "none; check the data, or leave the module out of `target_modules`"
                )
        return {
            name: self._round_parts(work.weight(name), hessians[name], format, work.ranges)
            for name, format in work.formats.items()
        }

    def _round_parts(
        self, weight: Tensor, hessians: list[Tensor], format: WeightFormat, ranges: Ranges
    ) -> StoredLinear:
        """Rounds the weights of experts, which lie below one another, or one weight."""
        rounded = [
            self.round(part, hessian, format, ranges)
            for part, hessian in zip(weight.chunk(len(hessians)), hessians, strict=True)
        ]
        zeros = [part.zero_point for part in rounded if part.zero_point is not None]
        return StoredLinear(
            phi=torch.cat([part.phi for part in rounded]),
            scale=torch.cat([part.scale for part in rounded]),
            zero_point=torch.cat(zeros) if zeros else None,
        )

    def round(
        self, weight: Tensor, hessian: Tensor, format: WeightFormat, ranges: Ranges
    ) -> StoredLinear:
        """Rounds one weight.

        Args:
            weight: (out, in).
            hessian: (in, in) float32, the sum of ``x x^T`` over the inputs; any factor will do.
            format: how the result is stored.
            ranges: how the scales of a group are found, when its first column is reached; with
                `k_quant` those of a block, whose groups share a number.
        """
        grid, width = format.grid, weight.shape[1]
        W = weight.float().clone()
        U = _inverse_factor(hessian, self.damping)
        size = width if grid.group_size == -1 else grid.group_size
        groups = grid.num_groups(width)
        span = k_scales.BLOCK if grid.k_quant else size  # columns whose scales are found together
        scale = torch.empty(len(W), groups, device=W.device)
        zero_point = torch.zeros(len(W), groups, dtype=torch.uint8, device=W.device)
        for start in range(0, width, COLUMNS):
            block = slice(start, min(start + COLUMNS, width))
            errors = torch.empty(len(W), block.stop - start, device=W.device)
            for j in range(start, block.stop):
                group = j // size
                if j % span == 0:
                    # Columns of the span behind this block have not had its errors yet.
                    ahead = slice(j, j + span)
                    current = W[:, ahead].clone()
                    if ahead.stop > block.stop and j > start:
                        current[:, block.stop - j :] -= (
                            errors[:, : j - start] @ U[start:j, block.stop : ahead.stop]
                        )
                    found = slice(group, group + span // size)
                    scale[:, found], zero_point[:, found] = estimate_range(
                        current,
                        grid,
                        estimator=ranges.estimator,
                        scale_dtype=format.scale_dtype,
                        p=ranges.p,
                    )
                step, zero = scale[:, group], zero_point[:, group].float() - grid.shift
                # The integers that `store` will keep: storage may move a value across a half.
                units = format.as_stored(W[:, j] / step + zero)
                codes = units.round_().clamp_(grid.qmin, grid.qmax)
                error = (W[:, j] - (codes - zero) * step) / U[j, j]
                W[:, j + 1 : block.stop] -= torch.outer(error, U[j, j + 1 : block.stop])
                errors[:, j - start] = error
            W[:, block.stop :] -= errors @ U[block, block.stop :]
        return store(W, scale, None if grid.symmetric else zero_point, format)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse, (in, in); damped more until there is one."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=1e-30)
    eye = torch.eye(len(hessian), device=hessian.device)
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * mean * eye)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping = max(10 * damping, 1e-6)


@contextmanager
def _collected(
    linear: nn.Module, name: str, mask: Tensor | None, hessians: dict[str, list[Tensor]]
) -> Iterator[None]:
    """Adds up ``x x^T`` of the inputs of ``linear`` while it runs, padding left out.

    Weights of experts get tokens sorted by expert, and how many each has; that of an expert
    without tokens stays zero, and its weight is rounded to nearest.
    """

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.to(x.device)]
        x = x.reshape(-1, x.shape[-1]).float()
        products = [part.T @ part for part in (x.split(args[1]) if len(args) > 1 else [x])]
        before = hessians.get(name)
        hessians[name] = (
            products if before is None else [a + b for a, b in zip(before, products, strict=True)]
        )

    hook = linear.register_forward_pre_hook(add)
    try:
        yield
    finally:
        hook.remove()
