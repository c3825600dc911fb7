"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .labels import IGNORED
from .metrics import perplexity_of, preprocess_logits_for_metrics, scored_windows, standard_error


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate against a reference, on the scored tokens of one text.

    Standard errors come from the spread of the windows, and are None for one window.
    """

    perplexity: float
    nats_per_token: float
    nats_difference: float  # candidate minus reference, per token
    nats_difference_error: float | None
    kl_mean: float  # KL(reference || candidate), nats
    kl_error: float | None
    kl_99: float  # 99 of 100 tokens have less
    same_top: float  # share of the tokens where both give most to the same one
    same_top_error: float | None
    tokens: int


@torch.no_grad()
def compare_models(
    reference: nn.Module,
    candidate: nn.Module,
    input_ids: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> Comparison:
    """Perplexity of ``candidate``, and how far its predictions are from those of ``reference``.

    Both models see the same windows of ``input_ids`` (T,), those of `evaluate_perplexity`. Both are
    in memory at once; nothing is kept of a batch but three numbers a token. The divergence is over
    the whole vocabulary, in float32.

    Raises:
        ValueError: the vocabularies differ, or the window does not fit.

    Example:
        ```py
        from peft_lrqat.trainer import compare_models

        found = compare_models(unquantised, trained, tokens, window=512)
        print(found.kl_mean, found.same_top)
        ```
    """
    options: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size}
    theirs = scored_windows(reference, input_ids, **options, progress=False)
    mine = scored_windows(candidate, input_ids, **options, progress=progress)
    kept: list[np.ndarray] = []  # (tokens, 4) of each window
    for (expected, labels), (found, _) in zip(theirs, mine, strict=True):
        if expected.shape != found.shape:
            raise ValueError(
                f"both models must have one vocabulary, but the reference has {expected.shape[-1]}"
                f" logits a token and the candidate {found.shape[-1]}"
            )
        expected, labels = expected.to(found.device), labels.to(found.device)
        nats = [preprocess_logits_for_metrics(logits, labels) for logits in (found, expected)]
        rows = [_apart(a, b) for a, b in zip(expected[:, :-1], found[:, :-1], strict=True)]
        divergence, same = (torch.stack(column) for column in zip(*rows, strict=True))
        figures = torch.stack([*nats, divergence, same.float()], -1).cpu().double().numpy()
        scored = (labels[:, 1:] != IGNORED).cpu().numpy()
        kept += [row[mask] for row, mask in zip(figures, scored, strict=True)]
    tokens = np.concatenate(kept)
    counts = np.array([len(row) for row in kept])
    sums = np.stack([row.sum(0) for row in kept])
    mean = tokens.mean(0)
    return Comparison(
        perplexity=perplexity_of(mean[0]),
        nats_per_token=float(mean[0]),
        nats_difference=float(mean[0] - mean[1]),
        nats_difference_error=standard_error(sums[:, 0] - sums[:, 1], counts),
        kl_mean=float(mean[2]),
        kl_error=standard_error(sums[:, 2], counts),
        kl_99=float(np.quantile(tokens[:, 2], 0.99)),
        same_top=float(mean[3]),
        same_top_error=standard_error(sums[:, 3], counts),
        tokens=len(tokens),
    )


def _apart(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """For one window's logits, (T, vocabulary): the divergence and whether the first choices agree.

    (T,) float32 and (T,) bool; a window at a time, so that little is widened to float32.
    """
    same = expected.argmax(-1) == found.argmax(-1)
    first, second = (F.log_softmax(logits.float(), dim=-1) for logits in (expected, found))
    return F.kl_div(second, first, reduction="none", log_target=True).sum(-1), same
