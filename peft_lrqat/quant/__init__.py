"""The tensor core: grids, ranges, storage, packing and the fake-quantised linear. Knows nothing of
PEFT or transformers.
"""

from .activations import decode_tokens, encode_tokens, fake_quantize_tokens, quantized_tokens
from .fake_quant import fake_quant_linear, fake_quant_weight
from .grid import Grid, effective_scale
from .held import HeldWeight
from .low_rank import LowRankWeight, inspect_rows, quantized_codes, quantized_weight
from .packing import pack, packed_bytes, unpack
from .ranges import RANGES, estimate_range
from .storage import DOWNCASTS, WeightFormat
from .triton_ops import capturing


__all__ = [
    "DOWNCASTS",
    "RANGES",
    "Grid",
    "HeldWeight",
    "LowRankWeight",
    "WeightFormat",
    "capturing",
    "decode_tokens",
    "effective_scale",
    "encode_tokens",
    "estimate_range",
    "fake_quant_linear",
    "fake_quant_weight",
    "fake_quantize_tokens",
    "inspect_rows",
    "pack",
    "packed_bytes",
    "quantized_codes",
    "quantized_tokens",
    "quantized_weight",
    "unpack",
]
