"""Integers taken over from GPTQ, AWQ and compressed-tensors checkpoints, without a 16-bit weight.

transformers always loads a quantised checkpoint by the method that its ``config.json`` names.
`load_low_bit` therefore hands it a configuration that names this package instead and carries the
checkpoint's own as ``source``; each module's tensors then become a `DowncastLinear` as they arrive.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..quant import WeightFormat
from ..quant.grid import DTYPE_NAMES
from ..shared.model_files import check_signed
from ..shared.words import some
from .config import METHOD, LowBitConfig
from .downcast import DowncastLinear
from .embedding import Plain, layer_class
from .experts import set_layer
from .layouts import find_layout


logger = logging.get_logger(__name__)
# Arguments of `from_pretrained` that say where a checkpoint is.
PLACE = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_low_bit(
    name: str,
    settings: LowBitConfig | None = None,
    *,
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """The low-bit base of any checkpoint: one that is stored, a quantised one, or a plain one.

    The integers, scales and zero points of a GPTQ, AWQ or compressed-tensors checkpoint are kept
    as they are, so that the model computes what it did; modules that are not quantised there stay
    plain. ``settings`` say how to make a base of a plain checkpoint.

    Args:
        name: a directory or a name on the Hub.
        settings: for a plain checkpoint, which needs them; others have their own.
        auto_class: what loads the model.
        kwargs: as for ``from_pretrained``.

    Raises:
        ValueError: for settings that the checkpoint has no use for or that are missing, for a
            method or a layout that cannot be taken over, and for tensors that do not fit.

    Example:
        ```py
        from peft_lrqat import load_low_bit

        model = load_low_bit("org/model-GPTQ-Int4")
        model.save_pretrained("base-4bit")
        ```
    """
    config = kwargs.pop("config", None)
    if not isinstance(config, PretrainedConfig):
        place = {key: kwargs[key] for key in PLACE if key in kwargs}
        config = AutoConfig.from_pretrained(config or name, **place)
    made_by = low_bit_settings(config, name, settings)
    if made_by is not None and made_by.takes_over:
        config.quantization_config = made_by.to_dict()
    elif made_by is not None:
        kwargs["quantization_config"] = made_by
    return auto_class.from_pretrained(name, config=config, use_safetensors=True, **kwargs)


def low_bit_settings(
    config: PretrainedConfig, name: str, settings: LowBitConfig | None
) -> LowBitConfig | None:
    """How a low-bit base is made of the checkpoint ``name``; None where it is one already.

    ValueError for settings that are missing, or that a quantised checkpoint has no use for.
    """
    stored = stored_settings(config)
    if stored is None:
        if settings is None:
            raise ValueError(
                f"the checkpoint {name} is not quantised, so `settings` must say how to make a "
                "low-bit base of it, such as LowBitConfig(bits=4)"
            )
        return settings
    if settings is not None:
        raise ValueError(
            f"`settings` must be None for {name}, which is already quantised by "
            f"{stored.get('quant_method')!r}: its integers are kept as they are"
        )
    if stored.get("quant_method") == METHOD:
        return None
    find_layout(stored)
    return LowBitConfig(source=stored)


def stored_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """The quantization config of a checkpoint, that of its language model included; None: plain."""
    for part in (config, config.get_text_config(decoder=True)):
        stored = getattr(part, "quantization_config", None)
        if stored is not None:
            return stored if isinstance(stored, dict) else stored.to_dict()
    return None


class Takeover:
    """Makes the low-bit layers of one checkpoint while transformers reads it."""

    def __init__(self, model: PreTrainedModel, settings: dict[str, Any], files: list[str]) -> None:
        self.settings, self.layout = settings, find_layout(settings)
        check_signed(files)
        self.formats: dict[str, WeightFormat] = {}  # of what was made
        self.errors: list[str] = []
        self.dtype, self.scale_dtypes = model.dtype, set[torch.dtype]()
        self.found = self._look_into(files, model)
        parts = [rf"\.{part}$" for part in self.layout.parts]
        self.converter = WeightConverter(parts, ".weight", [_TakeOver(self)])

    def _look_into(self, files: list[str], model: PreTrainedModel) -> set[str]:
        """Names of the quantised modules in the files; ValueError for none, or a bias left over."""
        keys: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                keys |= dict.fromkeys(opened.keys(), file)
        ending = f".{self.layout.parts[0]}"
        found = {key.removesuffix(ending) for key in keys if key.endswith(ending)}
        if not found:
            raise ValueError(
                f"config.json calls this a {self.layout.name} checkpoint, but its files have no "
                f"`{self.layout.parts[0]}` tensor; they belong to another checkpoint"
            )
        # Some tools give each module a bias of zeros that the model has no place for.
        for name in found:
            bias = f"{name}.bias"
            if bias not in keys or not _lacks_bias(model, name):
                continue
            with safe_open(keys[bias], framework="pt") as opened:
                if opened.get_tensor(bias).any():
                    raise ValueError(
                        f"the checkpoint has a bias for `{name}` that is not zero, but "
                        f"{type(model).__name__} has none there; its config.json belongs to "
                        "another architecture"
                    )
        return found

    def take(
        self, model: nn.Module, name: str, tensors: dict[str, Tensor]
    ) -> DowncastLinear | None:
        """The layer made of ``tensors``; None, and the reason kept, where they do not fit."""
        linear = model.get_submodule(name)
        try:
            made = self._layer(linear, tensors)
        except ValueError as error:
            # An exception here would end as a conversion that "encountered some issues".
            self.errors.append(f"`{name}`: {error}")
            return None
        self.formats[name] = made.format
        return made

    def _layer(self, linear: nn.Module, tensors: dict[str, Tensor]) -> DowncastLinear:
        transposed = isinstance(linear, Conv1D)
        if not isinstance(linear, Plain):
            raise ValueError(f"it is a {type(linear).__name__}, not a linear layer")
        rows, columns = linear.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        taken = self.layout.take(tensors, shape, self.settings)
        made = layer_class(linear)(
            shape[1],
            shape[0],
            taken.format,
            bias=getattr(linear, "bias", None),
            dtype=linear.weight.dtype,
            base_dtype=linear.weight.dtype,
            first_range=f"taken over from {self.layout.name}",
            is_conv1d=transposed,
            device=taken.phi.device,
        )
        made.stand_for(linear)
        made.fill(taken.phi, taken.scale.float(), taken.zero_point)
        self.scale_dtypes.add(taken.scale.dtype)
        return made

    def finish(self, config: LowBitConfig) -> None:
        """Fills ``config`` with what most layers have; ValueError unless all were taken over."""
        if self.errors:
            more = f" (and {len(self.errors) - 1} more)" if len(self.errors) > 1 else ""
            raise ValueError(f"{self.layout.name} cannot be taken over: {self.errors[0]}{more}")
        if len(self.formats) != len(self.found):
            left = {n for n in self.found if not any(_is_same(n, made) for made in self.formats)}
            raise ValueError(
                f"the checkpoint has {self.layout.name} weights for {some(left or self.found)}, "
                "which the model has no linear layer for"
            )
        for other in self.scale_dtypes - {self.dtype, torch.float32}:
            logger.warning(
                f"The scales of this checkpoint are {DTYPE_NAMES[other]}, but the model is "
                f"{DTYPE_NAMES[self.dtype]}. Each weight is rounded once to that, while "
                f"{self.layout.name} loaders may round twice; load with dtype={other} to compute "
                "exactly what they do."
            )
        formats = list(self.formats.values())
        usual = max(formats, key=formats.count)
        config.downcast = "int"
        config.scale_dtype = cast("Any", usual.scale_dtype)
        config.bits, config.symmetric = usual.grid.bits, usual.grid.symmetric
        config.group_size = usual.grid.group_size
        config.target_modules = sorted(self.formats)


def _lacks_bias(model: nn.Module, name: str) -> bool:
    try:
        return getattr(model.get_submodule(name), "bias", None) is None
    except AttributeError:
        return False  # called differently here; what is loaded decides


def _is_same(stored: str, made: str) -> bool:
    """Whether two names differ at most by the prefix of the base model."""
    return f".{stored}".endswith(f".{made}") or f".{made}".endswith(f".{stored}")


class _TakeOver(ConversionOps):
    """Puts a `DowncastLinear` in place of the module whose tensors have arrived."""

    def __init__(self, takeover: Takeover) -> None:
        # By this name transformers knows that the tensors must come as they are stored.
        self.hf_quantizer = takeover

    def __deepcopy__(self, memo: dict[int, Any]) -> _TakeOver:
        return self  # transformers copies a converter for each module; the record is shared

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        tensors = {
            pattern.removeprefix(r"\.").removesuffix("$"): value[0]
            if isinstance(value, list)
            else value
            for pattern, value in input_dict.items()
        }
        weight: str = kwargs["full_layer_name"]
        name = weight.rpartition(".")[0]
        made = self.hf_quantizer.take(kwargs["model"], name, tensors)
        kwargs["missing_keys"].discard(weight)
        if made is not None:
            put(kwargs["model"], name, made)
        return {}


def put(model: nn.Module, name: str, made: DowncastLinear) -> None:
    """Puts a filled layer in place of a plain module while transformers loads."""
    # transformers initialises what does not have this mark.
    for part in (made, made.phi, made.scale0, made.zero_point):
        if part is not None:
            vars(part)["_is_hf_initialized"] = True
    set_layer(model, name, made)
