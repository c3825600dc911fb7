"""The layouts in which others store quantised weights: GPTQ, AWQ, compressed-tensors.

Each describes one linear layer's tensors, and the weight that its own loader computes from them:

GPTQ v1      qweight (in * bits / 32, out) int32: codes of a column, little-endian, dense
             qzeros (groups, out * bits / 32) int32: zero points minus one, along the outputs
             scales (groups, out), g_idx (in,): the group of each input
GPTQ v2      the same, with the zero points as they are
AWQ gemm     qweight (in, out / 8) int32: 4-bit codes of a row; a word holds the outputs
             0 2 4 6 1 3 5 7 of its eight, lowest bits first; qzeros (groups, out / 8) likewise;
             scales (groups, out)
pack-quantized (compressed-tensors)
             weight_packed (out, words) int32: codes of a row plus 2^(bits-1), little-endian, dense
             weight_zero_point (words, groups) int32: likewise along the outputs; weight_scale
             (out, groups), weight_shape (2,)

The weight is ``scale * (code - zero_point)`` in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..quant import Grid, WeightFormat, pack, unpack
from ..quant.grid import DTYPE_NAMES, SCALE_DTYPES
from ..quant.packing import packed_bytes


GPTQ_BITS = (2, 3, 4, 8)
# The place of each of eight neighbouring outputs in a word of AWQ.
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
AWQ_WIDTH = 8


@dataclass(frozen=True, kw_only=True)
class TakenWeight:
    """One weight of shape (out, in), as a low-bit base keeps it."""

    format: WeightFormat
    phi: Tensor  # (out, ceil(in * bits / 8)) uint8: `code - qmin`, densely packed
    scale: Tensor  # (out, groups) in the stored dtype, all finite and above 0
    zero_point: Tensor | None  # (out, groups) uint8; None on a symmetric grid


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one method stores a weight."""

    name: str
    parts: tuple[str, ...]  # of a module, the integers first
    optional: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], None]
    # From the tensors by part, (out, in) and the settings; ValueError for what does not fit.
    read: Callable[[Mapping[str, Tensor], tuple[int, int], Mapping[str, Any]], TakenWeight]

    def take(
        self,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        settings: Mapping[str, Any],
    ) -> TakenWeight:
        """Returns the weight of one module; a ValueError says what does not fit."""
        missing = [n for n in self.parts if n not in tensors and n not in self.optional]
        if missing:
            raise ValueError(f"the files have no {' and no '.join(missing)} for it")
        integers = tensors[self.parts[0]]
        if integers.dtype != torch.int32 or integers.dim() != 2:
            raise ValueError(
                f"{self.parts[0]} must be a matrix of int32, but is {tuple(integers.shape)} of "
                f"{integers.dtype}"
            )
        return self.read(tensors, shape, settings)


def find_layout(settings: Mapping[str, Any]) -> Layout:
    """The layout of a checkpoint's ``quantization_config``; ValueError for one that is unknown."""
    method = settings.get("quant_method")
    if method not in LAYOUTS:
        raise ValueError(
            f"the checkpoint is quantised by {method!r}, but integers can be taken over from "
            f"{', '.join(LAYOUTS)}; start from the model before its quantisation instead"
        )
    layout = LAYOUTS[method]
    layout.check(settings)
    return layout


# GPTQ


def _check_gptq(settings: Mapping[str, Any]) -> None:
    version = settings.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"`checkpoint_format` must be gptq or gptq_v2, but is {version!r}, which is made for "
            "one kernel; save the checkpoint as gptq with the library that made it"
        )
    if settings.get("pack_dtype", "int32") != "int32":
        raise ValueError(
            f"`pack_dtype` must be int32, but is {settings['pack_dtype']!r}; save the checkpoint "
            "with int32 with the library that made it"
        )


