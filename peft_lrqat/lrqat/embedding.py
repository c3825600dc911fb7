"""LR-QAT on a low-bit embedding: a row of W_hat for each token, or all of it for a tied head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..quant import fake_quant_weight, quantized_weight
from .layer import LRQATLinear


if TYPE_CHECKING:
    from .config import LRQATConfig


class LRQATEmbedding(LRQATLinear):
    """LR-QAT on a `DowncastEmbedding`; ``project`` is the output layer that is tied to it."""

    def update_layer(self, adapter_name: str, config: LRQATConfig) -> None:
        super().update_layer(adapter_name, config)
        self.activations[adapter_name] = None  # its input is tokens

    def _base_product(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer.project(x)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows of W_hat for the tokens ``x``, (...) -> (..., in), in the dtype of the base."""
        ids = x
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_name = self.adapter_that_runs()
        if self.merged or adapter_name is None:
            return self.base_layer(ids)
        rows, w = ids.reshape(-1), self.low_rank_weight(adapter_name)
        padding = getattr(self.base_layer, "padding_idx", None)
        some = replace(
            w,
            phi=w.phi[rows],
            zero_point=None if w.zero_point is None else w.zero_point[rows],
            # As in `nn.Embedding`, the row of the padding gets no gradient.
            B=embedding(rows, w.B, padding),
            scale=embedding(rows, w.scale, padding),
        )
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in (w.A, w.B, w.scale))
        y = fake_quant_weight(some) if trained else quantized_weight(some)
        return y.view(*ids.shape, self.in_features)
