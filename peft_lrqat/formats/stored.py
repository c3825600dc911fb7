"""Models built from the safetensors files of a directory, by this package's own reading of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..shared.model_files import check_model
from .base import CONFIG_NAME


WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"


class StoredTensors:
    """The tensors in the safetensors files of a directory, each read when it is taken.

    ValueError unless the files are whole and, where ``checked``, those that were written, with
    ``config.json``.
    """

    def __init__(self, path: Path, *, checked: bool = True) -> None:
        names = [WEIGHTS_NAME]
        try:
            if (path / INDEX_NAME).exists():
                index = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))
                names = sorted(set(index["weight_map"].values()))
                if wrong := [name for name in names if Path(name).name != name]:
                    raise ValueError(f"{INDEX_NAME} names {wrong[0]!r}, which is elsewhere")
            files = [safe_open(path / name, framework="pt") for name in names]
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ValueError(f"the weights in {path} are not whole ({error})") from error
        if checked:
            check_model(path, [path / name for name in names])
        self._where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (not a dict)

    def take(self, name: str) -> Tensor | None:
        """A tensor, once; None if there is none with that name."""
        file = self._where.pop(name, None)
        return None if file is None else file.get_tensor(name)

    def left(self) -> list[str]:
        """The names of the tensors that were not taken."""
        return sorted(self._where)


def build(
    path: Path,
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    stored: StoredTensors,
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of ``weights`` and of what is left in ``stored``, and the report of its loading.

    transformers' own loader ties weights, initialises buffers, and reports what is missing.
    ValueError if anything is missing, unexpected or of another shape.
    """
    state = {name: weight.to(dtype) for name, weight in weights.items()}
    for name in stored.left():
        tensor = stored.take(name)
        assert tensor is not None
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    # With `output_loading_info` a pair, which the annotation of transformers does not say.
    pair: Any = _model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    model, report = pair
    wrong = {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}
    if wrong:
        names = ", ".join(sorted(map(str, wrong))[:3])
        raise ValueError(f"the weights in {path} do not fit its {CONFIG_NAME}: {names}")
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), report


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"this transformers has no model class {config.architectures}; install the version that"
        " the model was exported with"
    )
