"""A cache for generation that holds the packed integers of ``kv_cache_bits``.

A token of a head takes ``ceil(head_dim * bits / 8)`` bytes and 5 more: its step, float32, and its
zero point (4 more on a symmetric grid). Attention gets from it, bit for bit, what it would get by
rounding a cache of 16-bit values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..quant import Grid, decode_tokens, encode_tokens, pack, packed_bytes, unpack
from .attention import kv_cache_grid, rounded


def pack_tokens(x: Tensor, grid: Grid) -> Tensor:
    """(..., n) -> (..., bytes) uint8: each token's packed integers, its step, its zero point."""
    codes, step, zero_point = encode_tokens(x, grid)
    unsigned = (codes.to(torch.int16) - grid.qmin).to(torch.uint8)
    packed = pack(unsigned.flatten(0, -2), grid.bits).view(
        *x.shape[:-1], packed_bytes(x.shape[-1], grid.bits)
    )
    parts = [packed, step.view(torch.uint8)]
    return torch.cat(parts if zero_point is None else [*parts, zero_point], -1)


def unpack_tokens(packed: Tensor, grid: Grid, n: int, dtype: torch.dtype) -> Tensor:
    """(..., bytes) uint8 -> (..., n) in ``dtype``: `quantized_tokens` of what was packed."""
    size = packed_bytes(n, grid.bits)
    codes = unpack(packed[..., :size].reshape(-1, size), grid.bits, n).view(*packed.shape[:-1], n)
    step = (
        packed[..., size : size + 4]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float32)
    )
    if grid.symmetric:
        return decode_tokens(codes.to(torch.int16) + grid.qmin, step, None, dtype)
    return decode_tokens(codes, step, packed[..., size + 4 :], dtype)


class LowBitCacheLayer(DynamicLayer):
    """A layer of the cache; ``keys`` and ``values`` are (batch, heads, tokens, bytes) uint8.

    transformers' own methods move tokens and rows about.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes an empty layer for keys and values of these widths."""
        super().lazy_initialization(key_states, value_states)
        # transformers keeps it up to 5.23.
        self.dtype = key_states.dtype
        self.widths = key_states.shape[-1], value_states.shape[-1]
        empty = torch.empty(0, dtype=torch.uint8, device=key_states.device)
        self.keys, self.values = empty, empty.clone()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens and returns all keys and values of the cache, rounded."""
        packed = pack_tokens(key_states, self.grid), pack_tokens(value_states, self.grid)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # The bytes are joined as transformers joins values.
        stored = super().update(*packed)
        keys, values = (
            unpack_tokens(s, self.grid, n, self.dtype)
            for s, n in zip(stored, self.widths, strict=True)
        )
        return rounded(keys, self.grid), rounded(values, self.grid)


def low_bit_cache(model: nn.Module) -> Cache:
    """An empty cache of ``kv_cache_bits``, for one call of `generate`.

    Layers whose keys and values are not rounded, and those with a sliding window, keep
    transformers' own cache. Raises ValueError for an encoder-decoder model, and if no layer would
    be low-bit.

    Example:
        ```py
        model.generate(**inputs, past_key_values=low_bit_cache(model))
        ```
    """
    config: Any = model.config
    if config.is_encoder_decoder:
        raise ValueError(
            "the low-bit cache is for decoders; leave `past_key_values` out: keys and values are "
            "rounded as used"
        )
    cache = DynamicCache(config=config)
    for module in model.modules():
        index, grid = getattr(module, "layer_idx", None), kv_cache_grid(module)
        if (
            isinstance(index, int)
            and grid is not None
            and type(cache.layers[index]) is DynamicLayer
        ):
            cache.layers[index] = LowBitCacheLayer(grid)
    if not any(isinstance(layer, LowBitCacheLayer) for layer in cache.layers):
        raise ValueError(
            "no layer of this model has keys and values to keep in low bits: no adapter with "
            "`kv_cache_bits` is active, or each layer has a sliding window"
        )
    return cache
