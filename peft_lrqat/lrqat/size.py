"""Bytes of the target weights: what training holds in memory, and what ships."""

from __future__ import annotations

from torch import nn

from ..base.downcast import DowncastLinear
from ..quant.grid import SCALE_DTYPES
from ..quant.packing import packed_bytes


def target_weight_bytes(model: nn.Module) -> int:
    """Resident bytes of the downcast weights of all low-bit layers: phi, first scales and zero
    points.
    """
    tensors = [
        tensor
        for layer in model.modules()
        if isinstance(layer, DowncastLinear)
        for tensor in (layer.phi, layer.scale0, layer.zero_point)
        if tensor is not None
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def deployed_weight_bytes(model: nn.Module) -> int:
    """Bytes of the integer matrices that ship: b bits a weight densely packed, scales in their
    dtype, packed zero points.
    """
    total = 0
    for layer in model.modules():
        if isinstance(layer, DowncastLinear):
            format = layer.format
            rows, groups, bits = layer.out_features, layer.scale0.shape[1], format.grid.bits
            total += rows * packed_bytes(format.in_features, bits)
            total += rows * groups * SCALE_DTYPES[format.scale_dtype].itemsize
            total += 0 if format.grid.symmetric else rows * packed_bytes(groups, bits)
    return total
