"""`LRQATTrainer`, and the mixin that makes an LR-QAT trainer of any transformers or TRL trainer."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer
from transformers.hyperparameter_search import default_hp_search_backend
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_lrqat.lrqat.card import describe_adapter
from peft_lrqat.lrqat.config import LRQATConfig
from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.shared.card import make_publishable

from .arguments import LRQATArguments, LRQATTrainingArguments
from .checkpoint import (
    STAGING,
    check_same_adapters,
    delete_older,
    has_optimizer,
    last_complete_checkpoint,
    move_into_place,
    tidy_up,
    why_incomplete,
    written_whole,
)
from .distillation import (
    IGNORED,
    check_teacher,
    distillation_loss,
    keep_apart,
    load_teacher,
    scored_tokens,
    share_frozen_parameters,
)
from .figures import LRQATCallback
from .finite import first_nonfinite_module, nonfinite_tensors
from .optimizer import clip_by_group, parameter_groups, say_changed_rates


logger = logging.get_logger(__name__)


class LRQATTrainerMixin:
    """What LR-QAT adds to a trainer; put it first: ``class MyTrainer(LRQATTrainerMixin, DPOTrainer)``.

    - Learning rates of their own for A, B and the scales, with whichever optimizer ``args.optim`` names.
    - Gradients are clipped group by group; every group's rate and norm are logged, and the figures of `LRQATCallback`.
    - Checkpoints are renamed into place when they are whole; ``resume_from_checkpoint=True`` takes the last whole one.
    - Distillation from the unquantised model, see :mod:`.distillation`.
    - A loss, gradient or parameter that is not finite stops the run and is never saved.

    Args:
        args: `LRQATTrainingArguments`, or for another trainer its own arguments with `LRQATArguments` before them.
        teacher_model: the unquantised model, for ``distillation_weight`` above 0; left out, it is loaded from where the
            adapter's config says that the base model came from. It takes the memory of the base model, less what the two share.
    """

    def __init__(
        self, *args: Any, teacher_model: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        # The base class calls the overridden methods while it is being built.
        self._staging: Path | None = None
        self._push_when_in_place = False
        self._group_norms: dict[str, Tensor] = {}
        self._divergence_sum: Tensor | None = None
        self._divergence_step = 0
        self.current_gradient_accumulation_steps = 1  # the Trainer sets it once it trains
        self._evaluated: tuple[int, dict[str, float]] = (
            -1,
            {},
        )  # after which step, and with what result
        self._loaded_step: int | None = None  # of the best checkpoint, once it is loaded
        self._trial: Any = None  # of a hyperparameter search
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LRQATArguments):
            raise ValueError(
                f"`args` must be LRQATTrainingArguments, but is {type(self.args).__name__}; for another trainer, put "
                "LRQATArguments before that trainer's own arguments: `class MyConfig(LRQATArguments, DPOConfig)`"
            )
        if not isinstance(self.model, PeftModel) or not any(
            isinstance(m, LRQATLayer) for m in self.model.modules()
        ):
            raise ValueError(
                f"the model ({type(self.model).__name__}) has no LR-QAT layers; wrap it first: "
                "`model = get_peft_model(model, LRQATConfig(target_modules='all-linear'))`"
            )
        self.teacher = self._make_teacher(teacher_model)
        LRQATCallback.attach(self)

    # Optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: LRQATArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the Trainer's, with the parameter groups of LR-QAT, which `create_optimizer` takes for its own."""
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if model is not None:
            kwargs["params"] = parameter_groups(
                model,
                lr=args.learning_rate,
                lr_A=args.A_learning_rate,
                lr_B=args.B_learning_rate,
                scale_lr=args.scale_learning_rate,
                weight_decay=args.weight_decay,
                scale_weight_decay=args.scale_weight_decay,
            )
        return cls, kwargs

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the Trainer's; a checkpoint that brings other rates than were asked for is noticed."""
        made_here = self.optimizer is None
        if self.teacher is not None:
            keep_apart(self.model, self.teacher)
        optimizer = super().create_optimizer(model)
        if not any("name" in group for group in optimizer.param_groups):
            logger.warning(
                "the optimizer was handed in with parameter groups of its own, so that `scale_learning_rate` has no effect. Make "
                "it over `peft_lrqat.trainer.parameter_groups(model, ...)`, or name it by `optim`"
            )
        if made_here:
            say_changed_rates(optimizer)
            for group in optimizer.param_groups:
                if (
                    "warmup_steps" in group
                ):  # of a schedule-free optimizer, which takes no share of all steps for it
                    group["warmup_steps"] = self.args.get_warmup_steps(self.state.max_steps)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """As the Trainer's; where it keeps rates between bounds, one number for all is that of ``args.learning_rate``."""
        made_here = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        given = self.args.lr_scheduler_kwargs or {}
        for name in ("min_lr", "max_lr"):
            bounds = getattr(
                scheduler, f"{name}s", None
            )  # of ReduceLROnPlateau and GreedyLR, one for each group
            if made_here and bounds and not isinstance(given.get(name), list | tuple):
                rates = [
                    group.get("initial_lr", group["lr"])
                    for group in scheduler.optimizer.param_groups
                ]
                shares = [rate / self.args.learning_rate for rate in rates]
                setattr(
                    scheduler,
                    f"{name}s",
                    [bound * share for bound, share in zip(bounds, shares, strict=True)],
                )
        return scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        if self.is_deepspeed_enabled:  # its engine clips by itself, by one norm
            return super()._clip_grad_norm(model)
        return self._clip_groups(self.args.max_grad_norm, self.args.factor_max_grad_norm)

    def _clip_groups(self, max_norm: float, factor_max_norm: float) -> Tensor:
        """Clips group by group; the norm over all groups before that."""
        self.accelerator.unscale_gradients()
        self._group_norms = clip_by_group(self.optimizer.param_groups, max_norm, factor_max_norm)
        return torch.nn.utils.get_total_norm(list(self._group_norms.values()))

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        if grad_norm is None and not self.is_deepspeed_enabled:
            grad_norm = self._clip_groups(math.inf, math.inf)  # nothing is clipped, all is measured
        return super()._get_grad_norm(model, grad_norm)

    # Loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        # What computes a loss may take things out of `inputs`.
        batch = dict(inputs) if isinstance(inputs, Mapping) else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            if not _has_no_label(batch):
                self._stop(f"the loss is {loss.item()}", self._find_nonfinite(batch))
            logger.warning(
                f"a batch of step {self.state.global_step + 1} has no label to score and teaches nothing"
            )
            loss = torch.zeros_like(loss)
        # A scaler of float16 gradients lowers its scale and skips the step by itself.
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            self._check_gradients()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As the Trainer's; while training with a teacher, mixed with the divergence from it. Evaluation stays the task's."""
        if self.teacher is None or not model.training:
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        seen = dict(inputs)
        loss, outputs = super().compute_loss(
            model, inputs, True, num_items_in_batch=num_items_in_batch
        )
        divergence = self._divergence(seen, outputs, num_items_in_batch)
        weight = self.args.distillation_weight
        loss = (1 - weight) * loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _divergence(
        self, inputs: dict[str, Any], outputs: Any, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        logits = getattr(outputs, "logits", None)
        if logits is None or (torch.is_grad_enabled() and not logits.requires_grad):
            raise ValueError(
                f"distillation needs the logits that the loss is made from, and the loss of {type(self).__name__} does not hand "
                "them out; use LRQATTrainer, or set `distillation_weight=0`"
            )
        with torch.no_grad():
            base = self.accelerator.unwrap_model(self.model).get_base_model()
            # Labels would cost the teacher a loss; but an encoder-decoder model makes its decoder's input of them.
            unused = () if base.config.is_encoder_decoder else ("labels",)
            teacher_logits = self.teacher(
                **{n: v for n, v in inputs.items() if n not in unused}
            ).logits
        scored = scored_tokens(
            logits,
            inputs.get("labels"),
            inputs.get("attention_mask"),
            shift=self._loss_shifts_labels
            or type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        )
        # Where the task's loss is a sum over all tokens of the step, so must this one be.
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
            divergence = divergence * (
                self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu
            )
        share = (
            divergence.detach()
            if summed
            else divergence.detach() / self.current_gradient_accumulation_steps
        )
        if self._divergence_sum is None:
            self._divergence_sum, self._divergence_step = (
                torch.zeros_like(share),
                self.state.global_step,
            )
        self._divergence_sum += share
        return divergence

    def _make_teacher(self, teacher: PreTrainedModel | None) -> nn.Module | None:
        if self.args.distillation_weight == 0:
            if teacher is not None:
                raise ValueError(
                    "`teacher_model` is given, but `distillation_weight` is 0; set it, to 0.5 for example"
                )
            return None
        teacher = load_teacher(self.model) if teacher is None else teacher
        check_teacher(self.model, teacher)
        teacher.requires_grad_(False).eval()
        if hasattr(teacher.config, "use_cache"):
            teacher.config.use_cache = False  # as the Trainer does for the student
        teacher = teacher.to(next(self.model.parameters()).device)
        shared = share_frozen_parameters(self.model, teacher)
        total = sum(p.numel() * p.element_size() for p in teacher.parameters())
        logger.info(
            f"the teacher holds {total:,} bytes, {shared:,} of them shared with the student"
        )
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; with each group's gradient norm before clipping, and the divergence from the teacher."""
        if "loss" in logs:
            logs.update(
                {f"grad_norm_{name}": norm.item() for name, norm in self._group_norms.items()}
            )
            if self._divergence_sum is not None:
                mean = self.accelerator.gather(self._divergence_sum.reshape(1)).mean().item()
                logs["distillation_loss"] = mean / (self.state.global_step - self._divergence_step)
            self._divergence_sum = None
        metrics = _quality(logs)
        if metrics:
            # Several sets of one evaluation are logged one by one.
            step, earlier = self._evaluated
            earlier = earlier if step == self.state.global_step else {}
            self._evaluated = self.state.global_step, {**earlier, **metrics}
        super().log(logs, start_time)
        self._keep_record()

    # Divergence

    def _find_nonfinite(self, batch: dict[str, Any] | None) -> str:
        # Not the wrapper of DDP: a forward pass of it waits for the other processes, which have no reason for a second one.
        model = self.accelerator.unwrap_model(self.model)
        named = list(model.named_modules())
        if self.teacher is not None:
            named += self.teacher.named_modules(prefix="teacher")
        names = nonfinite_tensors(
            p for name, module in named for p in module.named_parameters(name, recurse=False)
        )
        if names:
            return f"parameters that are not finite: {_some(names)}"
        if batch is not None:
            module = first_nonfinite_module(
                named, lambda: self.compute_loss(model, self._prepare_inputs(batch))
            )
            if module is not None:
                return f"the first module to put out a value that is not finite: {module}"
        return "all parameters and, in a second pass, all outputs of modules are finite"

    def _check_gradients(self) -> None:
        """Before they are clipped, which multiplies all of a group by what one of them has spoilt."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        grads = {name: p.grad for name, p in named if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        if not math.isfinite(norm):
            names = (
                _some(nonfinite_tensors(grads.items()))
                or "none, their squares are too large for float32"
            )
            self._stop(
                f"the gradient norm is {float(norm)}", f"gradients that are not finite: {names}"
            )

    def _check_parameters(self) -> None:
        names = nonfinite_tensors(
            (n, p) for n, p in self.model.named_parameters() if p.requires_grad
        )
        if names:
            self._stop(
                "there are parameters that are not finite",
                f"these: {_some(names)}",
                self.state.global_step,
            )

    def _stop(self, what: str, where: str, step: int | None = None) -> None:
        step = self.state.global_step + 1 if step is None else step
        last = last_complete_checkpoint(self._get_output_dir(self._trial))
        kept = (
            f"the last checkpoint, {last}, is as it was"
            if last
            else "no checkpoint was written before"
        )
        raise FloatingPointError(
            f"{what} at step {step}; {where}. Nothing of this step was saved; {kept}. A lower learning rate (of the scales first), "
            "a longer warm-up or bfloat16 in place of float16 often helps"
        )

    # Checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the Trainer's; True resumes from the last checkpoint that is whole, and one that is not is refused."""
        self._trial = trial
        if self.args.should_save:
            tidy_up(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"there is no whole checkpoint in {self.args.output_dir} to resume from"
                )
        elif resume_from_checkpoint and (reason := why_incomplete(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} cannot be resumed from: {reason}; `resume_from_checkpoint=True` takes the last "
                "checkpoint that is whole"
            )
        if resume_from_checkpoint and not has_optimizer(resume_from_checkpoint):
            logger.warning(
                f"{resume_from_checkpoint} holds no state of the optimizer (`save_only_model`): its moments and the schedule begin "
                "anew, so that the run will not be the one that was interrupted"
            )
        return super().train(resume_from_checkpoint or None, trial, *args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Of this attempt: with ``auto_find_batch_size`` there may be several in one call of `train`."""
        self._divergence_sum, self._group_norms = None, {}
        self._evaluated, self._loaded_step = (-1, {}), None
        return super()._init_training_state(*args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        check_same_adapters(
            resume_from_checkpoint, self.accelerator.unwrap_model(self.model).peft_config
        )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_parameters()
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / STAGING
        if self.args.should_save:
            tidy_up(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging, self._push_when_in_place = staging, False
        try:
            super()._save_checkpoint(model, trial)
            self._staging = None
            self._name_best_checkpoint(run_dir)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                move_into_place(staging / name, run_dir / name)
        except Exception as error:
            if self.args.should_save:
                tidy_up(run_dir)
            last = last_complete_checkpoint(run_dir)
            raise RuntimeError(
                f"{name} could not be written to {run_dir} ({type(error).__name__}: {error}); nothing of it is left. "
                + (f"Resume from {last}" if last else "There is no checkpoint before it")
                + " when the cause is mended (is the disk full?)"
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self._push_when_in_place:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            delete_older(
                run_dir / name, self.args.save_total_limit, self.state.best_model_checkpoint
            )

    def _name_best_checkpoint(self, run_dir: Path) -> None:
        """The Trainer looked for it where this checkpoint was being written."""
        step = self.state.best_global_step
        if step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if step == self.state.global_step or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        self._keep_record()
        if (
            self._staging is not None or not self.args.should_save
        ):  # moved as a whole later, or nothing to write
            super()._save(output_dir, state_dict)
            return
        self._check_parameters()
        with written_whole(output_dir) as directory:
            card = Path(output_dir) / "README.md"
            if card.exists():  # PEFT and the card of LR-QAT keep what others wrote there
                shutil.copy(card, directory)
            super()._save(str(directory), state_dict)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            delete_older(Path(best), 1, best)  # or the Trainer would, in place
        return super()._finalize_training(trial, *args, **kwargs)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; with optuna, a trial that diverges has failed and the search goes on."""
        backend = kwargs.get("backend") or default_hp_search_backend()
        if getattr(backend, "value", backend) == "optuna":
            kwargs.setdefault("catch", (FloatingPointError,))
        return super().hyperparameter_search(*args, **kwargs)

    # Publishing

    def _keep_record(self) -> None:
        """In the adapter's config, so that whoever saves or publishes the model has it on the card."""
        self._lrqat_config().training_record = self._training_record()

    def _training_record(self) -> dict[str, Any]:
        """How far training went, with which settings, and the last metrics."""
        args = self.args
        # The optimizer's own: a resumed run, or one with an optimizer that was handed in, has other rates than `args`.
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        settings: dict[str, Any] = {
            "optimizer": getattr(args.optim, "value", args.optim),
            **{
                f"learning rate of {group.get('name', f'group {index}')}": group.get(
                    "initial_lr", group["lr"]
                )
                for index, group in enumerate(groups)
            },
            **{
                f"weight decay of {group.get('name', f'group {index}')}": group["weight_decay"]
                for index, group in enumerate(groups)
                if group.get("weight_decay")
            },
            "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            "warm-up steps": args.warmup_steps,
            "gradient norm per group, at most": args.max_grad_norm,
            "gradient norm of A and of B, at most": args.factor_max_grad_norm,
            "sequences per step": self.get_total_train_batch_size(args),
            "seed": args.seed,
        }
        if args.distillation_weight:
            settings["distillation weight"] = args.distillation_weight
            settings["distillation temperature"] = args.distillation_temperature
        step, metrics = self._evaluated
        return {
            "steps": self._loaded_step or self.state.global_step,
            "settings": {
                name: float(value) if isinstance(value, Tensor) else value
                for name, value in settings.items()
            },
            # Not those of an evaluation that other weights went through.
            "metrics": metrics if step == self.state.global_step else {},
        }

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:  # that one loads the adapter `default` into whichever is active, and no other
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        self._loaded_step = self.state.best_global_step
        logs = [log for log in self.state.log_history if log.get("step") == self._loaded_step]
        self._evaluated = (
            self.state.global_step,
            {k: v for log in logs for k, v in _quality(log).items()},
        )
        self._keep_record()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's own, and after it the section of LR-QAT, which that one does not know."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and os.path.isdir(self.args.output_dir):
            describe_adapter(self.args.output_dir, self._lrqat_config())
            make_publishable(self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if (
            self._staging is not None
        ):  # an upload in the background must not have its files moved away
            self._push_when_in_place = True
            return
        card = Path(checkpoint_folder) / "README.md"
        if self.is_world_process_zero() and card.exists():
            make_publishable(checkpoint_folder)  # which may be uploaded as well
            shutil.copy(card, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _lrqat_config(self) -> LRQATConfig:
        model = self.accelerator.unwrap_model(self.model)
        return model.peft_config[model.active_adapters[0]]


class LRQATTrainer(LRQATTrainerMixin, Trainer):
    """`transformers.Trainer` for LR-QAT: takes `LRQATTrainingArguments`, and otherwise what a Trainer takes.

    Example:
        ```py
        model = get_peft_model(model, LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", bits=3))
        args = LRQATTrainingArguments("out", max_steps=1000, scale_learning_rate=1e-4)
        trainer = LRQATTrainer(model=model, args=args, train_dataset=dataset)
        trainer.train()
        ```
    """

    args: LRQATTrainingArguments


def _has_no_label(batch: dict[str, Any] | None) -> bool:
    """Whether no label is scored, so that a mean over them is 0 / 0; the first of a row has no prediction."""
    labels = (batch or {}).get("labels")
    if not isinstance(labels, Tensor):
        return False
    return bool((labels[..., 1:] if labels.ndim > 1 else labels).eq(IGNORED).all())


def _quality(logs: dict[str, Any]) -> dict[str, float | str]:
    """The metrics of an evaluation, without its speed."""
    return {
        # JSON has no infinite numbers.
        key: value if math.isfinite(value) else str(value)
        for key, value in logs.items()
        if key.startswith("eval_")
        and not key.endswith(("_runtime", "_per_second"))
        and isinstance(value, int | float)
    }


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
