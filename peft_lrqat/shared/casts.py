"""Casts of a whole module, such as ``.half()``, that leave the values of some tensors alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def keep_values(
    fn: Callable[[Tensor], Tensor], *, widen: bool = False
) -> Callable[[Tensor], Tensor]:
    """Wraps the function that ``Module._apply`` gets, so that it moves a tensor and keeps its
    values.

    With ``widen``, a shorter tensor still becomes float32. Never float64: Z would be rounded from
    other digits.
    """

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        wider = widen and result.dtype == torch.float32 and tensor.element_size() < 4
        return result if result.dtype == tensor.dtype or wider else tensor.to(result.device)

    return apply
