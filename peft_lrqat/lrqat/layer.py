"""The LR-QAT layer: one downcast weight, and each adapter's factors and scales in the rounding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..activations.hooks import round_inputs
from ..base.downcast import DowncastLinear
from ..base.embedding import Plain, layer_class
from ..base.read_weight import ReadWeight
from ..quant import (
    Grid,
    HeldWeight,
    LowRankWeight,
    WeightFormat,
    capturing,
    fake_quant_linear,
    fake_quantize_tokens,
    quantized_codes,
    quantized_tokens,
    quantized_weight,
)
from ..shared.casts import keep_values
from ..shared.hotswap import write_into


if TYPE_CHECKING:
    from ..shared.tensor_cache import TensorCache
    from .config import LRQATConfig

# For more tokens than this, making the weight again costs little beside multiplying with it.
CACHED_TOKENS = 256


def rows_of(parts: Iterable[Tensor]) -> Tensor:
    """The parts of a layer, one below the other."""
    first, *others = parts
    return torch.cat([first, *others]) if others else first


class _ExactParameterDict(nn.ParameterDict):
    """Parameters whose values ``.half()`` and ``.to(dtype)`` leave alone: they decide which
    integers ship.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _ExactParameterDict:
        return super()._apply(keep_values(fn, widen=True), recurse)


