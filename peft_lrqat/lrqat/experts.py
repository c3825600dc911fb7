"""LR-QAT on the weights of experts: factors, scales and grids of its own for each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.experts import DowncastExperts, by_expert
from ..quant import LowRankWeight, fake_quant_linear
from .layer import LRQATLinear


if TYPE_CHECKING:
    from .config import LRQATConfig


class LRQATExperts(LRQATLinear):
    """LR-QAT on a `DowncastExperts`: `lrqat_A` (experts, r, in), or (1, r, in) where the experts
    share it, `lrqat_B` (experts, out, r), `lrqat_scale` (experts * out, groups).

    An expert without tokens costs nothing, and its part of the gradient is zero.
    """

    base_layer: DowncastExperts

    def update_layer(self, adapter_name: str, config: LRQATConfig) -> None:
        super().update_layer(adapter_name, config)
        self.activations[adapter_name] = None

    def _factor_shapes(self, config: LRQATConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts = self.base_layer.experts
        shared = 1 if config.experts_share_a else experts
        height = self.out_features // experts
        return (shared, config.r, self.in_features), (experts, height, config.r)

    def low_rank_weights(self, adapter_name: str) -> Iterator[LowRankWeight]:
        """One for each expert, which together make the rows of the weight."""
        make = self._maker(adapter_name)
        return (make(expert) for expert in range(self.base_layer.experts))

    def _maker(self, adapter_name: str) -> Callable[[int], LowRankWeight]:
        """Makes what decides the integers of one expert.

        Each of the trained tensors is taken apart once: the gradients of all parts are put
        together in one step.
        """
        self._verify_base(adapter_name)
        base = self.base_layer
        phi, zero_point = base.frozen("phi"), base.frozen("zero_point")
        A = self.lrqat_A[adapter_name].unbind()
        B = self.lrqat_B[adapter_name].unbind()
        scale = self.lrqat_scale[adapter_name].unflatten(0, (base.experts, -1)).unbind()

        def make(expert: int) -> LowRankWeight:
            rows = base.rows(expert)
            offset = None if zero_point is None else zero_point[rows]
            return LowRankWeight(
                format=base.format,
                phi=phi[rows],
                zero_point=offset,
                A=A[min(expert, len(A) - 1)],
                B=B[expert],
                scale=base.format.on_grid(scale[expert], offset),
                gamma=self.scaling[adapter_name],
                dtype=base.dtype,
                pass_through=self.pass_through[adapter_name],
            )

        return make

    def forward(self, x: Tensor, counts: Sequence[int], **kwargs: Any) -> Tensor:
        """``x`` (tokens, in), sorted by expert, times each expert's W_hat: (tokens, out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_name = self.adapter_that_runs()
        if self.merged or adapter_name is None:
            return self.base_layer(x, counts)
        base = self.base_layer
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else base.dtype
        infers, make = self._infers(), self._maker(adapter_name)

        def product(expert: int, tokens: Tensor) -> Tensor:
            part = f"{self.name}.{expert}"
            if infers:
                weight = self._inference_weight(adapter_name, tokens, make(expert), part)
                return nn.functional.linear(tokens, weight.to(dtype))
            self._forget_weight(adapter_name, part)
            return fake_quant_linear(tokens, make(expert), None)

        y = by_expert(x.to(dtype), counts, product, self.out_features // base.experts)
        return y if autocast else y.to(x.dtype)

    def _cached_parts(self) -> Iterator[str]:
        return (f"{self.name}.{expert}" for expert in range(self.base_layer.experts))

    def _dense_weight(self) -> Tensor:
        base, adapter_name = self.base_layer, self.adapter_that_runs()
        if self.merged or adapter_name is None:
            return base.dense_weight()
        return self._merged_weight(adapter_name, safe_merge=False)
