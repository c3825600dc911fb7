"""Perplexity of causal language models, in the Trainer and over fixed or sliding windows."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import EvalPrediction

from .labels import IGNORED


class Perplexity(evaluate.Metric):
    """``exp`` of the mean negative log-likelihood (nats) of all scored tokens.

    Every token has the same weight. ``predictions`` are rows of negative log-likelihoods,
    ``references`` rows of labels of the same length; a token whose label is -100 is not scored.
    Batches add up through ``add_batch``; nothing is fetched from a hub.

    >>> metric = Perplexity(keep_in_memory=True)
    >>> metric.compute(predictions=[[0.0, 2.0, 9.0]], references=[[5, 7, -100]])
    {'perplexity': 2.718281828459045, 'nats_per_token': 1.0, 'tokens': 2}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity from per-token negative log-likelihoods.",
            citation="",
            inputs_description="predictions: rows of nats; references: rows of labels, -100 where "
            "not scored.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[int]]
    ) -> dict[str, float | int]:
        lengths = [
            (len(nats), len(labels)) for nats, labels in zip(predictions, references, strict=True)
        ]
        for row, (count, labels) in enumerate(lengths):
            if count != labels:
                raise ValueError(
                    f"every label needs one negative log-likelihood, but row {row} has {count} of "
                    f"them for {labels} labels; shift the labels as "
                    "`preprocess_logits_for_metrics` does"
                )
        nats = np.concatenate([np.asarray(row, dtype=np.float64) for row in predictions])
        scored = np.concatenate([np.asarray(row, dtype=np.int64) for row in references]) != IGNORED
        if not scored.any():
            raise ValueError(
                "perplexity needs at least one scored token, but every label is -100; check the "
                "padding mask"
            )
        mean = nats[scored].mean()
        return {
            "perplexity": perplexity_of(mean),
            "nats_per_token": float(mean),
            "tokens": int(scored.sum()),
        }


def perplexity_of(nats: float) -> float:
    """``exp`` of the mean nats per token; a ruined model may exceed 709, and has inf."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def preprocess_logits_for_metrics(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, float32.

    (batch, T, vocabulary) and (batch, T) -> (batch, T - 1). Column t belongs to label t + 1: the
    first token has no prediction, and the last prediction has no token. With this hook a Trainer
    keeps one number per token instead of the logits. A position whose label is -100 holds 0.
    """
    if isinstance(logits, tuple):  # a model that also returns hidden states or a cache
        logits = logits[0]
    # Row by row, so that only one row of logits is ever copied to float32.
    rows = zip(logits[:, :-1], labels[:, 1:].to(logits.device), strict=True)
    return torch.stack(
        [
            F.cross_entropy(row.float(), gold, ignore_index=IGNORED, reduction="none")
            for row, gold in rows
        ]
    )


def compute_metrics(prediction: EvalPrediction) -> dict[str, float | int]:
    """Perplexity for a Trainer that was also given ``preprocess_logits_for_metrics``.

    Give the Trainer both, each under its own name: ``compute_metrics=compute_metrics`` and
    ``preprocess_logits_for_metrics=preprocess_logits_for_metrics``.
    """
    nats: Any = prediction.predictions
    labels: Any = prediction.label_ids
    if not isinstance(nats, list):  # of batches, with `eval_do_concat_batches=False`
        nats, labels = [nats], [labels]
    metric = Perplexity(keep_in_memory=True)
    for batch, gold in zip(nats, labels, strict=True):
        if np.ndim(batch) != 2:
            raise ValueError(
                f"`compute_metrics` takes (rows, tokens - 1) nats, but got {np.ndim(batch)} "
                "dimensions; pass `preprocess_logits_for_metrics=preprocess_logits_for_metrics` to "
                "the Trainer too"
            )
        metric.add_batch(predictions=batch, references=np.asarray(gold)[:, 1:])
    return metric.compute()


