"""Keeps W_hat from one call to the next, with what it was made from.

A version counter would miss what is written through `.data`, as averages of weights are; so the
values themselves are compared. On a GPU this happens without the host: a kernel compares and
updates the copies, and the kernel that makes W_hat returns at once where nothing changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import triton_ops
from .low_rank import LowRankWeight, quantized_weight, served


class HeldWeight(NamedTuple):
    """A dense weight and copies of the tensors it was made from."""

    weight: Tensor  # (out, in), in the deployed dtype
    A: Tensor
    B: Tensor
    scale: Tensor
    gamma: float
    fingerprint: int  # of the frozen tensors

    @staticmethod
    def make(w: LowRankWeight, fingerprint: int) -> HeldWeight:
        """Makes W_hat, to be held; on a GPU, `current` will write into its tensors."""
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            A, B, scale = (t.detach().clone() for t in (w.A, w.B, w.scale))
            return HeldWeight(quantized_weight(w), A, B, scale, w.gamma, fingerprint)

    def current(self, w: LowRankWeight, fingerprint: int) -> Tensor | None:
        """W_hat of ``w``; None if the held one cannot serve, or no longer does."""
        live, copies = (w.A, w.B, w.scale), (self.A, self.B, self.scale)
        if (self.gamma, self.fingerprint, self.weight.dtype) != (w.gamma, fingerprint, w.dtype):
            return None
        if not all(_alike(a, b) for a, b in zip(live, copies, strict=True)):
            return None
        if served(w):
            changed = triton_ops.renew_tensors(*live, *copies)
            triton_ops.renew_weight(w.layer, self.weight, changed)
            return self.weight
        return self.weight if all(map(torch.equal, live, copies)) else None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape
