"""Parameter groups with a learning rate of their own for the scales, in any transformers Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def parameter_groups(
    model: nn.Module, *, lr: float, scale_lr: float, weight_decay: float = 0.0, scale_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Two optimizer groups of the trainable parameters: everything but the scales, then the scales; empty ones left out.

    A step of 1e-3 is small for a factor of the low-rank product, whose unit is a grid step, and ruin for a scale, which is
    itself about 1e-2. LR-QAT, section 5: factors 1e-3, scales 1e-5, no weight decay.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = [parameter for name, parameter in named if ".lrqat_scale." in name]
    others = [parameter for name, parameter in named if ".lrqat_scale." not in name]
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": scales, "lr": scale_lr, "weight_decay": scale_weight_decay},
    ]
    return [group for group in groups if group["params"]]


class LRQATOptimizerFactory:
    """AdamW over :func:`parameter_groups`, made by an unmodified transformers Trainer.

    Example:
        ```py
        optimizer = (LRQATOptimizerFactory, {"lr": 5e-3, "scale_lr": 1e-4, "betas": (0.9, 0.95)})
        trainer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=optimizer, ...)
        ```
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        scale_lr: float,
        weight_decay: float = 0.0,
        scale_weight_decay: float = 0.0,
        **adamw: Any,
    ) -> torch.optim.AdamW:
        for name, rate in (("lr", lr), ("scale_lr", scale_lr)):
            if not 0 <= rate < float("inf"):
                raise ValueError(f"`{name}` must be a learning rate of at least 0, but is {rate}")
        groups = parameter_groups(
            model, lr=lr, scale_lr=scale_lr, weight_decay=weight_decay, scale_weight_decay=scale_weight_decay
        )
        if not groups:
            raise ValueError(
                "the model has no trainable parameters; wrap it with get_peft_model(model, LRQATConfig(...))"
            )
        return torch.optim.AdamW(groups, lr=lr, **adamw)
