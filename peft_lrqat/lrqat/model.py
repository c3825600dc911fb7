"""The LR-QAT tuner: finds the targets, refuses what cannot be done, replaces the layers, checks what is loaded."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..activations.attention import check_attention, route_attention, unroute_attention
from ..base.downcast import range_name
from ..quant.grid import SCALE_DTYPES
from ..shared.tensor_cache import TensorCache
from .layer import LRQATLayer, LRQATLinear
from .packed_factors import unpack_factors


if TYPE_CHECKING:
    from .config import LRQATConfig

logger = logging.get_logger(__name__)
# A model of fewer weights is quantised in a few seconds.
SHOWN_WEIGHTS = 2**26
# Of dense weights that inference without merging may hold.
CACHE_BYTES = 2**30
DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


class LRQATModel(BaseTuner):
    """Replaces the target layers of a model by LR-QAT layers; made by ``get_peft_model(model, LRQATConfig(...))``."""

    prefix: str = "lrqat_"
    tuner_layer_cls = LRQATLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_adapter_config(
        self, peft_config: LRQATConfig, model_config: dict[str, Any]
    ) -> LRQATConfig:
        """As PEFT's; says so where its default leaves most of the model unquantised."""
        chosen = peft_config.target_modules is not None
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if not chosen:
            names = peft_config.target_modules
            logger.warning(
                f"`target_modules` is not set: only {names if isinstance(names, str) else sorted(names)}, PEFT's choice for LoRA, "
                "will be quantised. To quantise the whole model, use `target_modules='all-linear'`"
            )
        return peft_config

    def _prepare_model(self, peft_config: LRQATConfig, model: nn.Module) -> None:
        """Looks at every target before any is replaced: a refusal must leave the model as it was."""
        all_linear = peft_config.target_modules == "all-linear"
        _maybe_include_all_linear_layers(peft_config, model)
        if all_linear and peft_config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
            # PEFT trains these heads in full, but leaves them out of "all-linear" for SEQ_CLS only.
            peft_config.target_modules -= {"classifier", "score", "qa_outputs"}
        # PEFT's answer is a bool, or what a regular expression found.
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and self._check_target_module_exists(peft_config, name)
        }
        targets = {
            name: module
            for name, module in targets.items()
            if not any(n in targets for n in _tuner_parents(name, model))
        }
        layers = (module for module in model.modules() if isinstance(module, LRQATLinear))
        self._cache = next((layer._cache for layer in layers), None) or TensorCache(CACHE_BYTES)
        tied = _tied_weights(model, targets)
        for name, module in targets.items():
            _check_target(name, module, peft_config, tied)
        if peft_config.kv_cache_bits is not None:
            check_attention(
                model, [model.get_submodule(name.rpartition(".")[0]) for name in targets]
            )
        self._checked = set(targets)
        weights = sum(
            module.weight.numel()
            for module in targets.values()
            if not isinstance(module, LRQATLinear)
        )
        self._progress = logging.tqdm(
            total=weights, desc="quantising", unit_scale=True, disable=weights < SHOWN_WEIGHTS
        )
        _check_patterns(peft_config, targets)
        # PEFT keeps the user's own config object, which may serve for several models: what was filled in for one of them must
        # not be taken for the user's word at the next.
        if targets and _base_dtype_is_open(peft_config):
            dtypes = {name: DTYPE_NAMES[_base_dtype(module)] for name, module in targets.items()}
            ((most, _),) = Counter(dtypes.values()).most_common(1)
            peft_config.base_dtype = most
            peft_config.base_dtype_pattern = {
                name: dtype for name, dtype in dtypes.items() if dtype != most
            }
            peft_config.base_dtype_filled_in = True
        _warn_of_untouched_experts(model)
        _warn_of_different_targets(model, targets)

    def _create_and_replace(
        self,
        peft_config: LRQATConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if current_key not in self._checked:
            _check_target(current_key, target, peft_config, set())
        if isinstance(target, LRQATLinear):
            target.update_layer(adapter_name, peft_config)
            return
        format = peft_config.weight_format(current_key, _in_features(target))
        base_dtype = SCALE_DTYPES[
            peft_config.base_dtype_of(current_key) or DTYPE_NAMES[target.weight.dtype]
        ]
        module = LRQATLinear(
            target, adapter_name, format, peft_config, base_dtype, current_key, self._cache
        )
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)
        # PEFT holds every replaced module until the last one is done; their weights need not wait.
        self._progress.update(target._parameters.pop("weight").numel())

    def _post_injection_hook(
        self, model: nn.Module, config: LRQATConfig, adapter_name: str
    ) -> None:
        if config.kv_cache_bits is not None:
            route_attention(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; with the last adapter that rounded keys and values goes the way through which it did."""
        routed = (
            self.peft_config[adapter_name].kv_cache_bits is not None
            if adapter_name in self.peft_config
            else False
        )
        super().delete_adapter(adapter_name)
        if routed and all(config.kv_cache_bits is None for config in self.peft_config.values()):
            unroute_attention(self.model)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; a model that takes long shows how far it is."""
        try:
            return super().inject_adapter(*args, **kwargs)
        finally:
            if (progress := self.__dict__.pop("_progress", None)) is not None:
                progress.close()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The factors and scales are created in float32; only an explicit `autocast_adapter_dtype=False` shortens them.
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, LRQATLayer):
                    module.cast_adapter(adapter_name)

    def set_cache_limit(self, limit: int) -> None:
        """Bytes of dense weights that generation without merging may hold (default 1 GiB); starts empty. 0: none.

        In evaluation mode and without gradients, short inputs leave the weight that they made for the next call, which takes it
        if the adapter's values are still the same. A step of training drops it. Layers that find no room make theirs at every call.
        """
        self._cache.set_limit(limit)

    def unload(self) -> nn.Module:
        """Refused: ValueError, and the model stays as it is."""
        raise ValueError(
            "unload() cannot give the original weights back: LR-QAT replaced them by low-bit ones. Load the base model again, or "
            "use merge_and_unload() for the quantised model"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LRQATConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping; then refuses, before anything is loaded, a file that is not whole or not for this base model."""
        if config.packed_factors is not None:
            state_dict = unpack_factors(config, state_dict)
            config.packed_factors = None  # saved again, they are plain
        state_dict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        _check_saved_adapter(model, config, adapter_name, state_dict)
        return state_dict


def _in_features(module: nn.Linear | Conv1D | LRQATLinear) -> int:
    return module.nx if isinstance(module, Conv1D) else module.in_features


def _base_dtype(module: nn.Linear | Conv1D | LRQATLinear) -> torch.dtype:
    return module.base_layer.base_dtype if isinstance(module, LRQATLayer) else module.weight.dtype


def _base_dtype_is_open(config: LRQATConfig) -> bool:
    return config.base_dtype is None or config.base_dtype_filled_in


def _check_patterns(config: LRQATConfig, targets: dict[str, nn.Module]) -> None:
    """Raises ValueError for a key of a pattern that fits no target: a slip there would train at other bits in silence."""
    for field in ("bits_pattern", "group_size_pattern"):
        for key in getattr(config, field):
            if targets and not any(_fits(key, name) for name in targets):
                raise ValueError(
                    f"`{field}` has {key!r}, which is the name of no target module, such as `{min(targets)}`"
                )


def _fits(key: str, name: str) -> bool:
    """As PEFT's ``get_pattern_key`` reads a pattern."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _tuner_parents(name: str, model: nn.Module) -> list[str]:
    """The ancestors of a module that are tuner layers: what lies inside one is not a target of its own."""
    parents = [name[:i] for i, character in enumerate(name) if character == "."]
    return [parent for parent in parents if isinstance(model.get_submodule(parent), BaseTunerLayer)]


def _tied_weights(model: nn.Module, targets: dict[str, nn.Module]) -> set[str]:
    """The targets whose weight is also used by a module that is no target, such as a head tied to the embedding."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    own = Counter(
        id(w) for m in targets.values() if isinstance(w := getattr(m, "weight", None), nn.Parameter)
    )
    return {
        name
        for name, m in targets.items()
        if isinstance(w := getattr(m, "weight", None), nn.Parameter) and uses[id(w)] > own[id(w)]
    }


def _check_target(name: str, module: nn.Module, config: LRQATConfig, tied: set[str]) -> None:
    """Raises TypeError for a layer of the wrong kind and ValueError for one whose weight cannot be quantised as asked."""
    if isinstance(module, LRQATLinear):
        base = module.base_layer
        wanted = [
            config.weight_format(name, module.in_features),
            range_name(config.range_estimator, config.range_p),
        ]
        present = [base.format, base.range]
        if config.verify_base and not _base_dtype_is_open(config):
            wanted.append(config.base_dtype_of(name))
            present.append(DTYPE_NAMES[base.base_dtype])
        if wanted != present:
            raise ValueError(
                f"`{name}` already holds a weight in {_in_words(present)}, which its adapters share, but this adapter asks for "
                f"{_in_words(wanted)}; use the same settings, or load the base model once more for it"
            )
        return
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    plain = isinstance(module, nn.Linear | Conv1D) and type(module).forward in (
        nn.Linear.forward,
        Conv1D.forward,
    )
    # nn.MultiheadAttention reads the weight of its output layer without calling the layer.
    plain = plain and not isinstance(module, NonDynamicallyQuantizableLinear)
    if isinstance(module, BaseTunerLayer) or not plain:
        raise TypeError(
            f"`{name}` is a {kind}; LR-QAT works on torch.nn.Linear and transformers' Conv1D that are neither quantised nor "
            "adapted already. Load the base model unquantised, or leave the module out of `target_modules`"
        )
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPE_NAMES:
        raise TypeError(
            f"`{name}` ({kind}) has a weight of {type(weight).__name__}, {weight.dtype}; LR-QAT starts from float32, bfloat16 or "
            "float16 weights. Load the base model unquantised"
        )
    if weight.device.type == "meta" or getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise ValueError(
            f"the weight of `{name}` is not in memory (meta device, or offloaded to CPU or disk): its integers cannot be made. "
            "Load the base model onto one device, without offloading"
        )
    if name in tied:
        raise ValueError(
            f"the weight of `{name}` is tied to another module's, which would be left behind; leave it out of "
            "`target_modules`, or untie it (`tie_word_embeddings=False`)"
        )
    config.weight_format(name, _in_features(module))
    if weight.numel() == 0:
        raise ValueError(
            f"the weight of `{name}` is empty, of shape {tuple(weight.shape)}; leave it out of `target_modules`"
        )
    if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise ValueError(
            f"the weight of `{name}` has NaN or infinite entries; repair the base model first"
        )


def _in_words(recipe: list[object]) -> str:
    format, first_range, *base_dtype = recipe
    grid = format.grid
    kind = "symmetric" if grid.symmetric else "asymmetric"
    words = f"bits={grid.bits}, group_size={grid.group_size}, {kind}, downcast={format.downcast}"
    return f"{words}, scale_dtype={format.scale_dtype}, first range {first_range}" + "".join(
        f", from {d}" for d in base_dtype
    )


def _warn_of_untouched_experts(model: nn.Module) -> None:
    experts = [n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n]
    if experts:
        logger.warning(
            f"{len(experts)} expert weights stay as they are, for example `{experts[0]}`: LR-QAT works on linear modules, and "
            "this model keeps its experts as 3-D parameters"
        )


def _warn_of_different_targets(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    present = {name for name, module in model.named_modules() if isinstance(module, LRQATLayer)}
    if present and present != set(targets):
        logger.warning(
            f"the adapters on this model have different targets ({len(present ^ set(targets))} layers differ, for example "
            f"`{sorted(present ^ set(targets))[0]}`): where an adapter has no factors, it runs the stored low-bit weight and not "
            "the original one. For the results that it gives alone, load it on a base model of its own"
        )


def _check_saved_adapter(
    model: nn.Module, config: LRQATConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Raises ValueError unless ``state_dict`` has every tensor of the adapter, finite, in the right shape, for this base."""
    layers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, LRQATLayer) and adapter_name in m.lrqat_A
    }
    # A model that transformers holds without PeftModel has no such prefix in its own names.
    prefix = "" if any(n.startswith("base_model.model.") for n in layers) else "base_model.model."
    other_base = []
    for name, layer in layers.items():
        for kind in (*LRQATLayer.adapter_layer_names, "lrqat_fingerprint"):
            key = f"{prefix}{name}.{kind}.{adapter_name}"
            value = state_dict.get(key, state_dict.get(key.removeprefix(prefix)))
            expected = getattr(layer, kind)[adapter_name]
            if value is None:
                raise ValueError(
                    f"the saved adapter has no `{kind}` for `{name}`; its file is not whole, or for another model"
                )
            if value.shape != expected.shape:
                raise ValueError(
                    f"`{kind}` of `{name}` has shape {tuple(value.shape)} in the saved adapter, but {tuple(expected.shape)} in "
                    "this model; the base model or `adapter_config.json` differs from the one that was trained"
                )
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(
                    f"`{kind}` of `{name}` has NaN or infinite entries in the saved adapter"
                )
            if kind == "lrqat_fingerprint" and not layer.matches_base(adapter_name, value):
                other_base.append((key, name))
    known = tuple(n + "." for n in layers)
    for key in state_dict:
        if ".lrqat_" in key and not key.removeprefix(prefix).startswith(known):
            raise ValueError(
                f"the saved adapter has `{key}`, but this model has no such layer; the base model is another one"
            )
    if not other_base:
        return
    if not config.verify_base:
        for key, name in other_base:
            state_dict[key if key in state_dict else key.removeprefix(prefix)] = torch.tensor(
                layers[name].base_layer.fingerprint
            )
        logger.warning(
            f"the adapter was trained on other base weights in {len(other_base)} layers; loaded because of `verify_base=False`"
        )
        return
    raise ValueError(
        f"this is not the base model that the adapter was trained on: {len(other_base)} of {len(layers)} layers have other frozen "
        f"weights, the first is `{other_base[0][1]}`. The adapter needs `{config.base_model_name_or_path}` in "
        f"{config.base_dtype} or wider. To load it all the same: `config = PeftConfig.from_pretrained(...)`, "
        "`config.verify_base = False`, and give `config=config` to `PeftModel.from_pretrained`"
    )
