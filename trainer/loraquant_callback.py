"""A packed LORAQUANT adapter for every checkpoint of a LoRA run, and one for its end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter
from peft_lrqat.loraquant.convert import check_lora


logger = logging.get_logger(__name__)
# Beside the checkpoints, not in them: whatever folder of a checkpoint holds an adapter, the Trainer loads when it resumes.
FOLDER = "loraquant"
FINAL = "final"


class LoRAQuantCallback(TrainerCallback):
    """Writes the LoRA adapter that is trained as a packed one, too: ``output_dir/loraquant/checkpoint-N`` when a checkpoint
    is saved, and ``output_dir/loraquant/final`` when training ends.

    The packed adapter of a checkpoint goes when the checkpoint does (``save_total_limit``). Training itself is not touched, and
    goes on with a warning where an adapter could not be written. For any Trainer whose model is a PEFT model with LoRA or DoRA;
    parameters must be whole on the main process (DDP: yes; FSDP, ZeRO-3: no). Trials of a hyper-parameter search write none.

    Args:
        config: the recipe; left out, ``LoRAQuantConfig()``.
        adapter_name: which adapter; left out, the active one.

    Example:
        ```py
        trainer = Trainer(model=lora_model, callbacks=[LoRAQuantCallback(LoRAQuantConfig(bits_high=2, ratio=0.9))], ...)
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
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Raises ValueError for a model whose adapter cannot be packed."""
        model = extract_model_from_parallel(model)
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"LoRAQuantCallback needs a PEFT model with a LoRA adapter, but the model is a {type(model).__name__}; use "
                "`get_peft_model(model, LoraConfig(...))`, without FSDP"
            )
        name = self._adapter_of(model)
        if name not in model.peft_config:
            raise ValueError(
                f"the model has no adapter `{name}` for LoRAQuantCallback, but {sorted(model.peft_config)}"
            )
        check_lora(model.peft_config[name], "the model")
        for parameter, tensor in model.named_parameters():
            if f".{name}" in parameter and (
                hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")
            ):
                raise ValueError(
                    f"`{parameter}` is spread over processes (FSDP, DeepSpeed ZeRO-3), so that LoRAQuantCallback cannot see it as "
                    "a whole; leave the callback out and run `lrqat quantize-adapter` on the saved adapter"
                )
        if state.is_world_process_zero:
            for left in Path(args.output_dir, FOLDER).glob(".*"):  # by a killed run, half-written
                shutil.rmtree(left, ignore_errors=True)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        self._write(args, state, model, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        # By now the best checkpoint is loaded, where that was asked for.
        self._write(args, state, model, FINAL)

    def _adapter_of(self, model: PeftModel) -> str:
        return self.adapter_name or model.active_adapters[0]

    def _write(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, name: str
    ) -> None:
        if not state.is_world_process_zero or state.is_hyper_param_search:
            return
        model = extract_model_from_parallel(model)
        folder = Path(args.output_dir, FOLDER)
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
            if (folder / name).exists():  # of an earlier run, or from before it was resumed
                shutil.rmtree(folder / name)
            fresh.rename(folder / name)
            _delete_without_checkpoint(folder, name)
        except Exception as error:  # whatever it is, it must not cost the run
            shutil.rmtree(fresh, ignore_errors=True)
            logger.warning(
                f"no packed adapter was written to {folder / name}: {type(error).__name__}: {error}. Training goes on; "
                "`lrqat quantize-adapter` makes one from a checkpoint at any time"
            )
        else:
            report = made.report
            logger.info(
                f"{folder / name}: {report['bits_per_parameter']} bits a parameter, relative error {report['relative_error']}"
            )


def _delete_without_checkpoint(folder: Path, written: str) -> None:
    """Deletes the packed adapters of checkpoints that are gone; ``written`` stays."""
    for path in folder.iterdir():
        is_of_checkpoint = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)
        if is_of_checkpoint and path.name != written and not (folder.parent / path.name).is_dir():
            shutil.rmtree(path)
