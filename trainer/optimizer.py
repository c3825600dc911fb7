"""Parameter groups with learning rates of their own for A, B and the scales, clipped one by one, in any transformers Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging


logger = logging.get_logger(__name__)
FACTORS = ("A", "B")  # the groups of the low-rank factors
# What a checkpoint's optimizer brings along and a resumed run may have asked otherwise.
WATCHED = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


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
    """Optimizer groups of the trainable parameters, in this order; empty ones are left out.

    ``A`` and ``B``, the factors, at ``lr_A`` and ``lr_B`` (``lr`` where None); ``scales`` at ``scale_lr``; then what else is
    trained, such as a classification head, at ``lr``: ``other``, and ``other_no_decay`` for its norms and biases. Each group has
    its ``name``, and its peak rate as ``initial_lr`` too.

    A step of 5e-3 is small for a factor of the low-rank product, whose unit is a grid step, and ruin for a scale, which is
    itself about 1e-2. LR-QAT, section 5: factors 1e-3, scales 1e-5, no weight decay, over 10^4 steps.
    """
    check_rates({"lr": lr, "scale_lr": scale_lr, "lr_A": lr_A, "lr_B": lr_B})
    members: dict[str, list[nn.Parameter]] = {
        n: [] for n in ("A", "B", "scales", "other", "other_no_decay")
    }
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


def check_rates(rates: dict[str, float | None]) -> None:
    """ValueError for a learning rate that is not a finite number above 0; None stands for no rate of its own."""
    for name, rate in rates.items():
        if rate is None or (isinstance(rate, Real) and 0 < rate < math.inf):
            continue
        if isinstance(rate, str):
            raise ValueError(
                f"`{name}` must be a number, but is the string {rate!r}; YAML reads 5e-3 as one, write 5.0e-3"
            )
        what = "`.lrqat_scale.`" if "scale" in name else "`.lrqat_A.` and `.lrqat_B.`"
        raise ValueError(
            f"`{name}` must be a learning rate above 0, but is {rate!r}; to keep them fixed, set `requires_grad_(False)` on the "
            f"parameters with {what} in their names"
        )


def clip_by_group(
    groups: Iterable[dict[str, Any]], max_norm: float, factor_max_norm: float | None = None
) -> dict[str, Tensor]:
    """Clips the gradients of each group by itself; the norm of each before that, by the group's name.

    Groups ``A`` and ``B`` to ``factor_max_norm``, all others to ``max_norm``. One norm over all would be that of the scales, some
    tens of times that of A and B, so that the factors' steps were shortened because of the scales. And the norms of A and B
    are below 1 from the first step on: to 0.01 each step's gradient counts the same, where 1 would never act.
    """
    limits = {} if factor_max_norm is None else dict.fromkeys(FACTORS, factor_max_norm)
    return {
        (name := group.get("name", str(index))): torch.nn.utils.clip_grad_norm_(
            group["params"], limits.get(name, max_norm)
        )
        for index, group in enumerate(groups)
    }


def say_changed_rates(optimizer: Optimizer) -> None:
    """From here on, loading a checkpoint into ``optimizer`` says which of its settings the checkpoint overrules."""
    if not getattr(
        optimizer, "says_changed_rates", False
    ):  # made by the factory and handed to an LR-QAT trainer
        optimizer.says_changed_rates = True
        optimizer.register_load_state_dict_pre_hook(_compare_with_checkpoint)


def _compare_with_checkpoint(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    names = [
        [g.get("name") for g in groups]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    ]
    if names[0] != names[1]:
        raise ValueError(
            f"the checkpoint's optimizer has the parameter groups {names[1]}, but this one has {names[0]}; resume with the trainer "
            "and with the trainable parameters that wrote the checkpoint"
        )
    for mine, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        changed = [
            key
            for key in WATCHED
            if key in mine and key in saved and not _equal(mine[key], saved[key])
        ]
        for key in changed:
            logger.warning(
                f"`{'learning rate' if key == 'initial_lr' else key}` of the group `{mine.get('name')}` is {saved[key]} in the "
                f"checkpoint, but {mine[key]} was asked for: a resumed run goes on with the checkpoint's {saved[key]}. For other "
                "settings, start a new run from the adapter: PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
            )


def _equal(mine: Any, saved: Any) -> bool:
    # Betas come back as a list or a tuple, and a rate may be a tensor.
    values = [value if isinstance(value, list | tuple) else (value,) for value in (mine, saved)]
    first, second = ([v.item() if isinstance(v, Tensor) else v for v in value] for value in values)
    return first == second


class LRQATOptimizerFactory:
    """AdamW over :func:`parameter_groups`, made by an unmodified transformers Trainer.

    With ``max_grad_norm`` each group is clipped by itself, right before the step, A and B to ``factor_max_grad_norm``; then turn
    the Trainer's own clipping off (``TrainingArguments(max_grad_norm=0)``), which comes first and has one norm for all groups.

    Example:
        ```py
        optimizer = (LRQATOptimizerFactory, {"lr": 5e-3, "scale_lr": 1e-4, "betas": (0.9, 0.95), "max_grad_norm": 1.0})
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
                "the model has no trainable parameters; wrap it with get_peft_model(model, LRQATConfig(...))"
            )
        optimizer = torch.optim.AdamW(groups, lr=lr, **adamw)
        say_changed_rates(optimizer)
        if max_grad_norm > 0:

            def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                clip_by_group(optimizer.param_groups, max_grad_norm, factor_max_grad_norm)

            optimizer.register_step_pre_hook(clip)
        return optimizer