def evaluate_perplexity(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of one long text, a row of token ids (T,), in windows of ``window`` tokens.

    ``stride`` None or equal to ``window``: windows do not overlap, the first token of each is not
    scored, and an incomplete last window is dropped. This is what papers on quantisation report,
    and what a Trainer computes on blocks.

    ``stride`` below ``window``: each window starts ``stride`` tokens after the one before, and
    scores only the tokens that no earlier window scored; the last window may be shorter. Every
    token but the first is scored exactly once, with at least ``window - stride`` tokens of context
    (after the first window). This is the procedure of the transformers documentation, "Perplexity
    of fixed-length models"; its figures are lower, so always state window and stride.

    Returns a dict: ``perplexity``; ``nats_per_token``, its logarithm; ``tokens``, those scored; and
    ``nats_standard_error`` of that logarithm, from the spread of the windows, None for one window.
    """
    windows = scored_windows(
        model,
        input_ids,
        window=window,
        stride=stride,
        batch_size=batch_size,
        progress=progress,
    )
    sums, counts = [], []
    for logits, labels in windows:
        nats = preprocess_logits_for_metrics(logits, labels).cpu().numpy()
        sums += nats.sum(-1, dtype=np.float64).tolist()  # 0 where not scored
        counts += (labels[:, 1:] != IGNORED).sum(-1).tolist()
    return summary(np.array(sums), np.array(counts))


def summary(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """What `evaluate_perplexity` returns, from the nats and the scored tokens of each window."""
    mean = sums.sum() / counts.sum()
    return {
        "perplexity": perplexity_of(mean),
        "nats_per_token": float(mean),
        "tokens": int(counts.sum()),
        "nats_standard_error": standard_error(sums, counts),
    }


def standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Of a mean over all tokens, ``sum(sums) / sum(counts)``; None for one window alone.

    Args:
        sums: float64 (windows,), of the tokens of a window.
        counts: int (windows,), tokens of a window. Those of one window depend on each other, so
            that windows, not tokens, are what is drawn: Cochran, "Sampling Techniques", the ratio
            of two sums.
    """
    n = len(sums)
    if n < 2:
        return None
    with np.errstate(invalid="ignore"):  # a ruined model has infinite nats
        apart = sums - sums.sum() / counts.sum() * counts
        return float(np.sqrt(n / (n - 1) * np.square(apart).sum()) / counts.sum())


def scored_windows(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of each batch of windows, (batch, T, vocabulary), and its labels, (batch, T).

    The windows are those of `evaluate_perplexity`. A token that is not scored has the label -100.
    The model is in eval mode and no gradient is kept while the iterator runs.
    """
    check_window(model, input_ids, window=window, stride=stride, batch_size=batch_size)
    spans = list(spans_of(len(input_ids), window, stride))
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        bar = tqdm(
            total=len(spans), desc="perplexity", unit="window", leave=False, disable=not progress
        )
        with bar:
            for batch in _batches(spans, batch_size):
                tokens = torch.stack([input_ids[start:end] for start, end, _ in batch])
                tokens = tokens.to(device)
                labels = tokens.clone()
                for row, (start, _, first_scored) in zip(labels, batch, strict=True):
                    row[: first_scored - start] = IGNORED
                with torch.no_grad():
                    logits = model(input_ids=tokens, use_cache=False).logits
                yield logits, labels
                bar.update(len(batch))
    finally:
        model.train(was_training)


def check_window(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 1,
) -> None:
    """ValueError unless the windows fit the model and the text; `evaluate_perplexity` checks it."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but it is {batch_size}")
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    check_spans(input_ids, window=window, stride=stride, context=context)


def check_spans(
    input_ids: Tensor, *, window: int, stride: int | None = None, context: int | None = None
) -> None:
    """ValueError unless the windows fit the text and the ``context`` of a model."""
    if input_ids.ndim != 1:
        raise ValueError(
            "`input_ids` must be one row of token ids, but its shape is "
            f"{tuple(input_ids.shape)}; pass `input_ids[0]` for a batch of one text"
        )
    if window < 2:
        raise ValueError(
            "`window` must be at least 2 (the first token of a window is not scored), but it is "
            f"{window}"
        )
    if stride is not None and not 1 <= stride <= window:
        raise ValueError(
            f"`stride` must be between 1 and `window`, but it is {stride} with a window of {window}"
        )
    if context is not None and window > context:
        raise ValueError(
            f"`window` must fit in the context of the model, but {window} is more than its "
            f"{context} tokens (`max_position_embeddings`); use {context} or less"
        )
    if len(input_ids) < window:
        raise ValueError(
            f"the text must fill at least one window, but it has {len(input_ids)} tokens and the "
            f"window is {window}; use a longer text or a smaller window"
        )


Span = tuple[int, int, int]  # start and end of a window, and its first token that is scored


def spans_of(length: int, window: int, stride: int | None) -> Iterator[Span]:
    """Windows over ``length`` tokens, see `evaluate_perplexity`; the first token is not scored."""
    if stride is None or stride == window:
        yield from (
            (start, start + window, start + 1) for start in range(0, length - window + 1, window)
        )
        return
    scored = 1
    for start in range(0, length, stride):
        end = min(start + window, length)
        yield start, end, scored
        scored = end
        if end == length:
            return


def _batches(spans: list[Span], batch_size: int) -> Iterator[list[Span]]:
    """Consecutive windows of the same length, at most ``batch_size`` at a time."""
    for _, group in groupby(spans, key=lambda span: span[1] - span[0]):
        same = list(group)
        yield from (same[i : i + batch_size] for i in range(0, len(same), batch_size))
