"""Which tokens are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


IGNORED = -100  # label of a token that is not scored, as everywhere in transformers


def scored_tokens(
    logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, *, shift: bool
) -> Tensor:
    """Which predictions count: a mask of the shape of ``logits`` without its last dimension.

    Those whose label is not -100; without labels, those of tokens that are not padding. With
    ``shift`` (causal language models) the prediction at t belongs to label t + 1, and the last one
    to none.
    """
    shape = logits.shape[:-1]
    if labels is not None and labels.shape == shape:
        scored = labels != IGNORED
    elif attention_mask is not None and attention_mask.shape == shape:
        scored = attention_mask != 0
    else:
        scored = torch.ones(shape, dtype=torch.bool, device=logits.device)
    if not shift:
        return scored
    return torch.cat([scored[..., 1:], torch.zeros_like(scored[..., :1])], dim=-1)


def has_no_label(batch: Mapping[str, Any] | None) -> bool:
    """Whether no label is scored, so that a mean over the labels is 0 / 0.

    The first label of a row has no prediction.
    """
    labels = (batch or {}).get("labels")
    if not isinstance(labels, Tensor):
        return False
    return bool((labels[..., 1:] if labels.ndim > 1 else labels).eq(IGNORED).all())
