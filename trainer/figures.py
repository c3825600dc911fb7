"""What a person watches while LR-QAT trains: clipped weights, changed integers, moved scales, and every group's rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.lrqat.size import deployed_weight_bytes
from peft_lrqat.quant import inspect_rows


logger = logging.get_logger(__name__)
SAMPLE = (
    1 << 16
)  # weights of a layer that are looked at; a layer with more is represented by evenly spaced rows


class LRQATCallback(TrainerCallback):
    """Adds to every log of the training loss, before any other callback sees it:

    - ``clipped_weights``: share of the weights whose rounded value lies outside the grid;
    - ``changed_integers``: share of the integers that differ from round-to-nearest, where every adapter starts;
    - ``changed_integers_since_log``: the same since the last log, or since training began or was resumed; a share that stays
      high while the loss does not fall tells of integers that oscillate;
    - ``scale_change``: mean of |s - s0| / s0;
    - ``bits_per_weight``: integers, scales and zero points that ship, in bits per weight;
    - ``learning_rate_<group>``: the rate of the last step, for every named group of the optimizer.

    Shares are exact up to 65,536 weights a layer and taken from evenly spaced rows above. Nothing is computed between two logs;
    one byte is kept for each weight looked at. Of parameters that FSDP2 shards, no process sees enough: they are left out.

    `LRQATTrainer` has one. For any other: ``LRQATCallback.attach(trainer)``.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._codes: dict[str, Tensor] = {}

    @classmethod
    def attach(cls, trainer: Trainer) -> LRQATCallback:
        """Adds one to ``trainer``, ahead of the callbacks that report: what it adds to a log, they must see."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        self._rates, self._codes = {}, {}
        if state.is_world_process_zero:
            self.measure(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # At the time of a log the scheduler has already gone on to the next step.
        groups = kwargs["optimizer"].param_groups
        self._rates = {
            f"learning_rate_{group['name']}": float(group["lr"])
            for group in groups
            if "name" in group
        }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        added = {**self._rates, **self.measure(model)}
        logs.update(added)
        # The Trainer has made its own copy by now.
        state.log_history[-1].update(added)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """The figures of now, and from here on the integers that the next call compares with."""
        layers = {
            name: layer for name, layer in model.named_modules() if isinstance(layer, LRQATLayer)
        }
        seen = clipped = changed = flipped = 0
        scale_change, scales, weights = 0.0, 0, 0
        for name, layer in layers.items():
            weights += layer.out_features * layer.in_features
            adapter = next((a for a in layer.active_adapters if a in layer.lrqat_A), None)
            if adapter is None or hasattr(layer.lrqat_B[adapter], "full_tensor"):
                continue
            weight = layer.low_rank_weight(adapter)
            rows = _sampled_rows(layer).to(weight.phi.device)
            codes, outside = inspect_rows(weight, rows)
            start, _ = inspect_rows(replace(weight, gamma=0.0), rows)
            before = self._codes.get(name, start)
            self._codes[name] = codes
            seen += codes.numel()
            # One wait for the device instead of three.
            counts = torch.stack(
                [outside.sum(), (codes != start).sum(), (codes != before.to(codes.device)).sum()]
            )
            clipped, changed, flipped = (
                a + b for a, b in zip((clipped, changed, flipped), counts.tolist(), strict=True)
            )
            first = layer.base_layer.scale0
            scale_change += ((weight.scale - first).abs() / first).sum().item()
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


def _sampled_rows(layer: LRQATLayer) -> Tensor:
    count = min(layer.out_features, max(1, SAMPLE // layer.in_features))
    return torch.linspace(0, layer.out_features - 1, count).round().long()
