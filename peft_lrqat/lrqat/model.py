"""The LR-QAT tuner: replaces the layers of a model, and loads and merges what they hold."""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import (
    BaseTuner,
    _maybe_include_all_linear_layers,
    cast_adapter_dtype,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..activations import attention
from ..base.downcast import DowncastLinear
from ..base.embedding import DowncastEmbedding, Ends, TiedHead, input_embedding, untie_head
from ..base.experts import (
    DowncastExperts,
    ExpertWeights,
    expert_weights,
    find_experts,
    fuse_experts,
    put_expert_weights,
)
from ..base.settings import ALL_EXPERTS, HEADS
from ..quant.grid import DTYPE_NAMES, SCALE_DTYPES
from ..shared.routers import is_router
from ..shared.tensor_cache import TensorCache
from . import loading
from .embedding import LRQATEmbedding
from .experts import LRQATExperts
from .layer import LRQATLayer, LRQATLinear
from .low_bit import (
    check_saved_modules,
    check_trained_tokens,
    is_low_bit,
    low_bit_layers,
    made_from,
    put_embeddings,
    take_embeddings,
    take_grids,
)
from .one_rate import one_rate
from .packed_factors import unpack_factors
from .targets import (
    TASKS_WITH_HEADS,
    Plan,
    check_target,
    in_features,
    plan,
)


if TYPE_CHECKING:
    from .config import LRQATConfig

logger = logging.get_logger(__name__)
# A model of fewer weights is quantised in a few seconds.
SHOWN_WEIGHTS = 2**26
# Of dense weights that inference without merging may hold.
CACHE_BYTES = 2**30


class LRQATModel(BaseTuner):
    """Replaces the target layers of a model by LR-QAT layers.

    Made by ``get_peft_model(model, LRQATConfig(...))``.
    """

    prefix: str = "lrqat_"
    tuner_layer_cls = LRQATLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Read while PEFT's initializer injects the first adapter. One cache for the whole model,
        # whichever tuner object put the first layer there.
        layers = [module for module in model.modules() if isinstance(module, LRQATLinear)]
        shared = layers[0].cache if layers else None
        self._cache: TensorCache = shared or TensorCache(CACHE_BYTES)
        self._plan: Plan | None = None
        self._experts: tuple[str, ...] = ()
        self._progress = logging.tqdm(disable=True)
        super().__init__(model, *args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter as PEFT does; shows the progress if it takes long."""
        if is_low_bit(model) or self.peft_config[adapter_name].embedding_bits is not None:
            # The grids of this base must not be taken for the user's word on another model.
            self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        try:
            with warnings.catch_warnings():
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._progress.close()
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LRQATLayer)]
        own = [name for name, layer in layers if adapter_name in layer.lrqat_A]
        grid = self.peft_config[adapter_name].kv_cache_grid
        attention.add_adapter(model, adapter_name, grid, own)
        one_rate.watch(model)

    def _prepare_adapter_config(
        self, peft_config: LRQATConfig, model_config: dict[str, Any]
    ) -> LRQATConfig:
        """PEFT's choice of targets, with a warning if it leaves most of the model unquantised."""
        if peft_config.target_modules is None and peft_config.target_parameters:
            peft_config.target_modules = []
        chosen = peft_config.target_modules is not None
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if not chosen:
            names: Any = peft_config.target_modules
            logger.warning(
                "`target_modules` is not set: only "
                f"{names if isinstance(names, str) else sorted(names)}, PEFT's choice for LoRA, "
                "will be quantised. To quantise the whole model, use `target_modules='all-linear'`"
            )
        return peft_config

    def _prepare_model(self, peft_config: LRQATConfig, model: nn.Module) -> None:
        """Looks at every target before any is replaced: a refusal leaves the model as it was."""
        all_linear = peft_config.target_modules == "all-linear"
        frozen = low_bit_layers(model)
        peft_config.base_made_from = made_from(model)
        ends = take_embeddings(peft_config, model)
        weights = () if ends is None else ends.weights
        tied = _tied_names(ends)
        low_bit = {*frozen, *weights, *tied}
        check_saved_modules(peft_config, low_bit)
        if all_linear and frozen:
            stacked = {n for n, layer in frozen.items() if isinstance(layer, DowncastExperts)}
            peft_config.target_modules = cast(Any, set(frozen) - set(weights) - stacked)
            if peft_config.target_parameters is None and stacked:
                peft_config.target_parameters = sorted(stacked)
        experts = find_experts(model, peft_config)
        if peft_config.target_parameters == ALL_EXPERTS or not experts:
            asked = bool(peft_config.target_parameters)
            peft_config.target_parameters = list(experts) if asked else None
        if len(experts) < len(expert_weights(model)):
            # PEFT counts modules alone; `inject_adapter` ends what this begins.
            warnings.filterwarnings("ignore", "You have passed exclude_modules")
        _maybe_include_all_linear_layers(peft_config, model)
        if all_linear:
            heads = HEADS if peft_config.task_type in TASKS_WITH_HEADS else ()
            # PEFT trains in full what ends so, such as DistilBERT's `pre_classifier`.
            saved = tuple(peft_config.modules_to_save or ())
            names = [
                name
                for name in peft_config.target_modules or ()
                if not name.endswith(saved) and not is_router(model.get_submodule(name))
            ]
            peft_config.target_modules = cast(Any, set(names).difference(heads))
        if ends is not None:
            self._take_targets(peft_config, ends)
        frozen = {
            name: layer
            for name, layer in frozen.items()
            if name in experts or self._check_target_module_exists(peft_config, name)
        }
        if frozen:
            take_grids(peft_config, frozen)
        self._plan = plan(
            model,
            peft_config,
            # PEFT's answer is a bool, or what a regular expression found.
            lambda name: (
                name not in tied and bool(self._check_target_module_exists(peft_config, name))
            ),
            weights,
            experts,
        )
        self._experts = tuple(experts)
        check_trained_tokens(peft_config, model, {*low_bit, *self._plan.targets})
        # The user's own config, which may serve for several models: what is found in this one must
        # not be taken for the user's word at the next.
        peft_config.base_dtype_found = bool(self._plan.targets) and peft_config.base_dtype_is_open
        peft_config.base_dtype = self._plan.base_dtype
        peft_config.base_dtype_pattern = dict(self._plan.base_dtype_pattern)
        if ends is not None:
            put_embeddings(peft_config, cast(PreTrainedModel, model), ends, self._plan.targets)
        self._progress = logging.tqdm(
            total=self._plan.weights,
            desc="quantising",
            unit_scale=True,
            disable=self._plan.weights < SHOWN_WEIGHTS,
        )

    def _take_targets(self, config: LRQATConfig, ends: Ends) -> None:
        """Adds the ends to the targets if they are to be trained."""
        asked = {
            name
            for name in (ends.embedding, ends.head)
            if name is not None and self._check_target_module_exists(config, name)
        }
        missing = set(ends.weights) - asked
        if config.train_embeddings and missing:
            names: Any = config.target_modules
            if isinstance(names, str):
                names = "|".join([f"(?:{names})", *map(re.escape, sorted(missing))])
            else:
                names = {*(names or ()), *missing}
            config.target_modules = names
        elif ends.tied and ends.embedding not in asked and ends.head in asked:
            raise ValueError(
                f"`{ends.head}` computes with the integers of `{ends.embedding}`, to which it is "
                f"tied; name that in `target_modules`, or set `train_embeddings=True`"
            )

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
        if isinstance(target, TiedHead):
            return  # it computes with what stands in the place of the embedding
        if self._plan is None or current_key not in self._plan.targets:
            # A state dict, and not the config, named it.
            check_target(current_key, target, peft_config)
        if isinstance(target, LRQATLinear):
            target.update_layer(adapter_name, peft_config)
            return
        format = peft_config.weight_format(current_key, in_features(target))
        kind: type[LRQATLinear] = LRQATLinear
        if isinstance(target, DowncastExperts | ExpertWeights):
            kind = LRQATExperts
        elif isinstance(target, DowncastEmbedding):
            kind = LRQATEmbedding
        base_dtype = SCALE_DTYPES[
            peft_config.base_dtype_of(current_key) or DTYPE_NAMES[cast(Tensor, target.weight).dtype]
        ]
        module = kind(
            cast(Any, target),
            adapter_name,
            format,
            peft_config,
            base_dtype,
            current_key,
            self._cache,
        )
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)
        self._progress.update(module.out_features * module.in_features)

    def _inject_parameters(
        self,
        peft_config: LRQATConfig,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
    ) -> list[str]:
        """Adds an adapter to the weights of experts; returns the names of their parameters."""
        present = expert_weights(model)
        for name in self._experts:
            weights = present[name]
            if isinstance(weights, ExpertWeights):
                put_expert_weights(model, name, weights)
            owner, _, kind = name.rpartition(".")
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(
                    peft_config, adapter_name, weights, kind, model.get_submodule(owner), name
                )
        return list(self._experts)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Puts a module in its place; it brings its own weight and is on the right device.

        What accelerate does around the call of the old one, it does around that of the new one.
        """
        setattr(parent, child_name, new_module)
        hook = getattr(child, "_hf_hook", None)
        if hook is not None:
            remove_hook_from_module(child)
            add_hook_to_module(new_module, hook)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """NotImplementedError: LR-QAT adapters are not mixed. The message says what to do."""
        raise NotImplementedError(
            "`add_weighted_adapter` adds what adapters add to a weight, but an LR-QAT adapter acts "
            "inside the rounding: a sum of two is no weight on the grid. Train one adapter on the "
            "data of both, or merge one and train LoRA adapters on the result, which can be mixed"
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; with the last one that rounds keys and values, attention is plain."""
        super().delete_adapter(adapter_name)
        attention.delete_adapter(self.model, adapter_name)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        low_bit = is_low_bit(self.model)
        config: Any = getattr(self.model, "config", None)
        tied = getattr(config, "tie_word_embeddings", None)
        shared = any(isinstance(module, TiedHead) for module in self.model.modules())
        with warnings.catch_warnings():
            if shared:
                # PEFT compares the places of the two weights, which are made when it asks.
                warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if shared:
            config.tie_word_embeddings = tied  # PEFT does not see that they share integers
        fuse_experts(model)
        if merge:
            _embeddings_follow(model)
        if low_bit and not any(isinstance(m, DowncastLinear) for m in model.modules()):
            model.hf_quantizer.remove_quantization_config(model)
        attention.merge(model)
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, TrainableTokensLayer):
                cast_adapter_dtype(module, adapter_name, autocast_adapter_dtype)
        # The factors and scales are created in float32, and shortened only on request.
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, LRQATLayer):
                    module.cast_adapter(adapter_name)

    def set_cache_limit(self, limit: int) -> None:
        """Bytes of dense weights that generation without merging may hold (default 1 GiB).

        0 holds none. The cache starts empty. In evaluation mode and without gradients, a short
        input leaves the weight that it made for the next call, which uses it if the adapter's
        values are still the same. A step of training drops it. Layers that find no room make
        their weight at every call.
        """
        self._cache.set_limit(limit)

    def unload(self) -> nn.Module:
        """The low-bit base without its adapters; ValueError, and no change, for another model."""
        if is_low_bit(self.model):
            return self._unload_and_optionally_merge(merge=False)
        raise ValueError(
            "unload() cannot give the original weights back: LR-QAT replaced them by low-bit ones. "
            "Load the base model again, or use merge_and_unload() for the quantised model"
        )

    def _check_tied_modules(self, model: nn.Module, peft_config: LRQATConfig) -> None:
        if peft_config.embedding_bits is None:  # otherwise the two share their integers
            super()._check_tied_modules(model, peft_config)

    def _check_merge_allowed(self) -> None:
        if not any(isinstance(module, TiedHead) for module in self.model.modules()):
            super()._check_merge_allowed()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LRQATConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping; refuses a file that is not whole or not for this base model."""
        if config.packed_factors is not None:
            state_dict = unpack_factors(config, state_dict)
            config = copy.copy(config)
            config.packed_factors = None  # saved again, they are plain
        state_dict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        if not config.verify_base:
            state_dict = loading.adopt_base(model, adapter_name, state_dict)
        loading.check(model, config, adapter_name, state_dict)
        cast(Any, model).peft_config[adapter_name] = config
        return state_dict


def _tied_names(ends: Ends | None) -> set[str]:
    return {ends.head} if ends is not None and ends.tied and ends.head is not None else set()


def _embeddings_follow(model: nn.Module) -> None:
    """Makes the embeddings of a merged model plain, if all of its other layers are."""
    if not isinstance(model, PreTrainedModel):
        return
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DowncastLinear)}
    ends = [input_embedding(model), model.get_output_embeddings()]
    if any(not any(layer is end for end in ends) for layer in layers.values()):
        return
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_plain(layer.stored_weight()))
    if not isinstance(input_embedding(model), DowncastLinear):
        untie_head(model)
