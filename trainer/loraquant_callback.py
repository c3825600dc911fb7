"""A packed LORAQUANT adapter for every checkpoint of a LoRA run, and one for its end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, cast

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter
from peft_lrqat.loraquant.convert import check_lora
from peft_lrqat.shared.words import some

from .sharding import is_in_parts


logger = logging.get_logger(__name__)
# Beside the checkpoints, not in them: the Trainer loads every adapter that it finds in a folder of
# the checkpoint from which it resumes.
FOLDER = "loraquant"
FINAL = "final"


class LoRAQuantCallback(TrainerCallback):
    """Writes the LoRA adapter also as a packed adapter, while it is trained.

    It writes ``output_dir/loraquant/checkpoint-N`` when a checkpoint is saved, and
    ``output_dir/loraquant/final`` when training ends. The packed adapter of a checkpoint is deleted
    with the checkpoint (``save_total_limit``). Training itself does not change; if an adapter
    cannot be written, training continues with a warning. Trials of a hyperparameter search write
    none.

    It works in any Trainer whose model is a PEFT model with LoRA or DoRA. Parameters must be
    complete on the main process: they are with DDP, but not with FSDP or ZeRO-3.

    Args:
        config: the recipe; ``LoRAQuantConfig()`` by default.
        adapter_name: which adapter; the active one by default.

    Example:
        ```py
        callback = LoRAQuantCallback(LoRAQuantConfig(bits_high=2, ratio=0.9))
        trainer = Trainer(model=lora_model, callbacks=[callback], ...)
        ```
    """

    def __init__(
        self, config: LoRAQuantConfig | None = None, adapter_name: str | None = None
    ) -> None:
        self.config = LoRAQuantConfig() if config is None else config
        self.adapter_name = adapter_name

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for a model whose adapter cannot be packed."""
        model = extract_model_from_parallel(kwargs["model"])
        if not isinstance(model, PeftModel):
            raise ValueError(
                "LoRAQuantCallback needs a PEFT model with a LoRA adapter, but the model is a "
                f"{type(model).__name__}; use `get_peft_model(model, LoraConfig(...))`, and no FSDP"
            )
        name = self._adapter_of(model)
        if name not in model.peft_config:
            raise ValueError(
                f"the model has no adapter `{name}` for LoRAQuantCallback, only "
                f"{some(model.peft_config)}; give one of them as `adapter_name`"
            )
        check_lora(model.peft_config[name], "the model")
        for parameter, tensor in model.named_parameters():
            if f".{name}" in parameter and is_in_parts(tensor):
                raise ValueError(
                    f"`{parameter}` is spread over processes (FSDP, DeepSpeed ZeRO-3), so "
                    "LoRAQuantCallback cannot see all of it; leave the callback out and run "
                    "`lrqat quantize-adapter` on the saved adapter"
                )
        if state.is_world_process_zero:
            # A killed run may have left half-written folders.
            for left in Path(str(args.output_dir), FOLDER).glob(".*"):
                shutil.rmtree(left, ignore_errors=True)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._write(args, state, kwargs["model"], f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # The best checkpoint is loaded by now, if that was asked for.
        self._write(args, state, kwargs["model"], FINAL)

    def _adapter_of(self, model: PeftModel) -> str:
        return self.adapter_name or model.active_adapters[0]

    def _write(
        self, args: TrainingArguments, state: TrainerState, wrapped: nn.Module, name: str
    ) -> None:
        if not state.is_world_process_zero or state.is_hyper_param_search:
            return
        model: PeftModel = extract_model_from_parallel(wrapped)
        folder = Path(str(args.output_dir), FOLDER)
        fresh = folder / f".{name}"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            made = quantize_adapter(
                model,
                fresh,
                self.config,
                adapter_name=self._adapter_of(model),
                progress=not args.disable_tqdm,
            )
            if (folder / name).exists():  # from an earlier run, or before this one was resumed
                shutil.rmtree(folder / name)
            fresh.rename(folder / name)
            _delete_without_checkpoint(folder, name)
        except Exception as error:  # no failure here may end the run
            shutil.rmtree(fresh, ignore_errors=True)
            logger.warning(
                f"no packed adapter was written to {folder / name}: {type(error).__name__}: "
                f"{error}. Training continues; `lrqat quantize-adapter` makes one from a "
                "checkpoint at any time"
            )
        else:
            report = cast(LoRAQuantConfig, made).report  # `check_lora` has passed
            logger.info(
                f"{folder / name}: {report['bits_per_parameter']} bits per parameter, relative "
                f"error {report['relative_error']}"
            )


def _delete_without_checkpoint(folder: Path, written: str) -> None:
    """Deletes the packed adapters of checkpoints that no longer exist; ``written`` stays."""
    for path in folder.iterdir():
        is_of_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)
        if is_of_checkpoint and path.name != written and not (folder.parent / path.name).is_dir():
            shutil.rmtree(path)
