"""The LORAQUANT tuner: compares adapter and model, wraps the layers, checks what is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.model import _get_encoder
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..quant.factors.storage import check_rank
from ..shared.tensor_cache import TensorCache
from .layer import BASE, LoRAQuantEmbedding, LoRAQuantLayer, LoRAQuantLinear
from .mixed import Rows, modules_now, rows_run_on


if TYPE_CHECKING:
    from .config import LoRAQuantConfig


class LoRAQuantModel(BaseTuner):
    """Wraps the target layers of a model in LORAQUANT layers.

    ``PeftModel.from_pretrained`` makes it.
    """

    prefix: str = "loraquant_"
    tuner_layer_cls = LoRAQuantLayer
    # PEFT's own table, which users may extend; its tuners annotate it more narrowly than it is.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def set_cache_limit(self, limit: int) -> None:
        """Limits the bytes of expanded factors that all layers keep between forward passes.

        0 keeps none. The default is 256 MiB.
        """
        self._cache.set_limit(limit)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """NotImplementedError: packed factors are not mixed. The message says how to do it."""
        raise NotImplementedError(
            "`add_weighted_adapter` mixes the factors of LoRA adapters, and those of a LORAQUANT "
            "adapter are packed. Make LoRA adapters of them with "
            "`peft_lrqat.dequantize_adapter(folder, lora_folder)`, mix these, and pack the result "
            "with `peft_lrqat.quantize_adapter`"
        )

    def _check_new_adapter_config(self, config: LoRAQuantConfig) -> None:
        """Raises ValueError for an adapter that cannot be run, before anything is changed."""
        super()._check_new_adapter_config(config)
        if not config.component_bits:
            raise ValueError(
                "`component_bits` is empty: a LORAQUANT adapter is not created on a model, but "
                "made from a trained LoRA adapter. Use "
                "`peft_lrqat.loraquant.quantize_adapter(lora_folder, output_folder, config)` and "
                "load the result with `PeftModel.from_pretrained`"
            )
        if not config.inference_mode:
            raise ValueError(
                "a LORAQUANT adapter cannot be trained, its factors are integers: load it with "
                "is_trainable=False, or train the LoRA adapter further and quantise it again"
            )

    def _prepare_model(self, peft_config: LoRAQuantConfig, model: nn.Module) -> None:
        """Checks every target before any is replaced: a refusal must leave the model unchanged."""
        _maybe_include_all_linear_layers(peft_config, model)
        inside = tuple(
            f"{name}."
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        )
        targets = {
            name: module
            for name, module in model.named_modules()
            if name
            and not name.startswith(inside)
            and self._check_target_module_exists(peft_config, name)
        }
        _compare(set(targets), set(peft_config.component_bits))
        for name, module in targets.items():
            _layer_class(name, module)
            _check_shape(name, module, peft_config)
        # One cache for the whole model, whichever tuner object made the first layer.
        layers = (module for module in model.modules() if isinstance(module, LoRAQuantLayer))
        self._cache = next((layer._cache for layer in layers), None) or TensorCache()

    def _create_and_replace(
        self,
        peft_config: LoRAQuantConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, LoRAQuantLayer):
            layer = target
        else:
            layer = _layer_class(current_key, target)(
                target, current_key, self._cache, get_quantization_kwargs(self.model)
            )
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, peft_config)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Replaces a module, also one inside a wrapper of trained tokens.

        PEFT's method also hands the weight on, but such a wrapper only computes it: merging would
        fail.
        """
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Makes nothing trainable, not even biases that were trained."""
        model.requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keeps the scales in the dtype in which they are stored."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names`` on to the layers, as the same method of LoRA does."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if unknown := set(names) - set(self.peft_config) - {BASE}:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        # Beams add rows to the batch, except in the encoder of an encoder-decoder model.
        encoder = _get_encoder(self.model)
        in_encoder = set() if encoder is None else set(modules_now(encoder))
        rows = Rows(tuple(names), beams, frozenset(in_encoder))
        with rows_run_on(rows, self, LoRAQuantLayer):
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: LoRAQuantConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Remaps the names as PEFT does, then checks the tensors before anything is loaded.

        Raises ValueError for a file that is not whole, or not for this base model.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        _check_saved_adapter(model, config, adapter_name, state_dict)
        return state_dict


def _compare(targets: set[str], stored: set[str]) -> None:
    """Raises ValueError unless the adapter has components for all its targets and no others."""
    for missing, has, lacks in (
        (stored - targets, "`component_bits`", "this model has no such target"),
        (targets - stored, "`target_modules` of this model", "`component_bits` has nothing for it"),
    ):
        if missing:
            raise ValueError(
                f"{has} has `{min(missing)}`, but {lacks} ({len(missing)} such modules in all): "
                "the adapter is for another base model, or its configuration was changed"
            )


def _check_shape(name: str, module: nn.Module, config: LoRAQuantConfig) -> None:
    """Raises ValueError if the components are for another shape.

    The sizes in the file alone would let (m, n) pass for (n, m).
    """
    layer = module if isinstance(module, LoRAQuantLayer) else None
    features = (layer.in_features, layer.out_features) if layer else _get_in_out_features(module)
    columns, rows = features
    if columns is None or rows is None:
        raise TypeError(
            f"`{name}` is a {type(module).__qualname__} whose shape PEFT does not know; use the "
            "LoRA adapter itself for this model"
        )
    stored = config.shapes.get(name, [rows, columns])
    if list(stored) != [rows, columns]:
        raise ValueError(
            f"the adapter was made for a `{name}` of shape ({stored[0]}, {stored[1]}), but this "
            f"model's is ({rows}, {columns}): it is for another base model"
        )
    try:
        check_rank(config.packed_format(name, rows, columns), config.rank_of(name))
    except ValueError as error:
        raise ValueError(f"the adapter does not fit `{name}`: {error}") from None


def _layer_class(name: str, module: nn.Module) -> type[LoRAQuantLayer]:
    """Returns the class of layer for ``module``; raises TypeError if LORAQUANT cannot wrap it."""
    if isinstance(module, LoRAQuantLayer):
        return type(module)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"`{name}` already carries an adapter of another type ({kind}); load the two on "
            "separate base models, or dequantise the LORAQUANT adapter to LoRA first"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return LoRAQuantEmbedding
    if isinstance(module, nn.Linear | Conv1D) or _is_quantized_linear(module):
        return LoRAQuantLinear
    raise TypeError(
        f"`{name}` is a {kind}; LORAQUANT works on torch.nn.Linear, also quantised, on "
        "transformers' Conv1D and on torch.nn.Embedding without max_norm. Use the LoRA adapter "
        "itself for this model"
    )


def _is_quantized_linear(module: nn.Module) -> bool:
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def _check_saved_adapter(
    model: nn.Module, config: LoRAQuantConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Raises ValueError unless ``state_dict`` is what the configuration describes.

    Every tensor of the adapter must be there, and no other.
    """
    known = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRAQuantLayer) or adapter_name not in layer.loraquant_codes:
            continue
        keys = {kind: f"{name}.{kind}.{adapter_name}" for kind in layer.tensor_names}
        found = {kind: state_dict[key] for kind, key in keys.items() if key in state_dict}
        layer.check(adapter_name, found)
        known |= {keys[kind] for kind in found}
        has_bias = getattr(layer.base_layer, "bias", None) is not None
        if config.bias != "none" and has_bias and f"{name}.base_layer.bias" not in state_dict:
            raise ValueError(
                f"the stored adapter has no bias for `{layer.name}`, but `bias` is {config.bias!r}"
            )
    for key in state_dict:
        if ".loraquant_" in key and key not in known:
            raise ValueError(
                f"the stored adapter has `{key}`, but its configuration puts nothing there in this "
                "model; its files were changed, or are for another base model"
            )
