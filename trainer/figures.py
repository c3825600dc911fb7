"""Figures to watch while LR-QAT trains: clipped weights, changed integers, moved scales, rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from peft_lrqat.lrqat.layer import LRQATLayer, rows_of
from peft_lrqat.lrqat.size import deployed_weight_bytes
from peft_lrqat.quant import LowRankWeight, inspect_rows
from peft_lrqat.shared.words import some

from .idle import idle_layers
from .rates import setting_name
from .sharding import is_in_parts


logger = logging.get_logger(__name__)
# How many weights of a layer are looked at; evenly spaced rows stand for a larger layer.
SAMPLE = 1 << 16


class LRQATCallback(TrainerCallback):
    """Adds to every log of the training loss, before any other callback sees it:

    - ``clipped_weights``: share of the weights whose rounded value lies outside the grid;
    - ``changed_integers``: share of the integers that differ from round-to-nearest, where every
      adapter starts;
    - ``changed_integers_since_log``: share that has changed since the last log, or since training
      began or was resumed; if it stays high while the loss does not fall, integers oscillate;
    - ``scale_change``: mean of |s - s0| / s0;
    - ``bits_per_weight``: integers, scales and zero points that ship, in bits per weight;
    - ``A_learning_rate``, ``B_learning_rate``, ``scale_learning_rate`` and so on: the rate of the
      last step, for every named group of the optimizer.

    Shares are exact up to 65,536 weights a layer; in larger layers they are taken from evenly
    spaced rows. Nothing is computed between two logs; one byte is kept for each weight that is
    looked at. Parameters that FSDP2 or ZeRO-3 shards are left out, because no process sees enough
    of them.

    After the first step, layers that no gradient reached are named in a warning.

    `LRQATTrainer` has one. For any other trainer: ``LRQATCallback.attach(trainer)``.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._codes: dict[tuple[str, int], Tensor] = {}
        self._looked_for_idle = False

    @classmethod
    def attach(cls, trainer: Trainer) -> LRQATCallback:
        """Adds one to ``trainer``, before the callbacks that report: they must see its figures."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._rates, self._codes, self._looked_for_idle = {}, {}, False
        if state.is_world_process_zero:
            self.measure(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # When a log is made, the scheduler has already moved on to the next step.
        groups = kwargs["optimizer"].param_groups
        self._rates = {
            setting_name(group["name"], "learning_rate"): float(group["lr"])
            for group in groups
            if "name" in group
        }
        if state.is_world_process_zero and not self._looked_for_idle:
            self._looked_for_idle = True
            _warn_of_idle_layers(kwargs["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs or not state.is_world_process_zero:
            return
        added = {**self._rates, **self.measure(kwargs["model"])}
        logs.update(added)
        # The Trainer has made its own copy by now.
        state.log_history[-1].update(added)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """The current figures; the next call compares its integers with those of this one."""
        layers = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, LRQATLayer)
        }
        seen = clipped = changed = flipped = 0
        scale_change, scales, weights = 0.0, 0, 0
        for name, layer in layers.items():
            weights += layer.out_features * layer.in_features
            adapter = next((a for a in layer.active_adapters if a in layer.lrqat_A), None)
            if adapter is None or is_in_parts(layer.lrqat_B[adapter]):
                continue
            parts = list(layer.low_rank_weights(adapter))
            counts = []
            for part, weight in enumerate(parts):
                rows = _sampled_rows(weight, len(parts))
                codes, outside = inspect_rows(weight, rows)
                start, _ = inspect_rows(replace(weight, gamma=0.0), rows)
                before = self._codes.get((name, part), start)
                self._codes[name, part] = codes
                seen += codes.numel()
                moved, since = codes != start, codes != before.to(codes.device)
                counts.append(torch.stack([outside.sum(), moved.sum(), since.sum()]))
            found = torch.stack(counts).sum(0).tolist()
            clipped, changed, flipped = (
                a + b for a, b in zip((clipped, changed, flipped), found, strict=True)
            )
            first = layer.base_layer.scale0
            scale = rows_of(weight.scale for weight in parts)
            scale_change += ((scale - first).abs() / first).sum().item()
            scales += first.numel()
        if not seen:
            return {}
        return {
            "clipped_weights": clipped / seen,
            "changed_integers": changed / seen,
            "changed_integers_since_log": flipped / seen,
            "scale_change": scale_change / scales,
            "bits_per_weight": 8 * deployed_weight_bytes(model) / weights,
        }


def _warn_of_idle_layers(model: nn.Module) -> None:
    if idle := idle_layers(model):
        logger.warning(
            f"no gradient reached {some(idle)} in the first step: the model neither called them "
            "nor read their weights, or did not use the result. Nothing is trained there; name "
            "them in `exclude_modules`, unless they are experts that no token was sent to"
        )


def _sampled_rows(weight: LowRankWeight, parts: int) -> Tensor:
    """Rows of one of the parts of a layer, which share the sample."""
    height, width = weight.shape
    count = min(height, max(1, SAMPLE // (width * parts)))
    rows = torch.linspace(0, height - 1, count, dtype=torch.float32).round().long()
    return rows.to(weight.phi.device)
