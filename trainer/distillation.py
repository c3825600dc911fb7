"""Distillation from the unquantised model: the divergence of the student's predictions from the teacher's, token by token.

    loss = (1 - w) * task loss + w * T^2 * mean over the scored tokens of KL(softmax(teacher / T) || softmax(student / T))

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. LR-QAT replaces the weights of the base
model, so the teacher is a second copy of it; only what both hold frozen and equal, such as the embeddings, is shared.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from peft_lrqat.lrqat.layer import LRQATLayer


IGNORED = -100  # label of a token that is not scored, as everywhere in transformers
CHUNK_ELEMENTS = 1 << 22  # of the logits that are widened to float32 at once


def load_teacher(student: PeftModel) -> PreTrainedModel:
    """The base model of ``student``, once more, from where its config says that it came from."""
    config = student.peft_config[student.active_adapters[0]]
    base, name = student.get_base_model(), config.base_model_name_or_path
    try:
        if not name:
            raise OSError("the adapter's config does not name it")
        teacher, loading = type(base).from_pretrained(
            name,
            config=base.config,
            revision=config.revision,
            dtype=base.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"distillation needs the unquantised model, and `{name}` cannot be loaded ({error}); give it as `teacher_model`"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"`{name}` has no weights for {sorted(loading['missing_keys'])[0]}: a teacher from there would have random ones, such "
            "as those of a fresh classification head. Give a trained model as `teacher_model`"
        )
    return teacher


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError unless the teacher predicts over the student's vocabulary and is not quantised like it."""
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher predicts over {sizes[1]} tokens and the student over {sizes[0]}: their vocabularies differ; the teacher "
            "must be the base model itself, or one with the same tokenizer"
        )
    if any(isinstance(module, LRQATLayer) for module in teacher.modules()):
        raise ValueError(
            "the teacher must be the unquantised model, but it has LR-QAT layers: get_peft_model() changes the model that it is "
            "given. Make the teacher before, with copy.deepcopy(model), or load the base model once more"
        )


@torch.no_grad()
def share_frozen_parameters(student: PeftModel, teacher: nn.Module) -> int:
    """Lets the teacher use the student's memory where both hold the same frozen values; the bytes that this saves."""
    mine = {
        name: p for name, p in student.get_base_model().named_parameters() if not p.requires_grad
    }
    saved = 0
    for name, parameter in teacher.named_parameters():
        other = mine.get(name)
        same = other is not None and (other.shape, other.dtype, other.device) == (
            parameter.shape,
            parameter.dtype,
            parameter.device,
        )
        if same and other.data_ptr() != parameter.data_ptr() and torch.equal(other, parameter):
            parameter.data = other.data
            saved += parameter.numel() * parameter.element_size()
    return saved


@torch.no_grad()
def keep_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the teacher memory of its own for what the student has come to train since they were made to share it."""
    trained = {p.data_ptr() for p in student.parameters() if p.requires_grad}
    for parameter in teacher.parameters():
        if parameter.data_ptr() in trained:
            parameter.data = parameter.data.clone()


def scored_tokens(
    logits: Tensor, labels: Tensor | None, attention_mask: Tensor | None, *, shift: bool
) -> Tensor:
    """Which predictions count, a mask of the shape of ``logits`` without its last dimension.

    Those whose label is not -100; without labels, those of tokens that are not padding. With ``shift`` (causal language
    models) the prediction at t belongs to label t + 1, and the last one to none.
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


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    scored: Tensor,
    *,
    temperature: float,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """``T^2 * KL(teacher || student)`` in nats, summed over the scored tokens and divided by their number; a float32 scalar.

    Args:
        student: logits (..., vocabulary), which get the gradient.
        teacher: logits of the same shape.
        scored: bool (...), see :func:`scored_tokens`.
        num_items: divide by this instead: the scored tokens of all batches that make one step.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the teacher's logits have shape {tuple(teacher.shape)} and the student's {tuple(student.shape)}; the teacher must "
            "have the student's vocabulary and see the same tokens"
        )
    divisor = (
        scored.sum() if num_items is None else torch.as_tensor(num_items, device=student.device)
    )
    flat = (
        student.reshape(-1, student.shape[-1]),
        teacher.reshape(-1, teacher.shape[-1]),
        scored.reshape(-1),
    )
    return _Divergence.apply(*flat, divisor.clamp(min=1), temperature)


class _Divergence(torch.autograd.Function):
    """Forward makes the gradient as well, some tokens at a time: autograd would keep several float32 copies of the logits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        scored: Tensor,
        divisor: Tensor,
        temperature: float,
    ) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total, divisor = torch.zeros((), dtype=dtype, device=student.device), divisor.to(dtype)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        step = max(1, CHUNK_ELEMENTS // student.shape[-1])
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            mask = scored[rows, None]
            log_s = (student[rows].to(dtype) / temperature).log_softmax(-1)
            log_t = (teacher[rows].to(dtype) / temperature).log_softmax(-1)
            p_t = log_t.exp()
            # Where, not times: what is not scored may hold anything, and a token that both exclude has the logit -inf.
            total += torch.where(mask & (p_t != 0), p_t * (log_t - log_s), 0).sum()
            if grad is not None:
                grad[rows] = torch.where(mask, log_s.exp_().sub_(p_t), 0).to(grad.dtype)
        # Divided in backward only, where a scaler of float16 gradients has its say: float16 ends at 6e-8.
        ctx.save_for_backward(grad, temperature / divisor)
        return total * (temperature**2 / divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, factor = ctx.saved_tensors
        return grad * (grad_loss * factor), None, None, None, None
