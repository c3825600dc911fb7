"""The LORAQUANT layers: a base module and the packed factors of each adapter, expanded on use.

The base module is not changed. The arithmetic is that of PEFT's LoRA and DoRA layers, where B and A
are the expanded factors, in float32:

    LoRA    y = W x + bias + gamma B A x
    DoRA    y = f * (W x + gamma B A x) + bias,
            f = magnitude / ||W + gamma B A||, by rows of W (out, in)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..quant.factors.storage import PackedFormat, check_packed, expand
from ..shared.casts import keep_values
from ..shared.tensor_cache import TensorCache, Tensors
from .mixed import names_for


if TYPE_CHECKING:
    from .config import LoRAQuantConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BASE = "__base__"  # PEFT's name for the rows of a batch without an adapter


class LoRAQuantLayer(nn.Module, BaseTunerLayer):
    """Holds what all layers share: tensors of adapters, which of them are active, and merging."""

    adapter_layer_names: tuple[str, ...] = ()  # PEFT would make anything named here trainable
    tensor_names = (
        "loraquant_codes",
        "loraquant_scales",
        "loraquant_zero_points",
        "loraquant_magnitude",
    )
    other_param_names: tuple[str, ...] = ("format", "scaling", *tensor_names)
    # PEFT's, which nn.Module would hide from a type checker.
    set_adapter: Callable[..., None]
    active_adapters: list[str]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    _get_base_layer_device_and_dtype: Callable[..., tuple[torch.device | None, torch.dtype | None]]
    _get_embed_scale: Callable[[], Tensor | None]

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        cache: TensorCache,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name  # in the model; for the cache and for messages
        self.quantization_backend = resolve_quantization_backend(base_layer, **(quantization or {}))
        # An embedding maps from tokens.
        in_features, out_features = _get_in_out_features(base_layer)
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.format: dict[str, PackedFormat] = {}
        self.scaling: dict[str, float] = {}  # gamma
        self.loraquant_codes = BufferDict(persistent=True)
        self.loraquant_scales = BufferDict(persistent=True)
        self.loraquant_zero_points = BufferDict(persistent=True)
        self.loraquant_magnitude = BufferDict(persistent=True)  # DoRA, (out,)
        self._cache = cache
        self._checked: set[str] = set()
        self._dora_factors: dict[str, Tensor] = {}  # of merged adapters
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: LoRAQuantConfig) -> None:
        """Adds an adapter, with room for its tensors.

        They are to be loaded: until then the scales are NaN, and a forward pass is refused.
        """
        self._forget(adapter_name)
        format = config.packed_format(self.name, self.out_features, self.in_features)
        self.format[adapter_name] = format
        self.scaling[adapter_name] = config.scaling_of(self.name)
        for kind, size in format.sizes.items():
            fill = torch.nan if kind == "scales" else 0
            getattr(self, f"loraquant_{kind}")[adapter_name] = torch.full(
                (size,), fill, dtype=format.dtype(kind)
            )
        if config.use_dora:
            self.loraquant_magnitude[adapter_name] = torch.full(
                (self.out_features,), torch.nan, dtype=torch.float32
            )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=True)

    def take_over(self, adapter_name: str, other: str) -> None:
        """Makes an adapter what another one is, see `hotswap_adapter`."""
        for name, tensor in self.tensors(other).items():
            getattr(self, name)[adapter_name] = tensor
        self.format[adapter_name] = self.format[other]
        self.scaling[adapter_name] = self.scaling[other]
        self._forget(adapter_name)

    def tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """Returns the tensors of an adapter by their names on the layer."""
        return {
            name: getattr(self, name)[adapter_name]
            for name in self.tensor_names
            if adapter_name in getattr(self, name)
        }

    def check(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless ``tensors`` are those of a whole adapter of this layer.

        They are named as on the layer.
        """
        packed = {name.removeprefix("loraquant_"): tensor for name, tensor in tensors.items()}
        try:
            if adapter_name in self.loraquant_magnitude:
                check_magnitude(packed.pop("magnitude", None), self.out_features)
            check_packed(self.format[adapter_name], packed)
        except ValueError as error:
            raise ValueError(
                f"the stored adapter does not fit `{self.name}`: {error}. Its files are not whole, "
                "were changed, or are for another base model"
            ) from None

    def check_loaded(self, adapter_name: str) -> None:
        """Raises ValueError unless the tensors of a loaded adapter are whole."""
        if adapter_name in self.loraquant_codes:
            self.check(adapter_name, self.tensors(adapter_name))

    def factors(self, adapter_name: str, dtype: torch.dtype = torch.float32) -> Tensors:
        """Returns B (out, K) and A (K, in) of an adapter."""
        codes = self.loraquant_codes[adapter_name]
        cached = self._cache.get(self.name, adapter_name)
        # Another thread may have put another adapter under this name.
        if cached is not None and cached[-1] is codes and cached[0].dtype == dtype:
            return cached[0], cached[1]
        # Later calls use them, too, and may need gradients of their inputs.
        with torch.inference_mode(False), torch.no_grad():
            tensors = self.tensors(adapter_name)
            if adapter_name not in self._checked:
                # Loaders check what they load; a state dict loaded by hand is checked here.
                self.check(adapter_name, tensors)
                self._checked.add(adapter_name)
            packed = {name.removeprefix("loraquant_"): tensor for name, tensor in tensors.items()}
            B, A = expand(self.format[adapter_name], packed, dtype)
        self._cache.put(self.name, adapter_name, (B, A, codes))
        return B, A

    def get_delta_weight(self, adapter_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns gamma B A, (out, in)."""
        B, A = self.factors(adapter_name, dtype)
        return (B @ A) * self.scaling[adapter_name]

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Runs the base layer and the active adapters, as LoRA's layers do.

        ``adapter_names`` gives the adapter of each row of the batch, "__base__" for none.
        """
        adapter_names = names_for(self) if adapter_names is None else adapter_names
        if adapter_names is not None:
            self._check_mixed(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if adapter_names is None:
            for name in self.active_adapters:
                if name in self.loraquant_codes:
                    result = self._adapted(name, x, result)
            return result.to(dtype)
        # Other threads may add and delete adapters: only these are looked up.
        for name in dict.fromkeys(adapter_names):
            if name not in self.loraquant_codes:
                continue
            rows = [row for row, adapter in enumerate(adapter_names) if adapter == name]
            result[rows] = self._adapted(name, x[rows], result[rows]).to(dtype)
        return result

    def _adapted(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """Adds this adapter's part to ``result`` of the base layer, or of an adapter before it.

        The sum is in float32 or wider.
        """
        dtype = torch.promote_types(result.dtype, torch.float32)
        product = self._low_rank(x, *self.factors(adapter_name, dtype)) * self.scaling[adapter_name]
        if adapter_name not in self.loraquant_magnitude:
            return result + product
        weight, delta = self._base_weight(dtype), self.get_delta_weight(adapter_name, dtype)
        factor = self._dora_factor(adapter_name, weight, delta)
        return result + (factor - 1) * self._without_bias(result) + factor * product

    def _low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        """Returns B A x for a batch."""
        raise NotImplementedError

    def _without_bias(self, result: Tensor) -> Tensor:
        bias = getattr(self.base_layer, "bias", None)
        return result if bias is None else result - bias

    def _check_mixed(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    def _dora_factor(self, adapter_name: str, weight: Tensor, delta: Tensor) -> Tensor:
        norm = torch.linalg.norm(weight + delta, dim=1)
        return self.loraquant_magnitude[adapter_name].to(norm.dtype) / norm

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds gamma B A to the base weight, as LoRA does.

        The sum is computed in float32 and rounded once to the weight's dtype.
        """
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.loraquant_codes
        ]
        if not names:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(
                f"`{self.name}` is quantised by {self.quantization_backend.backend_name}, whose "
                "weight cannot be changed; run the adapter without merging it"
            )
        for name in names:
            weight = self._base_weight() + self.get_delta_weight(name)
            if name in self.loraquant_magnitude:
                # The norm is that of the weight without any adapter, as in the forward pass.
                factor = self._dora_factor(
                    name, self._unmerged_weight(), self.get_delta_weight(name)
                )
                self._dora_factors[name] = factor
                weight *= factor[:, None]
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(
                    # PEFT's words, which callers may match.
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self._set_base_weight(weight)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Removes the merged adapters, up to rounding, as LoRA does."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._set_base_weight(self._unmerged_weight())
        self.merged_adapters.clear()
        self._dora_factors.clear()

    def _unmerged_weight(self) -> Tensor:
        weight = self._base_weight()
        for name in reversed(self.merged_adapters):
            if name in self._dora_factors:
                weight = weight / self._dora_factors[name][:, None]
            weight = weight - self.get_delta_weight(name)
        return weight

    def _base_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight of the base layer, dequantised, (out, in)."""
        weight = self.get_base_weight()
        if weight.dtype not in FLOATS:
            raise TypeError(
                f"merging and DoRA need the weight of `{self.name}` as numbers, but it is "
                f"{weight.dtype} in a {type(self.base_layer).__qualname__} that PEFT cannot "
                "dequantise; run a plain adapter without merging it"
            )
        weight = weight.to(dtype)
        return weight.T if self._is_transposed else weight

    def _set_base_weight(self, weight: Tensor) -> None:
        dtype = self.get_base_weight().dtype
        self.set_base_weight((weight.T if self._is_transposed else weight).to(dtype).contiguous())

    @property
    def _is_transposed(self) -> bool:
        return isinstance(self.base_layer, Conv1D | nn.Embedding)

    def delete_adapter(self, adapter_name: str) -> None:
        self._forget(adapter_name)
        super().delete_adapter(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return set(self.loraquant_codes)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Moves an adapter to the device only.

        PEFT's own method would also round the scales to the base's dtype.
        """
        device = device or self._get_base_layer_device_and_dtype(self.base_layer)[0]
        if device is None or device.type == "meta":
            return
        for name, tensor in self.tensors(adapter_name).items():
            if tensor.device.type != "meta":
                getattr(self, name)[adapter_name] = tensor.to(device)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        """Drops what was derived from an adapter's tensors; it is computed again on use."""
        self._cache.drop(self.name, adapter_name)
        self._checked.discard(adapter_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRAQuantLayer:
        """Applies ``fn`` to the base layer; moves the stored tensors, but keeps their dtypes.

        This is what ``.half()`` and ``.to(dtype)`` call.
        """
        own = {
            id(tensor) for name in self.loraquant_codes for tensor in self.tensors(name).values()
        }
        keep = keep_values(fn)
        super()._apply(lambda tensor: keep(tensor) if id(tensor) in own else fn(tensor), recurse)
        for name in self.loraquant_codes:
            self._cache.drop(self.name, name)  # it is on the old device
        self._dora_factors = {name: keep(factor) for name, factor in self._dora_factors.items()}
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for name in self.loraquant_codes:
            self._forget(name)

    def __repr__(self) -> str:
        return "loraquant." + super().__repr__()


class LoRAQuantLinear(LoRAQuantLayer):
    """Wraps `nn.Linear`, transformers' `Conv1D` and quantised linear layers that PEFT knows."""

    def _low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return F.linear(F.linear(x.to(A.dtype), A), B)


class LoRAQuantEmbedding(LoRAQuantLayer):
    """Wraps `nn.Embedding`."""

    def _low_rank(self, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        product = F.embedding(x, A.T) @ B.T
        # Some embeddings (Gemma 3) are multiplied by a constant in their own forward pass.
        scale = self._get_embed_scale()
        return product if scale is None else product * scale.to(product.dtype)


def check_magnitude(magnitude: Tensor | None, length: int) -> Tensor:
    """Returns the magnitude; raises ValueError unless it is ``length`` finite numbers."""
    if magnitude is None:
        raise ValueError("the magnitude is missing")
    if (
        magnitude.shape != (length,)
        or not magnitude.is_floating_point()
        or not torch.isfinite(magnitude).all()
    ):
        raise ValueError(
            f"the magnitude must be {length} finite numbers, but is {tuple(magnitude.shape)}, "
            f"{magnitude.dtype}"
        )
    return magnitude
