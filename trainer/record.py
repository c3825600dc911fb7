"""What is kept about a run for the adapter's card, and what goes to a hub."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from peft_lrqat.lrqat.card import describe_adapter
from peft_lrqat.shared.card import make_publishable

from .part import TrainerPart
from .rates import setting_name


EXAMPLE_LENGTH = "tokens in an example"  # a setting of the record


class TrainingRecord(TrainerPart):
    """Keeps the steps, settings and last metrics in the adapter's config.

    Whoever saves or publishes the model then has them on the card.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._evaluated_step = -1
        self._evaluated_metrics: dict[str, float | str] = {}  # of the weights after that step
        self._loaded_step: int | None = None  # of the best checkpoint, once it is loaded
        self._example_length: int | None = None
        super().__init__(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        self._loaded_step = None
        self._example_length = _example_length(self.train_dataset)
        done = super()._init_training_state(*args, **kwargs)
        self._recall_metrics(self.state.global_step)
        return done

    def _recall_metrics(self, step: int | None) -> None:
        """Takes the metrics that were logged after ``step`` for those of the current weights."""
        logs = [log for log in self.state.log_history if log.get("step") == step]
        self._evaluated_step = self.state.global_step
        self._evaluated_metrics = {k: v for log in logs for k, v in _quality(log).items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and keeps the metrics of an evaluation for the record."""
        if metrics := _quality(logs):
            # Several data sets of one evaluation are logged one by one.
            same = self._evaluated_step == self.state.global_step
            self._evaluated_step = self.state.global_step
            self._evaluated_metrics = {**(self._evaluated_metrics if same else {}), **metrics}
        super().log(logs, start_time)
        self._keep_record()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._loaded_step = self.state.best_global_step
        self._recall_metrics(self._loaded_step)
        self._keep_record()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        self._keep_record()
        super()._save(output_dir, state_dict)

    def _keep_record(self) -> None:
        # An evaluation of earlier weights says nothing about these.
        current = self._evaluated_step == self.state.global_step
        self.lrqat_config().training_record = {
            "steps": self._loaded_step or self.state.global_step,
            "settings": {
                name: float(value) if isinstance(value, Tensor) else value
                for name, value in self._recorded_settings().items()
            },
            "metrics": self._evaluated_metrics if current else {},
        }

    def _recorded_settings(self) -> dict[str, Any]:
        args = self.args
        # From the optimizer: a resumed run, or one whose optimizer was handed in, has other rates
        # than `args`.
        groups = {} if self.optimizer is None else _named_groups(self.optimizer.param_groups)
        settings: dict[str, Any] = {
            "optimizer": getattr(args.optim, "value", args.optim),
            **{
                setting_name(name, "learning_rate"): group.get("initial_lr", group["lr"])
                for name, group in groups.items()
            },
            **{
                setting_name(name, "weight_decay"): group["weight_decay"]
                for name, group in groups.items()
                if group.get("weight_decay")
            },
            "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            "warm-up steps": args.warmup_steps,
            "gradient norm per group, at most": args.max_grad_norm,
            "gradient norm of A and of B, at most": args.factor_max_grad_norm,
            "sequences per step": self.get_total_train_batch_size(args),
            "seed": args.seed,
        }
        if self._example_length is not None:
            settings[EXAMPLE_LENGTH] = self._example_length
        if args.distillation_weight:
            settings["distillation weight"] = args.distillation_weight
            settings["distillation temperature"] = args.distillation_temperature
        return settings


class Publishing(TrainerPart):
    """Adds the section of LR-QAT to the card that the trainer writes, and makes cards that a hub
    accepts."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the trainer's own card, then the section of LR-QAT after it."""
        super().create_model_card(*args, **kwargs)
        folder = self.args.output_dir
        if self.is_world_process_zero() and folder is not None and os.path.isdir(folder):
            describe_adapter(folder, self.lrqat_config())
            make_publishable(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        card = Path(checkpoint_folder) / "README.md"
        if self.is_world_process_zero() and card.exists():
            make_publishable(checkpoint_folder)  # the checkpoint may be uploaded as well
            shutil.copy(card, str(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)


def _example_length(dataset: Any) -> int | None:
    """Tokens in an example, where all are of one length as far as the first and last ones show."""
    columns = getattr(dataset, "column_names", None) or []
    if not isinstance(dataset, Dataset) or "input_ids" not in columns or len(dataset) == 0:
        return None
    first, last = (len(dataset[place]["input_ids"]) for place in (0, len(dataset) - 1))
    return first if first == last else None


def _named_groups(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group.get("name", f"group_{index}"): group for index, group in enumerate(groups)}


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
