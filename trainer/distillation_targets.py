"""What of the teacher the student is compared with: its predictions, or its last hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .divergence import distillation_loss, hidden_states_loss, rows_at_once, top_predictions_loss
from .teacher_cache import Layout


# By name, a tensor with a row for each token, (batch, tokens, ...).
Recorded = dict[str, Tensor]


class Target(Protocol):
    """What is compared: an output, which is the last hidden states or the logits."""

    name: str
    needs_hidden_states: bool

    def layout(self, config: Any) -> Layout | None:
        """What a cache holds for each token, by the teacher's config; None: it cannot be cached."""

    def record(self, output: Tensor) -> Recorded:
        """What is kept of the teacher's output."""

    def loss(
        self,
        output: Tensor,
        recorded: Recorded,
        scored: Tensor,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """The distance of the student's output from what was recorded; a scalar."""


class Predictions:
    """The probabilities of all tokens."""

    name, needs_hidden_states = "predictions", False

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def layout(self, config: Any) -> Layout | None:
        return None

    def record(self, output: Tensor) -> Recorded:
        return {"logits": output}

    def loss(
        self,
        output: Tensor,
        recorded: Recorded,
        scored: Tensor,
        num_items: Tensor | int | None,
    ) -> Tensor:
        how: Any = {"temperature": self.temperature, "num_items": num_items}
        return distillation_loss(output, recorded["logits"], scored, **how)


class TopPredictions:
    """The probabilities of the ``k`` most probable tokens."""

    name, needs_hidden_states = "predictions", False

    def __init__(self, temperature: float, k: int) -> None:
        self.temperature, self.k = temperature, k

    def layout(self, config: Any) -> Layout | None:
        k = min(self.k, config.vocab_size)
        return {
            "log_probabilities": ((k,), torch.float32),
            "tokens": ((k,), torch.int32),
        }

    def record(self, output: Tensor) -> Recorded:
        rows = output.flatten(0, -2)
        parts = [self._top(some) for some in rows.split(rows_at_once(output.shape[-1]))]
        return {
            name: torch.cat([part[name] for part in parts]).unflatten(0, output.shape[:-1])
            for name in parts[0]
        }

    def _top(self, logits: Tensor) -> Recorded:
        scaled = logits.float() / self.temperature
        top, tokens = scaled.topk(min(self.k, logits.shape[-1]))
        return {
            "log_probabilities": top - scaled.logsumexp(-1, keepdim=True),
            "tokens": tokens.int(),
        }

    def loss(
        self,
        output: Tensor,
        recorded: Recorded,
        scored: Tensor,
        num_items: Tensor | int | None,
    ) -> Tensor:
        how: Any = {"temperature": self.temperature, "num_items": num_items}
        top = recorded["log_probabilities"], recorded["tokens"]
        return top_predictions_loss(output, *top, scored, **how)


class HiddenStates:
    """The input of the output layer."""

    name, needs_hidden_states = "hidden_states", True

    def layout(self, config: Any) -> Layout | None:
        return {"hidden_states": ((config.hidden_size,), torch.bfloat16)}

    def record(self, output: Tensor) -> Recorded:
        return {"hidden_states": output}

    def loss(
        self,
        output: Tensor,
        recorded: Recorded,
        scored: Tensor,
        num_items: Tensor | int | None,
    ) -> Tensor:
        return hidden_states_loss(output, recorded["hidden_states"], scored, num_items=num_items)


class LastHiddenStates:
    """Keeps the last hidden states of a forward pass: those that the loss is made from."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.found is not None:
            return  # a second pass, for outputs that are only shown
        found = getattr(output, "last_hidden_state", None)
        if found is None and isinstance(output, tuple) and isinstance(output[0], Tensor):
            found = output[0]
        self.found = found

    @contextmanager
    def of(self, model: Any) -> Iterator[LastHiddenStates]:
        """Within it, ``found`` is (batch, tokens, width), once ``model`` has run."""
        is_pair = getattr(model.config, "is_encoder_decoder", False)
        backbone: nn.Module = model.get_decoder() if is_pair else model.base_model
        hook = backbone.register_forward_hook(self._keep)
        try:
            yield self
        finally:
            hook.remove()
            self.found = None
