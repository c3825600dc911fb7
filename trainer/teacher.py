"""The unquantised model that a student learns from: where it is, and what the two share."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_lrqat.lrqat.layer import LRQATLayer
from peft_lrqat.lrqat.low_bit import is_low_bit
from peft_lrqat.shared.card import base_in_words, is_hub_id
from peft_lrqat.shared.words import some

from .texts import update


def load_teacher(student: PeftModel) -> PreTrainedModel:
    """Loads the base model of ``student`` again, from where the adapter's config says.

    Of a low-bit base, the model that it was made from.
    """
    base: Any = student.get_base_model()
    name, revision, model_config = teacher_source(student)
    try:
        if not name:
            raise OSError("the adapter's config does not name it")
        teacher, loading = type(base).from_pretrained(
            name,
            config=model_config,
            revision=revision,
            dtype=base.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"distillation needs the unquantised model, and `{name}` cannot be loaded ({error}); "
            "give it as `teacher_model`"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"`{name}` has no weights for {some(loading['missing_keys'])}: a teacher loaded from "
            "there would have random ones, such as a fresh classification head. Give a trained "
            "model as `teacher_model`"
        )
    return teacher


def teacher_source(student: PeftModel) -> tuple[str | None, str | None, Any]:
    """Name and revision of the unquantised model of ``student``, and its config."""
    config = student.peft_config[student.active_adapters[0]]
    base: Any = student.get_base_model()
    if not is_low_bit(base):
        return config.base_model_name_or_path, config.revision, base.config
    model_config = copy.deepcopy(base.config)
    del model_config.quantization_config
    return _unquantised(base), None, model_config


def _unquantised(base: Any) -> str:
    """The model that a low-bit base was made from; ValueError where only users can know it."""
    made_by = base.config.quantization_config
    name = made_by.made_from
    if made_by.source is not None:
        raise ValueError(
            "distillation needs the unquantised model, but the integers of this low-bit base were "
            f"taken over from `{name}`, which is quantised; give it as `teacher_model`"
        )
    if not name or not (is_hub_id(name) or Path(name).is_absolute()):
        raise ValueError(
            "distillation needs the unquantised model, and this low-bit base was made from "
            f"{base_in_words(name)[0]}; give it as `teacher_model`"
        )
    return name


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError unless the teacher has the student's vocabulary and is not quantised."""
    configs: list[Any] = [model.config for model in (student, teacher)]
    sizes = [config.get_text_config().vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher predicts over {sizes[1]} tokens and the student over {sizes[0]}: their "
            "vocabularies differ; the teacher must be the base model itself, or a model with the "
            "same tokenizer"
        )
    if is_low_bit(teacher):
        raise ValueError(
            "the teacher must be the unquantised model, but it is a low-bit base; give the model "
            "that the base was made from"
        )
    if any(isinstance(module, LRQATLayer) for module in teacher.modules()):
        raise ValueError(
            "the teacher must be the unquantised model, but it has LR-QAT layers: get_peft_model() "
            "changes the model that it is given. Make the teacher before, with "
            "copy.deepcopy(model), or load the base model again"
        )


@torch.no_grad()
def share_frozen_parameters(student: PeftModel, teacher: nn.Module) -> int:
    """Lets the teacher use the student's memory where both hold the same frozen values.

    Returns the bytes that this saves.
    """
    mine = {
        name: p for name, p in student.get_base_model().named_parameters() if not p.requires_grad
    }
    saved = 0
    for name, parameter in teacher.named_parameters():
        other = mine.get(name)
        if other is None or not _alike(other, parameter):
            continue
        if other.data_ptr() != parameter.data_ptr() and torch.equal(other, parameter):
            parameter.data = other.data
            saved += parameter.numel() * parameter.element_size()
    return saved


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@torch.no_grad()
def keep_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Gives the teacher its own memory for shared parameters that the student now trains."""
    trained = {p.data_ptr() for p in student.parameters() if p.requires_grad}
    for parameter in teacher.parameters():
        if parameter.data_ptr() in trained:
            parameter.data = parameter.data.clone()


def teacher_key(student: PeftModel, given: PreTrainedModel | None) -> dict[str, Any]:
    """What says that two teachers are the same, without loading one."""
    if given is not None:
        digest = hashlib.blake2b(digest_size=16)
        for key, tensor in given.state_dict().items():
            flat = tensor.detach().flatten()
            # Some values of each tensor: a trained one differs in most of them.
            sample = flat[:: max(1, flat.numel() // 1024)]
            update(digest, key, sample.to("cpu", torch.float64))
        return {"weights": digest.hexdigest()}
    base: Any = student.get_base_model()
    name, revision, _ = teacher_source(student)
    found: dict[str, Any] = {"name": name, "revision": revision, "dtype": str(base.dtype)}
    if name and (folder := Path(name)).is_dir():
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        found["files"] = sorted(
            [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files
        )
    elif not is_low_bit(base):
        found["commit"] = getattr(base.config, "_commit_hash", None)
    return found
