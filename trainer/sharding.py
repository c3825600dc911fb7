"""Models that FSDP2 or ZeRO-3 shards: a start from one rank, and adapters that are saved whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from peft_lrqat.lrqat.layer import LRQATLayer

from .part import TrainerPart


# In the names of what an adapter consists of, beside what is trained.
PARTS = ("lrqat_", "modules_to_save.", "trainable_tokens_")


class ShardedTraining(TrainerPart):
    """Training under FSDP2 or DeepSpeed's ZeRO-3, by accelerate's configuration.

    The adapter is saved as without shards, whatever ``fsdp_state_dict_type`` is, and the frozen
    weights are not gathered for that. With ``fsdp_cpu_ram_efficient_loading``, the first process
    alone has the weights at the start.
    """

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP1 cannot shard integers; set `fsdp_version: 2` in accelerate's configuration, "
                "or train with DDP"
            )
        if self.accelerator.num_processes > 1:
            _check_same_base(self.model)
        if self.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
            _gather_layer_by_layer(self.model)
        prepare = self.accelerator.prepare

        def prepare_without_fingerprints(*given: Any, **options: Any) -> Any:
            with _fingerprints_left_alone(self.model):
                return prepare(*given, **options)

        # A checkpoint is loaded before this method ends, and holds fingerprints.
        self.accelerator.prepare = prepare_without_fingerprints
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            self.accelerator.prepare = prepare

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        states = ("pytorch_model_fsdp*", "optimizer_0", "optimizer.bin")
        if self.is_fsdp_enabled and not any(
            any(Path(resume_from_checkpoint).glob(name)) for name in states
        ):
            raise ValueError(
                f"{resume_from_checkpoint} was written without FSDP, whose state of the optimizer "
                "is another one; resume it without, or start anew from its adapter: "
                "`PeftModel.from_pretrained(base, checkpoint, is_trainable=True)`"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter, which is gathered first where it is sharded."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        model: Any = self.model
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        state = {
            name: whole(tensor) if name in trained or any(p in name for p in PARTS) else tensor
            for name, tensor in model.state_dict().items()
        }
        self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def is_in_parts(tensor: Tensor) -> bool:
    """Whether each process has a share of a tensor only."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")  # FSDP2's, ZeRO-3's


def _check_same_base(model: nn.Module) -> None:
    """Raises ValueError, on all processes, unless they hold the same frozen weights."""
    prints = [m.base_layer.fingerprint for m in model.modules() if isinstance(m, LRQATLayer)]
    digest = hashlib.blake2b(repr(prints).encode(), digest_size=8).hexdigest()
    found = gather_object([digest])
    if len(set(found)) > 1:
        different = [rank for rank, other in enumerate(found) if other != found[0]]
        raise ValueError(
            f"processes {different} hold other base weights than process 0, so they would train "
            "different models; give all of them the same files, in the same dtype"
        )


def _gather_layer_by_layer(model: Any) -> None:
    """Tells ZeRO-3 to gather all that a layer is made of when the layer is called.

    By itself it gathers the parameters of each module that is called, but the factors lie in
    modules that are only read. It gives back what it gathered for the backward pass when the
    gradient of the module's input is there, so the first layer's needs one, too.
    """
    from deepspeed.utils import set_z3_leaf_modules

    kinds = {type(module) for module in model.modules() if isinstance(module, LRQATLayer)}
    if kinds:
        set_z3_leaf_modules(model, list(kinds))
        model.enable_input_require_grads()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _fingerprints_left_alone(model: nn.Module) -> Iterator[None]:
    """accelerate sends the state of the first process to the others as shards, which these are not.

    Each process knows the fingerprints of the base itself.
    """
    kept = [
        module.lrqat_fingerprint for module in model.modules() if isinstance(module, LRQATLayer)
    ]
    for buffers in kept:
        buffers._non_persistent_buffers_set.update(buffers._buffers)
    try:
        yield
    finally:
        for buffers in kept:
            buffers._non_persistent_buffers_set.clear()
