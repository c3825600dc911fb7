"""Bytes of the target weights: what training holds in memory, and what ships."""

from __future__ import annotations

from torch import nn

from ..quant.grid import SCALE_DTYPES
from ..quant.packing import packed_bytes
from .layer import LRQATLayer


def target_weight_bytes(model: nn.Module) -> int:
    """Resident bytes of the downcast weights of all LR-QAT layers: phi, first scales and zero
    points.
    """
    tensors = [
        tensor
        for layer in model.modules()
        if isinstance(layer, LRQATLayer)
        for tensor in (layer.base_layer.phi, layer.base_layer.scale0, layer.base_layer.zero_point)
        if tensor is not None
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def deployed_weight_bytes(model: nn.Module) -> int:
    """Bytes of the integer matrices that ship: b bits a weight densely packed, scales in their
    dtype, packed zero points.
    """
    total = 0
    for layer in model.modules():
        if isinstance(layer, LRQATLayer):
            format = layer.base_layer.format
            rows, groups, bits = (
                layer.out_features,
                layer.base_layer.scale0.shape[1],
                format.grid.bits,
            )
            total += rows * packed_bytes(format.in_features, bits)
            total += rows * groups * SCALE_DTYPES[format.scale_dtype].itemsize
            total += 0 if format.grid.symmetric else rows * packed_bytes(groups, bits)
    return total
