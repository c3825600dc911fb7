"""Distillation from the unquantised model: the divergence of its predictions, token by token.

    loss = (1 - w) * task loss + w * T^2 * mean over the scored tokens of
           KL(softmax(teacher / T) || softmax(student / T))

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. LR-QAT replaces the
weights of the base model, so the teacher is a second copy of it; the two share only what both hold
frozen and equal, such as the embeddings.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.lrqat.low_bit import is_low_bit
from peft_lrqat.shared.card import base_in_words, is_hub_id
from peft_lrqat.shared.words import some

from .labels import scored_tokens
from .part import TrainerPart


logger = logging.get_logger(__name__)
CHUNK_ELEMENTS = 1 << 22  # of the logits that are widened to float32 at once


class Distillation(TrainerPart):
    """Mixes the divergence from a teacher into the training loss, and logs it.

    Evaluation stays the task's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.teacher = None
        self._divergence_sum: Tensor | None = None  # since the last log
        self._divergence_step = 0  # after which the sum began
        self.current_gradient_accumulation_steps = 1  # the Trainer sets it once it trains
        super().__init__(*args, **kwargs)

    def add_teacher(self, teacher: PreTrainedModel | None) -> None:
        """Prepares the teacher, or loads one, where ``distillation_weight`` asks for it."""
        if self.args.distillation_weight == 0:
            if teacher is not None:
                raise ValueError(
                    "`teacher_model` is given, but `distillation_weight` is 0; set it, to 0.5 for "
                    "example"
                )
            return
        teacher = load_teacher(self.model) if teacher is None else teacher
        check_teacher(self.model, teacher)
        teacher.requires_grad_(False).eval()
        if hasattr(teacher.config, "use_cache"):
            teacher.config.use_cache = False  # as the Trainer does for the student
        nn.Module.to(teacher, next(self.model.parameters()).device)
        shared = share_frozen_parameters(self.model, teacher)
        total = sum(p.numel() * p.element_size() for p in teacher.parameters())
        logger.info(
            f"the teacher holds {total:,} bytes and shares {shared:,} of them with the student"
        )
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` may make several attempts in one call of `train`.
        self._divergence_sum = None
        return super()._init_training_state(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Creates the optimizer; what it trains is not shared with the teacher."""
        if self.teacher is not None:
            keep_apart(self.model, self.teacher)
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss; in training with a teacher, mixed with the divergence from it."""
        if self.teacher is None or not model.training:
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        seen = dict(inputs)
        loss, outputs = super().compute_loss(
            model, inputs, True, num_items_in_batch=num_items_in_batch
        )
        divergence = self._divergence(self.teacher, seen, outputs, num_items_in_batch)
        weight = self.args.distillation_weight
        loss = (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _divergence(
        self,
        teacher: nn.Module,
        inputs: dict[str, Any],
        outputs: Any,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        logits = getattr(outputs, "logits", None)
        if logits is None or (torch.is_grad_enabled() and not logits.requires_grad):
            raise ValueError(
                "distillation needs the logits that the loss is made from, and the loss of "
                f"{type(self).__name__} does not return them; use LRQATTrainer, or set "
                "`distillation_weight=0`"
            )
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        # With labels, the teacher would compute a loss too; but an encoder-decoder model makes its
        # decoder's input from them.
        unused = () if base.config.is_encoder_decoder else ("labels",)
        with torch.no_grad():
            teacher_logits = teacher(**{n: v for n, v in inputs.items() if n not in unused}).logits
        scored = scored_tokens(
            logits,
            inputs.get("labels"),
            inputs.get("attention_mask"),
            shift=self._loss_shifts_labels
            or type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        )
        # Where the task's loss is a sum over all tokens of the step, the divergence must be, too.
        summed = (
            (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
            and num_items_in_batch is not None
            and self.loss_is_scaled_for_ga is not False
        )
        divergence = distillation_loss(
            logits,
            teacher_logits,
            scored,
            temperature=self.args.distillation_temperature,
            num_items=num_items_in_batch if summed else None,
        )
        if summed and self.args.average_tokens_across_devices:
            devices = self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu
            divergence = divergence * devices
        share = divergence.detach()
        if not summed:
            share = share / self.current_gradient_accumulation_steps
        if self._divergence_sum is None:
            self._divergence_sum = torch.zeros_like(share)
            self._divergence_step = self.state.global_step
        self._divergence_sum += share
        return divergence

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the mean divergence of the steps since the last log."""
        if "loss" in logs:
            if self._divergence_sum is not None:
                mean = self.accelerator.gather(self._divergence_sum.reshape(1)).mean().item()
                logs["distillation_loss"] = mean / (self.state.global_step - self._divergence_step)
            self._divergence_sum = None
        super().log(logs, start_time)


def load_teacher(student: PeftModel) -> PreTrainedModel:
    """Loads the base model of ``student`` again, from where the adapter's config says.

    Of a low-bit base, the model that it was made from.
    """
    config = student.peft_config[student.active_adapters[0]]
    base: Any = student.get_base_model()
    name, revision, model_config = config.base_model_name_or_path, config.revision, base.config
    if is_low_bit(base):
        name, revision = _unquantised(base), None
        model_config = copy.deepcopy(base.config)
        del model_config.quantization_config
    try:
        if not name:
            raise OSError("the adapter's config does not name it")
        teacher, loading = type(base).from_pretrained(
            name,
            config=model_config,
            revision=revision,
            dtype=base.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"distillation needs the unquantised model, and `{name}` cannot be loaded ({error}); "
            "give it as `teacher_model`"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"`{name}` has no weights for {some(loading['missing_keys'])}: a teacher loaded from "
            "there would have random ones, such as a fresh classification head. Give a trained "
            "model as `teacher_model`"
        )
    return teacher


def _unquantised(base: Any) -> str:
    """The model that a low-bit base was made from; ValueError where only users can know it."""
    made_by = base.config.quantization_config
    name = made_by.made_from
    if made_by.source is not None:
        raise ValueError(
            "distillation needs the unquantised model, but the integers of this low-bit base were "
            f"taken over from `{name}`, which is quantised; give it as `teacher_model`"
        )
    if not name or not (is_hub_id(name) or Path(name).is_absolute()):
        raise ValueError(
            "distillation needs the unquantised model, and this low-bit base was made from "
            f"{base_in_words(name)[0]}; give it as `teacher_model`"
        )
    return name


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError unless the teacher has the student's vocabulary and is not quantised."""
    configs: list[Any] = [model.config for model in (student, teacher)]
    sizes = [config.get_text_config().vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher predicts over {sizes[1]} tokens and the student over {sizes[0]}: their "
            "vocabularies differ; the teacher must be the base model itself, or a model with the "
            "same tokenizer"
        )
    if is_low_bit(teacher):
        raise ValueError(
            "the teacher must be the unquantised model, but it is a low-bit base; give the model "
            "that the base was made from"
        )
    if any(isinstance(module, LRQATLayer) for module in teacher.modules()):
        raise ValueError(
            "the teacher must be the unquantised model, but it has LR-QAT layers: get_peft_model() "
            "changes the model that it is given. Make the teacher before, with "
            "copy.deepcopy(model), or load the base model again"
        )


@torch.no_grad()
def share_frozen_parameters(student: PeftModel, teacher: nn.Module) -> int:
    """Lets the teacher use the student's memory where both hold the same frozen values.

    Returns the bytes that this saves.
    """
    mine = {
        name: p for name, p in student.get_base_model().named_parameters() if not p.requires_grad
    }
    saved = 0
    for name, parameter in teacher.named_parameters():
        other = mine.get(name)
        if other is None or not _alike(other, parameter):
            continue
        if other.data_ptr() != parameter.data_ptr() and torch.equal(other, parameter):
            parameter.data = other.data
            saved += parameter.numel() * parameter.element_size()
    return saved


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@torch.no_grad()
def keep_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the teacher its own memory for shared parameters that the student now trains."""
    trained = {p.data_ptr() for p in student.parameters() if p.requires_grad}
    for parameter in teacher.parameters():
        if parameter.data_ptr() in trained:
            parameter.data = parameter.data.clone()


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
    divisor = (
        scored.sum() if num_items is None else torch.as_tensor(num_items, device=student.device)
    )
    return _Divergence.apply(
        student.reshape(-1, student.shape[-1]),
        teacher.reshape(-1, teacher.shape[-1]),
        scored.reshape(-1),
        divisor.clamp(min=1),
        temperature,
    )


class _Divergence(torch.autograd.Function):
    """Forward computes the gradient too, some tokens at a time.

    Autograd would keep several float32 copies of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
            # `where` and not a product: what is not scored may hold anything, and a token that
            # both models exclude has the logit -inf.
            total += torch.where(mask & (p_t != 0), p_t * (log_t - log_s), 0).sum()
            if grad is not None:
                grad[rows] = torch.where(mask, log_s.exp_().sub_(p_t), 0).to(grad.dtype)
        # Divided in backward only, where a scaler of float16 gradients has multiplied: the
        # smallest float16 is 6e-8.
        ctx.save_for_backward(grad, temperature / divisor)
        return total * (temperature**2 / divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, factor = ctx.saved_tensors
        return grad * (grad_loss * factor), None, None, None, None
