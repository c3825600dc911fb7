"""Distances between what the unquantised model gives and what the trained one gives.

    predictions    T^2 * KL(softmax(teacher / T) || softmax(student / T))
    hidden states  |student - teacher|^2 / |teacher|^2

Each is a mean over the scored tokens. Hinton et al., "Distilling the Knowledge in a Neural
Network", arXiv 1503.02531; Lee et al., "RILQ", arXiv 2412.01129, for the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


CHUNK_ELEMENTS = 1 << 22  # of the logits that are widened to float32 at once
# For some tokens: terms whose sum is the divergence, and its gradient by the logits / T.
Distance: TypeAlias = tuple[Tensor, Tensor]


def rows_at_once(vocabulary: int) -> int:
    """Tokens whose logits are widened to float32 at once."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    scored: Tensor,
    *,
    temperature: float,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """``T^2 * KL(teacher || student)`` in nats, the mean over the scored tokens; a float32 scalar.

    Args:
        student: logits (..., vocabulary), which get the gradient.
        teacher: logits of the same shape.
        scored: bool (...), see `scored_tokens`.
        num_items: divide the sum by this instead of the number of scored tokens here: by the scored
            tokens of all batches that make one step.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher.shape)} and the student's "
            f"{tuple(student.shape)}; the teacher must have the student's vocabulary and see the "
            "same tokens"
        )
    distance = partial(_from_predictions, temperature=temperature)
    return _divergence(student, scored, temperature, num_items, distance, teacher)


def top_predictions_loss(
    student: Tensor,
    log_probabilities: Tensor,
    tokens: Tensor,
    scored: Tensor,
    *,
    temperature: float,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """`distillation_loss`, from the teacher's most probable tokens; all others count as one.

    Args:
        student: logits (..., vocabulary), which get the gradient.
        log_probabilities: (..., k), of the teacher at ``temperature``.
        tokens: int (..., k), which tokens these are.
        scored, temperature, num_items: as in `distillation_loss`.
    """
    top = log_probabilities, tokens
    return _divergence(student, scored, temperature, num_items, _from_top_predictions, *top)


def hidden_states_loss(
    student: Tensor,
    teacher: Tensor,
    scored: Tensor,
    *,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """The mean over the scored tokens of the relative squared distance; a float32 scalar.

    Args:
        student: hidden states (..., width), which get the gradient.
        teacher: hidden states of the same shape.
        scored, num_items: as in `distillation_loss`.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's hidden states have shape {tuple(teacher.shape)} and the student's "
            f"{tuple(student.shape)}; the teacher must be the base model itself"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    # `where` and not a product: what is not scored may hold anything. To choose the scored tokens
    # would wait for a GPU, to know how many there are.
    mask = scored.unsqueeze(-1)
    student, teacher = (torch.where(mask, states, 0).to(dtype) for states in (student, teacher))
    distance = (student - teacher).square().sum(-1)
    size = teacher.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
    return (distance / size).sum() / _divisor(scored, num_items).to(dtype)


def _divergence(
    student: Tensor,
    scored: Tensor,
    temperature: float,
    num_items: Tensor | int | None,
    distance: Callable[..., Distance],
    *teacher: Tensor,
) -> Tensor:
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (student, *teacher)]
    settings = scored.reshape(-1), _divisor(scored, num_items), temperature, distance
    return _Divergence.apply(flat[0], *settings, *flat[1:])


def _divisor(scored: Tensor, num_items: Tensor | int | None) -> Tensor:
    found = scored.sum() if num_items is None else torch.as_tensor(num_items, device=scored.device)
    return found.clamp(min=1)


def _from_predictions(log_s: Tensor, teacher: Tensor, *, temperature: float) -> Distance:
    log_t = (teacher.to(log_s.dtype) / temperature).log_softmax(-1)
    p_t = log_t.exp()
    # A token that both models exclude has the logit -inf.
    terms = torch.where(p_t != 0, p_t * (log_t - log_s), 0)
    return terms, log_s.exp_().sub_(p_t)


def _from_top_predictions(log_s: Tensor, log_probabilities: Tensor, tokens: Tensor) -> Distance:
    """With ``q`` the student's probabilities, the gradient is ``q - p``: ``p`` shares what the
    teacher gives to the other tokens among them as ``q`` does.
    """
    chosen = tokens.long()
    log_t, log_q = log_probabilities.to(log_s.dtype), log_s.gather(-1, chosen)
    p_t = log_t.exp()
    # What is left for all other tokens; rounding may take it below 0.
    rest_t = (1 - p_t.sum(-1, keepdim=True)).clamp(min=0)
    # Summed and not 1 minus the chosen ones: of a student that is sure, nothing is left by then.
    log_s.scatter_(-1, chosen, -torch.inf)
    rest_q = log_s.logsumexp(-1, keepdim=True)
    terms = torch.where(p_t != 0, p_t * (log_t - log_q), 0)
    others = (rest_t != 0) & (rest_q != -torch.inf)  # False where there are none
    rest = torch.where(others, rest_t * (rest_t.log() - rest_q), 0)
    shares = (log_s - rest_q).exp_().mul_(rest_t).masked_fill_(~others, 0)
    gradient = log_s.exp_().sub_(shares).scatter_(-1, chosen, log_q.exp() - p_t)
    return torch.cat([terms, rest], dim=-1), gradient


class _Divergence(torch.autograd.Function):
    """Forward computes the gradient too, some tokens at a time.

    Autograd would keep several float32 copies of the logits. ``distance`` takes the student's log
    probabilities, which it may overwrite, and rows of ``teacher``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        scored: Tensor,
        divisor: Tensor,
        temperature: float,
        distance: Callable[..., Distance],
        *teacher: Tensor,
    ) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total, divisor = torch.zeros((), dtype=dtype, device=student.device), divisor.to(dtype)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        step = rows_at_once(student.shape[-1])
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            mask = scored[rows, None]
            log_s = (student[rows].to(dtype) / temperature).log_softmax(-1)
            terms, difference = distance(log_s, *(tensor[rows] for tensor in teacher))
            # `where` and not a product: what is not scored may hold anything.
            total += torch.where(mask, terms, 0).sum()
            if grad is not None:
                grad[rows] = torch.where(mask, difference, 0).to(grad.dtype)
        # Divided in backward only, where a scaler of float16 gradients has multiplied: the
        # smallest float16 is 6e-8.
        ctx.save_for_backward(grad, temperature / divisor)
        return total * (temperature**2 / divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, factor = ctx.saved_tensors
        return grad * (grad_loss * factor), *[None] * (len(ctx.needs_input_grad) - 1)