class _Fingerprints(BufferDict):
    """Integers that are saved as they were set or loaded, even if an average wrote into them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.integers: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        super().__setitem__(key, buffer)
        if not buffer.is_meta:
            self.integers[key] = int(buffer)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.integers.pop(key, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for key in self.keys():
            value = state_dict.get(f"{prefix}{key}")
            if value is not None and not value.is_meta and value.numel() == 1:
                self.integers[key] = int(value)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, integer in self.integers.items():
            if f"{prefix}{key}" in destination:
                destination[f"{prefix}{key}"] = torch.tensor(integer, device=self[key].device)


class LRQATLayer(BaseTunerLayer):
    """What PEFT asks of a layer, and the adapters' state: `lrqat_A` (r, in), `lrqat_B` (out, r),
    `lrqat_scale` (out, groups).
    """

    adapter_layer_names: tuple[str, ...] = ("lrqat_A", "lrqat_B", "lrqat_scale")
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "pass_through",
        "verify_base",
        "lrqat_fingerprint",
        "activations",
    )

    def __init__(
        self, base_layer: DowncastLinear, name: str = "", cache: TensorCache | None = None
    ) -> None:
        self.base_layer = base_layer
        self.name, self.cache = name, cache
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}  # gamma = lora_alpha / r
        self.pass_through: dict[str, bool] = {}
        # The grid of this layer's input; None: the input stays as it is.
        self.activations: dict[str, Grid | None] = {}
        self.lrqat_A = _ExactParameterDict({})
        self.lrqat_B = _ExactParameterDict({})
        self.lrqat_scale = _ExactParameterDict({})
        # Of the downcast weight that the adapter was made for: saved with it, compared when it is
        # first used.
        self.lrqat_fingerprint = _Fingerprints({}, persistent=True)
        self.verify_base: dict[str, bool] = {}
        # The base weight, by its generation, that an adapter was compared with.
        self._verified: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def take_over(self, adapter_name: str, other: str) -> None:
        """Makes an adapter what another one is, see `hotswap_adapter`."""
        for parameters in (self.lrqat_A, self.lrqat_B, self.lrqat_scale):
            write_into(parameters, adapter_name, parameters[other])
        settings: list[dict[str, Any]] = [self.r, self.lora_alpha, self.scaling]
        for values in (*settings, self.pass_through, self.verify_base, self.activations):
            if values[adapter_name] != values[other]:
                values[adapter_name] = values[other]
        self.lrqat_fingerprint[adapter_name] = self.lrqat_fingerprint[other]
        self._verified.pop(adapter_name, None)
        self._verify_base(adapter_name)

    def update_layer(self, adapter_name: str, config: LRQATConfig) -> None:
        """Adds an adapter that starts from round-to-nearest of the downcast weight."""
        base = self.base_layer
        device = base.phi.device
        self.r[adapter_name] = config.r
        self.lora_alpha[adapter_name] = config.lora_alpha
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self.pass_through[adapter_name] = config.clipped_gradient == "pass_through"
        self.activations[adapter_name] = config.activation_grid
        shape_A, shape_B = self._factor_shapes(config)
        self.lrqat_A[adapter_name] = nn.Parameter(
            torch.empty(shape_A, dtype=torch.float32, device=device)
        )
        self.lrqat_B[adapter_name] = nn.Parameter(
            torch.zeros(shape_B, dtype=torch.float32, device=device)
        )
        self.lrqat_scale[adapter_name] = nn.Parameter(base.frozen("scale0").clone())
        # Packed factors bring theirs when they are unpacked; a loader that does not unpack them
        # leaves an adapter that refuses to run.
        packed = config.packed_factors is not None
        self.lrqat_fingerprint[adapter_name] = torch.tensor(
            -1 if packed else base.fingerprint, device=device
        )
        self._verified.pop(adapter_name, None)
        if not packed:
            self._verified[adapter_name] = base.generation
        self.verify_base[adapter_name] = config.verify_base
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _factor_shapes(self, config: LRQATConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and of B."""
        return (config.r, self.in_features), (self.out_features, config.r)

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """A Kaiming-uniform and B zero; or, with ``init_weights=False``, B such that gamma * B @ A
        has a deviation of one step.
        """
        rows = self.lrqat_A[adapter_name].data.view(-1, self.in_features)
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.lrqat_B[adapter_name])
        else:
            # The entries of A have variance 1 / (3 in).
            std = (
                math.sqrt(3 * self.in_features / self.r[adapter_name]) / self.scaling[adapter_name]
            )
            nn.init.normal_(self.lrqat_B[adapter_name], std=std)

    def low_rank_weights(self, adapter_name: str) -> Iterator[LowRankWeight]:
        """The tensors that decide the integers of this layer under one adapter, by parts that
        together make its rows; the only way to merge and export.
        """
        yield self.low_rank_weight(adapter_name)

    def low_rank_weight(self, adapter_name: str) -> LowRankWeight:
        """The same for a layer of one part, which computes with it, too."""
        self._verify_base(adapter_name)
        base = self.base_layer
        zero_point = base.frozen("zero_point")
        return LowRankWeight(
            format=base.format,
            phi=base.frozen("phi"),
            zero_point=zero_point,
            A=self.lrqat_A[adapter_name],
            B=self.lrqat_B[adapter_name],
            scale=base.format.on_grid(self.lrqat_scale[adapter_name], zero_point),
            gamma=self.scaling[adapter_name],
            dtype=base.dtype,
            pass_through=self.pass_through[adapter_name],
        )

    def _inference_weight(
        self, adapter_name: str, x: Tensor, w: LowRankWeight, part: str
    ) -> Tensor:
        """W_hat, (out, in) in the base's dtype, held from an earlier call where it is the same.

        ``part`` names it in the cache.
        """
        fingerprint = self.base_layer.fingerprint
        # A graph would go on using memory that the cache no longer holds.
        if self.cache is None or capturing():
            return quantized_weight(w)
        held: Any = self.cache.get(part, adapter_name)
        weight = None if held is None else held.current(w, fingerprint)
        if weight is not None:
            return weight
        if x.numel() > CACHED_TOKENS * self.in_features:
            return quantized_weight(w)
        held = HeldWeight.make(w, fingerprint)
        self.cache.put(part, adapter_name, held)
        return held.weight

    def _forget_weight(self, adapter_name: str, part: str) -> None:
        if self.cache is not None:
            self.cache.drop(part, adapter_name)

    def quantized_codes(self, adapter_name: str | None = None) -> Tensor:
        """The integers that ship, (out, in), int8 or (asymmetric) uint8; of the active adapter by
        default.
        """
        name = adapter_name or self._adapter_to_run()
        if name is None:
            raise ValueError("no adapter of this layer is active; give `adapter_name`")
        return rows_of(map(quantized_codes, self.low_rank_weights(name)))

    def matches_base(self, adapter_name: str, fingerprint: Tensor) -> bool:
        """Whether ``fingerprint`` of a saved adapter is that of the downcast weight here."""
        return int(fingerprint) == self.base_layer.fingerprint

    def check_loaded(self, adapter_name: str) -> None:
        """Raises ValueError unless an adapter that was loaded is finite and for this base model."""
        if adapter_name not in self.lrqat_A:
            return
        for name in self.adapter_layer_names:
            if not torch.isfinite(getattr(self, name)[adapter_name]).all():
                raise ValueError(
                    f"`{name}` of `{self.name}` has NaN or infinite entries in the saved adapter"
                )
        fingerprint = self.lrqat_fingerprint[adapter_name]
        self.lrqat_fingerprint.integers[adapter_name] = int(fingerprint)
        self._verified.pop(adapter_name, None)
        self._verify_base(adapter_name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Compares the fingerprints that come with adapters; none is left for `forward` to read."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in self.lrqat_A:
            value = state_dict.get(f"{prefix}lrqat_fingerprint.{name}")
            if value is not None and not value.is_meta and not self.matches_base(name, value):
                self._verified.pop(name, None)

    def _verify_base(self, adapter_name: str) -> None:
        verified = self._verified.get(adapter_name) == self.base_layer.generation
        if verified or not self.verify_base[adapter_name]:
            return
        # Loaders are checked when they load; a state dict that was loaded by hand passes here.
        if not self.matches_base(adapter_name, self.lrqat_fingerprint[adapter_name]):
            raise ValueError(
                f"adapter `{adapter_name}` was trained on another base model, or on this one in "
                "another dtype: its integers cannot be rebuilt from these weights. Load the base "
                "model named in its card; to go on anyway, set `verify_base=False` in its "
                "config"
            )
        self._verified[adapter_name] = self.base_layer.generation

    def _adapter_to_run(self) -> str | None:
        active = [name for name in self.active_adapters if name in self.lrqat_A]
        if len(active) > 1:
            raise ValueError(
                f"one weight has one set of integers: adapters {active} cannot be active on it "
                "together"
            )
        return active[0] if active else None

    def adapter_that_runs(self) -> str | None:
        """The adapter that decides what this layer computes now, merged or not.

        None if only the frozen weight runs.
        """
        if self.disable_adapters:
            return None
        return self.merged_adapters[0] if self.merged else self._adapter_to_run()

    def delete_adapter(self, adapter_name: str) -> None:
        self._verified.pop(adapter_name, None)
        for part in self._cached_parts():
            self._forget_weight(adapter_name, part)
        super().delete_adapter(adapter_name)

    def _cached_parts(self) -> Iterator[str]:
        """The names of this layer's dense weights in the cache."""
        yield self.name

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To the device only: PEFT's own method would round fresh scales to the base's dtype."""
        device = device or self.base_layer.phi.device
        for name in (*self.adapter_layer_names, "lrqat_fingerprint"):
            tensors = getattr(self, name)
            if adapter_name in tensors and tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(device)

    def cast_adapter(self, adapter_name: str) -> None:
        """The factors and scales to the dtype of the base weight, as PEFT's
        ``autocast_adapter_dtype=False`` asks.
        """
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                parameter = getattr(self, name)[adapter_name]
                parameter.data = parameter.data.to(self.base_layer.dtype)


class LRQATLinear(nn.Module, LRQATLayer):
    """LR-QAT on `nn.Linear`, transformers' `Conv1D`, and the layers of a low-bit base.

    It stands where ``linear`` stood and takes its weight: ``linear`` has none afterwards. A layer
    of a low-bit base becomes its base layer as it is.
    """

    def __init__(
        self,
        linear: Plain | DowncastLinear,
        adapter_name: str,
        format: WeightFormat,
        config: LRQATConfig,
        base_dtype: torch.dtype | None = None,  # the weight's own
        name: str = "",  # in the model; for the cache
        cache: TensorCache | None = None,  # the model's, of dense weights
    ) -> None:
        super().__init__()
        if isinstance(linear, DowncastLinear):
            base = linear
        else:
            base = layer_class(linear).from_linear(
                linear,
                format,
                estimator=config.range_estimator,
                p=config.range_p,
                base_dtype=base_dtype or linear.weight.dtype,
            )
            # PEFT holds every replaced module until the last one is done; weights need not wait.
            del linear.weight
        LRQATLayer.__init__(self, base, name, cache)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.project(x, *args, **kwargs)

    def _base_product(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` through the frozen or merged weight alone."""
        return self.base_layer(x, *args, **kwargs)

    def project(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x @ W_hat.T + bias``."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapter_name = self.adapter_that_runs()
        grid = None if adapter_name is None else self.activations[adapter_name]
        base = self.base_layer
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else base.dtype
        if self.merged or adapter_name is None:
            if grid is None:
                return self._base_product(x, *args, **kwargs)
            tokens = fake_quantize_tokens(x.to(dtype), grid)
            y = self._base_product(tokens, *args, **kwargs)
            return y if autocast else y.to(x.dtype)
        bias = None if base.bias is None else base.bias.to(dtype)
        if self._infers():
            tokens = x.to(dtype) if grid is None else quantized_tokens(x.to(dtype), grid)
            w = self.low_rank_weight(adapter_name)
            weight = self._inference_weight(adapter_name, x, w, self.name)
            y = nn.functional.linear(tokens, weight.to(dtype), bias)
        else:
            self._forget_weight(adapter_name, self.name)
            y = fake_quant_linear(x.to(dtype), self.low_rank_weight(adapter_name), bias, grid)
        return y if autocast else y.to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight that this layer multiplies with, in the original module's layout.

        For owners that read it; gradients flow through it to the adapter. Made if it is used.
        """
        base = self.base_layer
        if torch.compiler.is_compiling():
            return self._dense_weight()
        shape = (self.out_features, self.in_features)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return ReadWeight(
            self._dense_weight,
            shape[::-1] if base.is_conv1d else shape,
            base.dtype,
            base.phi.device,
            trained,
        )

    def _dense_weight(self) -> Tensor:
        base, adapter_name = self.base_layer, self.adapter_that_runs()
        if self.merged or adapter_name is None:
            return base.dense_weight()
        weight = self.low_rank_weight(adapter_name)
        if torch.is_grad_enabled():
            # A product with the identity is exact, and its gradients are those of the layer.
            identity = torch.eye(self.in_features, dtype=base.dtype, device=base.phi.device)
            transposed = fake_quant_linear(identity, weight)
            return transposed if base.is_conv1d else transposed.T
        dense = quantized_weight(weight)
        return dense.T if base.is_conv1d else dense

    def _infers(self) -> bool:
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Computes with the dense weight s * Q from here on; the downcast weight stays, so that
        unmerging is exact.
        """
        names = [
            name for name in check_adapters_to_merge(self, adapter_names) if name in self.lrqat_A
        ]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(
                f"one weight has one set of integers: adapters {self.merged_adapters + names} "
                "cannot be merged together"
            )
        self.base_layer.merged_weight = self._merged_weight(names[0], safe_merge)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Back to the downcast weight, exactly."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.merged_weight = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear | Conv1D | nn.Embedding | DowncastLinear:
        """The plain module with weight s * Q; without ``merge``, the layer of the low-bit base."""
        if not merge:
            self.base_layer.merged_weight = None
            return self.base_layer
        if not self.merged:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.base_layer
        plain = base.to_plain(
            base.stored_weight() if base.merged_weight is None else base.merged_weight
        )
        grid = self.activations[self.merged_adapters[0]] if self.merged else None
        if grid is not None:
            round_inputs(cast(nn.Linear | Conv1D, plain), grid)
        return plain

    def _merged_weight(self, adapter_name: str, safe_merge: bool) -> Tensor:
        weight = rows_of(map(quantized_weight, self.low_rank_weights(adapter_name)))
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(
                # PEFT's words first, which callers know.
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be "
                "broken: the merged weight of "
                f"adapter `{adapter_name}` is not finite"
            )
        return weight

    def __repr__(self) -> str:
        return "lrqat." + super().__repr__()
