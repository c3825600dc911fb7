"""Distillation from the unquantised model, which is there during training or was there before it.

    loss = (1 - w) * task loss + w * mean over the scored tokens of the distance from the teacher

LR-QAT replaces the weights of the base model, so the teacher is a second copy of it. While both
are in memory they share what both hold frozen and equal, such as the embeddings. With a cache, the
teacher sees each text once, before the first step, and goes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy
import torch
from accelerate.utils import release_memory
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .distillation_targets import (
    HiddenStates,
    LastHiddenStates,
    Predictions,
    Recorded,
    Target,
    TopPredictions,
)
from .labels import scored_tokens
from .part import TrainerPart
from .teacher import (
    check_teacher,
    keep_apart,
    load_teacher,
    share_frozen_parameters,
    teacher_key,
)
from .teacher_cache import TeacherCache
from .texts import Text, texts_of


logger = logging.get_logger(__name__)


class Distillation(TrainerPart):
    """Mixes the distance from a teacher into the training loss, and logs it.

    Evaluation stays the task's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.teacher = None
        self._given_teacher: PreTrainedModel | None = None  # by the caller
        self._target: Target | None = None
        self._cache: TeacherCache | None = None
        self._filled = False  # whether this run has looked for what the cache lacks
        self._divergence_sum: Tensor | None = None  # since the last log
        self._divergence_step = 0  # after which the sum began
        self.current_gradient_accumulation_steps = 1  # the Trainer sets it once it trains
        super().__init__(*args, **kwargs)

    def add_teacher(self, teacher: PreTrainedModel | None) -> None:
        """Prepares the teacher or what it gave earlier, where ``distillation_weight`` asks for it.

        Without a cache the teacher is here at once, and stays.
        """
        args = self.args
        if args.distillation_weight == 0:
            if teacher is not None:
                raise ValueError(
                    "`teacher_model` is given, but `distillation_weight` is 0; set it, to 0.5 for "
                    "example"
                )
            return
        if args.distillation_target == HiddenStates.name:
            self._target = HiddenStates()
        elif args.distillation_cache is None:
            self._target = Predictions(args.distillation_temperature)
        else:
            self._target = TopPredictions(args.distillation_temperature, args.distillation_top_k)
        if self._target.needs_hidden_states and args.n_gpu > 1:
            raise ValueError(
                "`distillation_target='hidden_states'` does not work with DataParallel; start one "
                "process for each GPU, with `torchrun` or `accelerate launch`"
            )
        if teacher is not None:
            check_teacher(self.model, teacher)
        self._given_teacher = teacher
        if args.distillation_cache is None:
            self._call_teacher()
        else:
            self._cache = self._open_cache(args.distillation_cache)

    def _open_cache(self, folder: str) -> TeacherCache:
        assert self._target is not None
        base: Any = self.model.get_base_model()
        if base.config.is_encoder_decoder:
            raise ValueError(
                "`distillation_cache` does not hold what encoder-decoder models give; leave it out"
            )
        layout = self._target.layout(base.config.get_text_config())
        assert layout is not None
        settings: dict[str, Any] = {
            "teacher": teacher_key(self.model, self._given_teacher),
            "target": self._target.name,
        }
        if not self._target.needs_hidden_states:
            settings["temperature"] = self.args.distillation_temperature
        return TeacherCache(folder, settings, layout)

    def _call_teacher(self) -> nn.Module:
        """The teacher, loaded where it is not here."""
        if self.teacher is not None:
            return self.teacher
        teacher = self._given_teacher
        if teacher is None:
            teacher = load_teacher(self.model)
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
        return self.teacher

    def _dismiss_teacher(self) -> None:
        """Gives the memory of the teacher back, also where a whole cache left it nothing to do."""
        if self.teacher is None and self._given_teacher is None:
            return
        # `prepare_model` keeps all that it has seen, and only forgets everything at once.
        self.accelerator._models = [m for m in self.accelerator._models if m is not self.teacher]
        self.teacher = self._given_teacher = None
        release_memory()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` may make several attempts in one call of `train`.
        self._divergence_sum, self._filled = None, False
        return super()._init_training_state(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._cache is not None and not self._filled:
            self._filled = True
            if self.state.global_step < self.state.max_steps:
                self._fill(self._cache, kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def _fill(self, cache: TeacherCache, epoch: int) -> None:
        """Computes what the cache lacks of the texts of this run, and lets the teacher go."""
        accumulated = self.args.gradient_accumulation_steps
        left = self.state.max_steps * accumulated
        batches = self.get_train_dataloader()
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        with unchanged_random_state():
            total = min(left, len(batches)) if has_length(batches) else left
            bar = tqdm(
                islice(batches, left),
                total=total,
                desc="teacher",
                unit="batch",
                disable=self.args.disable_tqdm or not self.is_local_process_zero(),
            )
            for batch in bar:
                inputs = self._prepare_inputs(batch)
                texts = texts_of(inputs)
                if not all(text.key in cache for text in texts):
                    self._compute(cache, inputs, texts)
        self._dismiss_teacher()
        self.accelerator.wait_for_everyone()
        cache.refresh()
        logger.info(f"{cache.place} holds {cache.bytes:,} bytes of {len(cache):,} texts")

    def _compute(self, cache: TeacherCache, inputs: dict[str, Any], texts: list[Text]) -> Recorded:
        recorded = self._ask_teacher(inputs)
        for text in texts:
            cache.add(text.key, {name: t[text.row][text.tokens] for name, t in recorded.items()})
        return recorded

    def _ask_teacher(self, inputs: dict[str, Any]) -> Recorded:
        """What the teacher gives for a batch."""
        assert self._target is not None
        teacher = self._call_teacher()
        whole: Any = self.accelerator.unwrap_model(teacher)
        # With labels, the teacher would compute a loss too; but an encoder-decoder model makes its
        # decoder's input from them.
        unused = () if whole.config.is_encoder_decoder else ("labels",)
        with torch.no_grad(), self._hidden_states(whole) as hidden:
            output = teacher(**{n: v for n, v in inputs.items() if n not in unused})
            compared = output.logits if hidden is None else self._found(hidden)
        return self._target.record(compared)

    def _hidden_states(self, model: Any) -> AbstractContextManager[LastHiddenStates | None]:
        assert self._target is not None
        return LastHiddenStates().of(model) if self._target.needs_hidden_states else nullcontext()

    def _found(self, hidden: LastHiddenStates) -> Tensor:
        if hidden.found is None:
            raise ValueError(
                "`distillation_target='hidden_states'` needs the last hidden states, and "
                f"{type(self.model.get_base_model()).__name__} does not give them; use "
                "'predictions'"
            )
        return hidden.found

    def _recorded(self, inputs: dict[str, Any]) -> Recorded:
        """What the teacher gives for a batch, or gave."""
        cache = self._cache
        if cache is None:
            return self._ask_teacher(inputs)
        texts = texts_of(inputs)
        if not all(text.key in cache for text in texts):
            if self.teacher is None:
                logger.warning_once(
                    "the teacher has not seen some of these texts, because the data set or its "
                    "collator changes them; it is loaded again and stays in memory"
                )
                keep_apart(self.model, self._call_teacher())
            return self._compute(cache, inputs, texts)
        shape = inputs["input_ids"].shape
        found = {
            name: torch.zeros(*shape, *tail, dtype=dtype)
            for name, (tail, dtype) in cache.layout.items()
        }
        for text in texts:
            for name, tensor in cache.get(text.key).items():
                found[name][text.row][text.tokens] = tensor
        return {name: tensor.to(inputs["input_ids"].device) for name, tensor in found.items()}

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
        """The task's loss; in training with a teacher, mixed with the distance from it."""
        if self._target is None or not model.training:
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        seen = dict(inputs)
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        with self._hidden_states(base) as hidden:
            # TRL's trainers make the logits in a second pass, if they are asked for outputs.
            wants_outputs = return_outputs or hidden is None
            made: Any = super().compute_loss(
                model, inputs, wants_outputs, num_items_in_batch=num_items_in_batch
            )
            states = None if hidden is None else self._found(hidden)
        loss, outputs = made if wants_outputs else (made, None)
        divergence = self._divergence(seen, outputs, states, num_items_in_batch)
        weight = self.args.distillation_weight
        loss = (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _divergence(
        self,
        inputs: dict[str, Any],
        outputs: Any,
        hidden_states: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        assert self._target is not None
        logits: Any = getattr(outputs, "logits", None)
        if hidden_states is None and (
            logits is None or (torch.is_grad_enabled() and not logits.requires_grad)
        ):
            raise ValueError(
                "distillation from predictions needs the logits that the loss is made from, and "
                f"the loss of {type(self).__name__} does not return them; use LRQATTrainer, or set "
                "`distillation_target='hidden_states'`, or `distillation_weight=0`"
            )
        compared = logits if hidden_states is None else hidden_states
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        scored = scored_tokens(
            compared,
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
        divergence = self._target.loss(
            compared, self._recorded(inputs), scored, num_items_in_batch if summed else None
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
        """Logs, with the mean distance of the steps since the last log."""
        if "loss" in logs:
            if self._divergence_sum is not None:
                mean = self.accelerator.gather(self._divergence_sum.reshape(1)).mean().item()
                logs["distillation_loss"] = mean / (self.state.global_step - self._divergence_step)
            self._divergence_sum = None
        super().log(logs, start_time)


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """What is drawn within is drawn again after it."""
    python, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpy_state)
