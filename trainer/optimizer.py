"""Parameter groups with their own learning rates for A, B and the scales, clipped one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.utils import logging

from peft_lrqat.shared.saved import check_trained_is_saved

from .part import TrainerPart
from .rates import FACTORS, GROUPS, check_rates, setting_name


logger = logging.get_logger(__name__)
# What a checkpoint's optimizer brings, and a resumed run may have asked for otherwise.
WATCHED = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


class GroupedOptimizer(TrainerPart):
    """The optimizer works on `parameter_groups`, and each group is clipped by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._group_norms: dict[str, Tensor] = {}  # of the last step, before clipping
        super().__init__(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` may make several attempts in one call of `train`.
        self._group_norms = {}
        return super()._init_training_state(*args, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """The Trainer's choice, with the parameter groups of LR-QAT for `create_optimizer`."""
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
        """Creates the optimizer; refuses to train what would not be saved."""
        check_trained_is_saved(self.accelerator.unwrap_model(self.model))
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not any("name" in group for group in optimizer.param_groups):
            logger.warning(
                "the optimizer was handed in with its own parameter groups, so "
                "`scale_learning_rate` has no effect. Make it from "
                "`peft_lrqat.trainer.parameter_groups(model, ...)`, or name it in `optim`"
            )
        if made_here:
            say_changed_rates(optimizer)
            for group in optimizer.param_groups:
                # Schedule-free optimizers do not take a share of all steps as their warm-up.
                if "warmup_steps" in group:
                    group["warmup_steps"] = self.args.get_warmup_steps(self.state.max_steps)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Creates the schedule.

        Where it keeps rates within bounds, a single number is the bound of ``learning_rate``, and
        each group's bound has the same ratio to the group's own rate.
        """
        made_here = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        given: Any = self.args.lr_scheduler_kwargs or {}
        for name in ("min_lr", "max_lr"):
            # ReduceLROnPlateau and GreedyLR have one bound for each group.
            bounds = getattr(scheduler, f"{name}s", None)
            if made_here and bounds and not isinstance(given.get(name), list | tuple):
                rates = [
                    group.get("initial_lr", group["lr"])
                    for group in scheduler.optimizer.param_groups
                ]
                shares = [rate / self.args.learning_rate for rate in rates]
                scaled = [bound * share for bound, share in zip(bounds, shares, strict=True)]
                setattr(scheduler, f"{name}s", scaled)
        return scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with each group's gradient norm before clipping."""
        if "loss" in logs:
            logs.update(
                {setting_name(name, "grad_norm"): n.item() for name, n in self._group_norms.items()}
            )
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        if self.is_deepspeed_enabled:  # its engine clips, with one norm over everything
            return super()._clip_grad_norm(model)
        return self._clip_groups(self.args.max_grad_norm, self.args.factor_max_grad_norm)

    def _clip_groups(self, max_norm: float, factor_max_norm: float) -> Tensor:
        """Clips group by group; returns the norm over all groups before that."""
        assert self.optimizer is not None
        self.accelerator.unscale_gradients()
        self._group_norms = clip_by_group(self.optimizer.param_groups, max_norm, factor_max_norm)
        return torch.nn.utils.get_total_norm(list(self._group_norms.values()))

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        if grad_norm is None and not self.is_deepspeed_enabled:
            grad_norm = self._clip_groups(math.inf, math.inf)  # measures, and clips nothing
        return super()._get_grad_norm(model, grad_norm)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    scale_lr: float,
    lr_A: float | None = None,
    lr_B: float | None = None,
    weight_decay: float = 0.0,
    scale_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, in this order; empty groups are left out.

    ``A`` and ``B``, the factors, at ``lr_A`` and ``lr_B`` (``lr`` where None); ``scales`` at
    ``scale_lr``; then everything else that is trained, such as a classification head, at ``lr``:
    ``other``, and ``other_no_decay`` for norms and biases. Each group has its ``name``, and its
    peak rate also as ``initial_lr``.

    A step of 5e-3 is small for a factor of the low-rank product, whose unit is a grid step, but
    destroys a scale, which is itself about 1e-2. LR-QAT, section 5: factors 1e-3, scales 1e-5, no
    weight decay, over 10^4 steps.
    """
    check_rates({"lr": lr, "scale_lr": scale_lr, "lr_A": lr_A, "lr_B": lr_B})
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter)].append(parameter)
    rates = {
        "A": lr if lr_A is None else lr_A,
        "B": lr if lr_B is None else lr_B,
        "scales": scale_lr,
    }
    decays = {"scales": scale_weight_decay, "other_no_decay": 0.0}
    return [
        {
            "name": name,
            "params": parameters,
            "lr": rates.get(name, lr),
            "initial_lr": rates.get(name, lr),
            "weight_decay": decays.get(name, weight_decay),
        }
        for name, parameters in members.items()
        if parameters
    ]


def _group_of(name: str, parameter: nn.Parameter) -> str:
    for marker, group in ((".lrqat_A.", "A"), (".lrqat_B.", "B"), (".lrqat_scale.", "scales")):
        if marker in name:
            return group
    return "other" if parameter.ndim > 1 else "other_no_decay"


def clip_by_group(
    groups: Iterable[dict[str, Any]],
    max_norm: float | Tensor,
    factor_max_norm: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """Clips the gradients group by group; returns the norms before clipping, by group name.

    Groups ``A`` and ``B`` are clipped to ``factor_max_norm``, all others to ``max_norm``. A single
    norm over all groups would be that of the scales, some tens of times that of A and B: the scales
    would shorten the factors' steps. The norms of A and B are below 1 from the first step on, so
    that clipping to 1 would never act; clipping to 0.01 makes the gradient of each step count the
    same.
    """
    limits = {} if factor_max_norm is None else dict.fromkeys(FACTORS, factor_max_norm)
    return {
        (name := group.get("name", str(index))): torch.nn.utils.clip_grad_norm_(
            # Tensors stay tensors: to make numbers of them would wait for a GPU.
            group["params"],
            cast(float, limits.get(name, max_norm)),
        )
        for index, group in enumerate(groups)
    }


def say_changed_rates(optimizer: Optimizer) -> None:
    """From now on, warns about the settings that a checkpoint overrules when it is loaded."""
    # An optimizer made by the factory and handed to an LR-QAT trainer has the hook already.
    if _compare_with_checkpoint not in optimizer._optimizer_load_state_dict_pre_hooks.values():
        optimizer.register_load_state_dict_pre_hook(_compare_with_checkpoint)


def _compare_with_checkpoint(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    names = [
        [g.get("name") for g in groups]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    ]
    if names[0] != names[1]:
        raise ValueError(
            f"the checkpoint's optimizer has the parameter groups {names[1]}, but this one has "
            f"{names[0]}; resume with the trainer and the trainable parameters that wrote the "
            "checkpoint"
        )
    for mine, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for key in WATCHED:
            if key not in mine or key not in saved or _equal(mine[key], saved[key]):
                continue
            logger.warning(
                f"{_in_words(key, mine.get('name'))} is {saved[key]} in the checkpoint, but "
                f"{mine[key]} was asked for: a resumed run continues with the checkpoint's "
                f"{saved[key]}. For other settings, start a new run from the adapter: "
                "PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
            )


def _in_words(key: str, group: str | None) -> str:
    if group is not None and key in ("initial_lr", "weight_decay"):
        return f"`{setting_name(group, key.replace('initial_lr', 'learning_rate'))}`"
    return f"`{key}` of the group `{group}`"


def _equal(mine: Any, saved: Any) -> bool:
    # Betas come back as a list or a tuple, and a rate may be a tensor.
    values = [value if isinstance(value, list | tuple) else (value,) for value in (mine, saved)]
    first, second = ([v.item() if isinstance(v, Tensor) else v for v in value] for value in values)
    return first == second


class LRQATOptimizerFactory:
    """AdamW over `parameter_groups`, made by an unmodified transformers Trainer.

    With ``max_grad_norm`` each group is clipped by itself right before the step, A and B to
    ``factor_max_grad_norm``. Then turn off the Trainer's own clipping, which comes first and uses
    one norm for all groups: ``TrainingArguments(max_grad_norm=0)``.

    Example:
        ```py
        settings = {"lr": 5e-3, "scale_lr": 1e-4, "betas": (0.9, 0.95), "max_grad_norm": 1.0}
        optimizer = LRQATOptimizerFactory, settings
        trainer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=optimizer, ...)
        ```
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        scale_lr: float,
        lr_A: float | None = None,
        lr_B: float | None = None,
        weight_decay: float = 0.0,
        scale_weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        factor_max_grad_norm: float = 0.01,
        **adamw: Any,
    ) -> torch.optim.AdamW:
        check_trained_is_saved(model)
        groups = parameter_groups(
            model,
            lr=lr,
            scale_lr=scale_lr,
            lr_A=lr_A,
            lr_B=lr_B,
            weight_decay=weight_decay,
            scale_weight_decay=scale_weight_decay,
        )
        if not groups:
            raise ValueError(
                "the model has no trainable parameters; wrap it with "
                "get_peft_model(model, LRQATConfig(...))"
            )
        optimizer = torch.optim.AdamW(groups, lr=lr, **adamw)
        say_changed_rates(optimizer)
        if max_grad_norm > 0:

            def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                # A fused optimizer divides by the scale of a gradient scaler in its own step.
                scale = getattr(optimizer, "grad_scale", None)
                limits = max_grad_norm, factor_max_grad_norm
                if scale is not None:
                    limits = tuple(limit * scale for limit in limits)
                clip_by_group(optimizer.param_groups, *limits)

            optimizer.register_step_pre_hook(clip)
        return optimizer