def _read_gptq(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any]
) -> TakenWeight:
    out_features, in_features = shape
    words = tensors["qweight"]
    bits, rest = divmod(32 * words.shape[0], in_features)
    if rest or bits not in GPTQ_BITS or words.shape[1] != out_features:
        raise ValueError(
            f"qweight must hold {GPTQ_BITS} bits for each of {in_features} inputs and "
            f"{out_features} outputs, but is {tuple(words.shape)} words"
        )
    scales, stored = tensors["scales"], tensors["qzeros"]
    num_groups = len(scales)
    _check_shape("scales", scales, (num_groups, out_features))
    _check_shape("qzeros", stored, (num_groups, out_features * bits // 32))
    zeros = unpack(_bytes(stored), bits, out_features)
    if settings.get("checkpoint_format", "gptq") == "gptq":
        ambiguous = int((zeros == 2**bits - 1).sum())
        if ambiguous:
            raise ValueError(
                f"{ambiguous} of its zero points are stored as {2**bits - 1}, which some GPTQ v1 "
                f"readers take for 0 and others for {2**bits}; save the checkpoint as gptq_v2 with "
                "the library that made it"
            )
        zeros = zeros + 1
    order = _group_order(tensors.get("g_idx"), in_features, num_groups)
    return _taken(
        bits=bits,
        phi=_bytes(words.T),
        scale=scales[order].T,
        zero_point=zeros[order].T,
        declared_symmetric=settings.get("sym"),
        in_features=in_features,
    )


def _group_order(g_idx: Tensor | None, in_features: int, num_groups: int) -> Tensor:
    """Which stored group each block of neighbouring inputs uses, (groups,)."""
    if num_groups == 0 or in_features % num_groups:
        raise ValueError(
            f"its {in_features} inputs do not make {num_groups} equal groups, but a low-bit base "
            "needs groups of one size; quantise with a group size that divides the width"
        )
    if g_idx is None:
        return torch.arange(num_groups)
    _check_shape("g_idx", g_idx, (in_features,))
    blocks = g_idx.long().view(num_groups, -1)
    if not (blocks == blocks[:, :1]).all():
        raise ValueError(
            "it was quantised with act-order (desc_act), which spreads each group over the inputs, "
            "but groups of a low-bit base are neighbours; quantise with desc_act=False, with "
            "static_groups=True, or with one group for each row (group_size=-1)"
        )
    order = blocks[:, 0]
    wrong = order[(order < 0) | (order >= num_groups)]
    if len(wrong):
        raise ValueError(f"g_idx names group {int(wrong[0])}, but there are {num_groups}")
    return order.to(g_idx.device)


# AWQ


def _check_awq(settings: Mapping[str, Any]) -> None:
    version = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if version != "gemm":
        raise ValueError(
            f"`version` of an AWQ checkpoint must be gemm, but is {version!r}; save it as gemm "
            "with the library that made it"
        )
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"`bits` of an AWQ checkpoint must be 4, but is {bits!r}")


def _read_awq(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any]
) -> TakenWeight:
    out_features, in_features = shape
    words, stored, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    _check_shape("qweight", words, (in_features, out_features // AWQ_WIDTH))
    num_groups = len(scales)
    _check_shape("scales", scales, (num_groups, out_features))
    _check_shape("qzeros", stored, (num_groups, out_features // AWQ_WIDTH))
    order = _group_order(None, in_features, num_groups)
    return _taken(
        bits=4,
        phi=pack(_outputs_in_order(words).T, 4),
        scale=scales[order].T,
        zero_point=_outputs_in_order(stored)[order].T,
        declared_symmetric=not settings.get("zero_point", True),
        in_features=in_features,
    )


def _outputs_in_order(words: Tensor) -> Tensor:
    """(rows, out / 8) int32 -> (rows, out) uint8."""
    codes = unpack(_bytes(words), 4, AWQ_WIDTH * words.shape[1])
    return codes.unflatten(1, (-1, AWQ_WIDTH))[:, :, AWQ_PLACES].flatten(1)


# compressed-tensors


def _check_pack_quantized(settings: Mapping[str, Any]) -> None:
    groups = settings.get("config_groups") or {}
    if not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"`config_groups` must hold dicts, but is {groups!r}")
    formats = {group.get("format") or settings.get("format") for group in groups.values()}
    wrong = (formats or {settings.get("format")}) - {"pack-quantized"}
    if wrong:
        raise ValueError(
            "the format of a compressed-tensors checkpoint must be pack-quantized, but is "
            f"{', '.join(sorted(map(str, wrong)))}; quantise the weights alone, to integers"
        )
    refused = {
        "activations": any(
            group.get(kind) for group in groups.values() for kind in _ACTIVATION_FIELDS
        ),
        "a KV cache (kv_cache_scheme)": settings.get("kv_cache_scheme"),
        "sparse weights (sparsity_config)": _is_sparse(settings.get("sparsity_config")),
        "rotations (transform_config)": (settings.get("transform_config") or {}).get(
            "config_groups"
        ),
    }
    for what, present in refused.items():
        if present:
            raise ValueError(
                f"the checkpoint describes {what}, which a low-bit base cannot hold, so the model "
                "would compute something else; quantise the weights alone"
            )


_ACTIVATION_FIELDS = ("input_activations", "output_activations")


def _is_sparse(settings: Mapping[str, Any] | None) -> bool:
    return (settings or {}).get("format", "dense") != "dense"


def _read_pack_quantized(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], settings: Mapping[str, Any]
) -> TakenWeight:
    if "weight_g_idx" in tensors:
        # Raises where the groups are not neighbours.
        _group_order(tensors["weight_g_idx"], shape[1], tensors["weight_scale"].shape[-1])
    out_features, in_features = shape
    stored_shape = tuple(tensors["weight_shape"].tolist())
    if stored_shape != shape:
        raise ValueError(f"weight_shape must be {shape}, but is {stored_shape}")
    words, scale = tensors["weight_packed"], tensors["weight_scale"]
    bits = _width(words, shape, settings)
    num_groups = scale.shape[-1]
    _check_shape("weight_scale", scale, (out_features, num_groups))
    _group_order(None, in_features, num_groups)  # raises where groups are not equal
    zero_point = None
    if "weight_zero_point" in tensors:
        stored = tensors["weight_zero_point"]
        if stored.dtype != torch.int32:
            raise ValueError(
                f"weight_zero_point must be packed in words of int32, but is {stored.dtype}; save "
                "the checkpoint with compressed-tensors >= 0.15"
            )
        _check_shape("weight_zero_point", stored, (-(-out_features * bits // 32), num_groups))
        zero_point = _unpack_words(stored.T, bits, out_features).T
    return _taken(
        bits=bits,
        phi=pack(_unpack_words(words, bits, in_features), bits),
        scale=scale,
        zero_point=zero_point,
        declared_symmetric=zero_point is None,
        in_features=in_features,
    )


def _width(words: Tensor, shape: tuple[int, int], settings: Mapping[str, Any]) -> int:
    """Bits of a weight: those that fill its words, of the widths that the configuration names."""
    out_features, in_features = shape
    groups = (settings.get("config_groups") or {}).values()
    named = {(group.get("weights") or {}).get("num_bits") for group in groups}
    fitting = [
        bits
        for bits in range(2, 9)
        if bits in named and -(-in_features * bits // 32) == words.shape[1]
    ]
    if len(fitting) != 1 or words.shape[0] != out_features:
        raise ValueError(
            f"weight_packed must be dense words of one of {sorted(map(str, named))} bits for "
            f"{shape}, but is {tuple(words.shape)}; save the checkpoint with compressed-tensors "
            ">= 0.15"
        )
    return fitting[0]


# What they share


def _bytes(words: Tensor) -> Tensor:
    """(rows, n) int32 -> (rows, 4 n) uint8, lowest bits first."""
    return _dense(words).view(torch.uint8)


def _dense(tensor: Tensor) -> Tensor:
    """The same values with the strides of a new tensor, also where an axis has one element."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """(rows, words) int32 -> (rows, n) uint8; what is left in the last word is not read."""
    return unpack(_bytes(words)[:, : packed_bytes(n, bits)], bits, n)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, but is {tuple(tensor.shape)}")


def _taken(
    *,
    bits: int,
    phi: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    declared_symmetric: bool | None,
    in_features: int,
) -> TakenWeight:
    """What was read, on the grid that holds it exactly."""
    middle = 2 ** (bits - 1)
    if declared_symmetric and zero_point is not None:
        if other := int((zero_point != middle).sum()):
            raise ValueError(
                f"the checkpoint calls itself symmetric, but {other} of its zero "
                f"points are not {middle}, and readers that skip them compute something "
                "else; correct its quantization_config, or quantise again"
            )
        zero_point = None
    if scale.dtype not in DTYPE_NAMES:
        raise ValueError(f"scales must be one of {', '.join(SCALE_DTYPES)}, but are {scale.dtype}")
    wrong = int((~scale.isfinite() | (scale < 0)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} of {scale.numel()} scales are negative or not finite, but scales of a "
            "low-bit base are above 0; quantise with a method that keeps them positive"
        )
    groups = scale.shape[1]
    grid = Grid(
        bits=bits,
        symmetric=zero_point is None,
        group_size=-1 if groups == 1 else in_features // groups,
    )
    tiny = torch.finfo(scale.dtype).tiny
    if bool((scale < tiny).any()):
        phi, scale = _with_normal_scales(phi, scale, zero_point, grid, in_features)
    # Training keeps steps above the smallest normal number, which some scales may not be.
    exact = bool((scale >= tiny).all())
    format = WeightFormat(
        grid=grid,
        downcast="int",
        scale_dtype=DTYPE_NAMES[scale.dtype] if exact else "float32",
        in_features=in_features,
    )
    if zero_point is not None:
        zero_point = _dense(zero_point)
    return TakenWeight(format=format, phi=phi, scale=_dense(scale), zero_point=zero_point)


def _with_normal_scales(
    phi: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, in_features: int
) -> tuple[Tensor, Tensor]:
    """``phi`` and ``scale`` where groups whose weights are all 0 have a normal number as scale.

    Any step describes them, if all their codes are the zero point.
    """
    codes = grid.split(unpack(phi, grid.bits, in_features))
    zero = torch.full_like(scale, -grid.qmin) if zero_point is None else zero_point
    zero = zero.to(codes.dtype).unsqueeze(-1)
    codes = torch.where((scale == 0).unsqueeze(-1), zero, codes)
    tiny = torch.finfo(scale.dtype).tiny
    empty = (codes == zero).all(-1) & (scale < tiny)
    return pack(codes.flatten(1), grid.bits), torch.where(empty, tiny, scale)


LAYOUTS = {
    "gptq": Layout(
        name="GPTQ",
        parts=("qweight", "qzeros", "scales", "g_idx"),
        optional=("g_idx",),
        check=_check_gptq,
        read=_read_gptq,
    ),
    "awq": Layout(
        name="AWQ",
        parts=("qweight", "qzeros", "scales"),
        optional=(),
        check=_check_awq,
        read=_read_awq,
    ),
    "compressed-tensors": Layout(
        name="compressed-tensors",
        parts=(
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_g_idx",
        ),
        optional=("weight_zero_point", "weight_g_idx"),
        check=_check_pack_quantized,
        read=_read_pack_quantized,
    ),
}
