"""Which settings each format carries without changing a weight, and which of them each runtime runs: the one table of both.

Refusals of the export, presets of `LRQATConfig.for_runtime` and the table in the README all come from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..quant.grid import Grid


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a file format can hold exactly."""

    about: str
    symmetric_bits: tuple[int, ...]
    asymmetric_bits: tuple[int, ...]
    group_multiple: int = 1  # group sizes, and the width of a weight, are multiples of it
    scale_dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    conv1d: bool = False  # transformers' Conv1D, whose weight is (in, out)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a program runs, of the format it loads."""

    format: str
    bits: tuple[int, ...]
    asymmetric_bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None  # None: all that the format holds; -1: one scale per row
    group_size: int  # the preset


ALL = (2, 3, 4, 5, 6, 7, 8)
FORMATS = {
    "compressed-tensors": Format(
        about="`pack-quantized`, for vLLM and transformers",
        symmetric_bits=ALL,
        asymmetric_bits=ALL,
        # The loader computes in the model's dtype, to which it rounds scales.
        scale_dtypes=("bfloat16", "float16"),
    ),
    "gguf": Format(
        about="a whole model for llama.cpp",
        symmetric_bits=ALL,
        asymmetric_bits=(2, 3, 4, 5, 6, 7),
        group_multiple=32,
        scale_dtypes=("bfloat16", "float16"),
    ),
    "gptq": Format(
        about="GPTQ v1, for servers that read it",
        symmetric_bits=(2, 3, 4, 8),
        asymmetric_bits=(2, 3, 4, 8),
        group_multiple=32,
        scale_dtypes=("bfloat16", "float16"),
    ),
    "packed": Format(
        about="integers of any width, for `load_quantized`",
        symmetric_bits=ALL,
        asymmetric_bits=ALL,
        conv1d=True,
    ),
    "dequantized": Format(
        about="plain weights, for everything",
        symmetric_bits=ALL,
        asymmetric_bits=ALL,
        conv1d=True,
    ),
}
RUNTIMES = {
    "transformers": Runtime(
        format="compressed-tensors", bits=ALL, asymmetric_bits=ALL, group_sizes=None, group_size=128
    ),
    # Its kernels: 4 and 8 bits (with zero points 4 alone), one scale per row or per 32, 64 or 128 weights.
    "vllm": Runtime(
        format="compressed-tensors",
        bits=(4, 8),
        asymmetric_bits=(4,),
        group_sizes=(-1, 32, 64, 128),
        group_size=128,
    ),
    # A block of 32 weights has a scale of its own there, whether it is used or not.
    "llama.cpp": Runtime(
        format="gguf", bits=ALL, asymmetric_bits=ALL, group_sizes=None, group_size=32
    ),
}


def why_not(
    format: str,
    grid: Grid,
    scale_dtype: str,
    in_features: int | None = None,
    is_conv1d: bool = False,
) -> str | None:
    """Why a format cannot hold weights on ``grid`` exactly, and what it could; None where it can.

    ``in_features`` None: whatever the width of the weight.
    """
    able = FORMATS[_known("format", format, FORMATS)]
    bits = able.symmetric_bits if grid.symmetric else able.asymmetric_bits
    kind = "symmetric" if grid.symmetric else "asymmetric"
    if is_conv1d and not able.conv1d:
        return (
            f"{format} has no place for transformers' Conv1D; use format='packed' or 'dequantized'"
        )
    if grid.bits not in bits:
        return f"{format} holds {kind} weights of {_some(bits)} bits, but these have {grid.bits}"
    if scale_dtype not in able.scale_dtypes:
        return (
            f"{format} cannot hold scales in {scale_dtype}; train with scale_dtype={able.scale_dtypes[0]!r}, which every format "
            "holds exactly"
        )
    for what, size in (("group_size", grid.group_size), ("the width of the weight", in_features)):
        if size not in (-1, None) and size % able.group_multiple:
            return f"{format} has blocks of {able.group_multiple} weights, which {what}, {size}, is no multiple of"
    return None


def why_not_activations(
    format: str,
    grid: Grid,
    activations: Grid | None,
    kv_cache: Grid | None,
    name: str | None = None,
) -> str | None:
    """Why a format cannot say that inputs, keys and values are rounded beside weights on ``grid``; None where it can.

    ``name``: what the reader calls the format, if not so.
    """
    name = name or format
    if kv_cache is not None:
        return (
            f"{name} cannot carry `kv_cache_bits`={kv_cache.bits}: vLLM's low-bit cache holds 8-bit floats with a fixed scale "
            "for a whole layer, and the other formats have no place for it"
        )
    if activations is None:
        return None
    bits = activations.bits
    if format == "gguf":
        return f"{name} cannot carry `activation_bits`={bits}: llama.cpp rounds activations its own way, 8 bits in blocks of 32"
    if format != "compressed-tensors":
        return f"{name} stores weights alone and cannot carry `activation_bits`={bits}; compressed-tensors can"
    if bits != 8:
        return f"{name} is written for inputs of 8 bits, which vLLM has kernels for, but `activation_bits` is {bits}"
    per_row = grid.bits == 8 and grid.group_size == -1
    if not grid.symmetric or not (grid.bits == 4 or per_row):
        kind = "symmetric" if grid.symmetric else "asymmetric"
        return (
            f"{name} holds 8-bit inputs beside symmetric weights of 4 bits, or of 8 bits with one scale per row, which vLLM has "
            f"kernels for, but these weights are {kind}, {grid.bits} bits, group size {grid.group_size}"
        )
    return None


def why_not_for(runtime: str, grid: Grid, scale_dtype: str) -> str | None:
    """Why a runtime does not run weights on ``grid``, and what it does; None where it does."""
    able = RUNTIMES[_known("runtime", runtime, RUNTIMES)]
    if grid.bits not in able.bits:
        return f"{runtime} runs weights of {_some(able.bits)} bits, but `bits` is {grid.bits}"
    if not grid.symmetric and grid.bits not in able.asymmetric_bits:
        bits = _some(able.asymmetric_bits)
        return f"{runtime} runs asymmetric weights of {bits} bits, but `bits` is {grid.bits}; use symmetric=True"
    if able.group_sizes is not None and grid.group_size not in able.group_sizes:
        sizes = _some(able.group_sizes)
        return f"{runtime} runs group sizes {sizes} (-1: one scale per row), but `group_size` is {grid.group_size}"
    return why_not(able.format, grid, scale_dtype)


def preset(runtime: str) -> dict[str, object]:
    """Fields of `LRQATConfig` for a runtime; the width is the user's choice."""
    return {
        "group_size": RUNTIMES[_known("runtime", runtime, RUNTIMES)].group_size,
        "symmetric": True,
        "scale_dtype": "bfloat16",
    }


SETTINGS = {
    f"W{bits} {'' if symmetric else 'asymmetric, '}{name}": Grid(
        bits=bits, symmetric=symmetric, group_size=size
    )
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for name, size in (("per channel", -1), ("g32", 32), ("g128", 128))
} | {"W4 g40": Grid(bits=4, group_size=40)}


def capability_table() -> str:
    """The table in the README: settings by formats and runtimes."""
    columns = [*FORMATS, *RUNTIMES]
    rows = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, grid in SETTINGS.items():
        cells = ["yes" if why_not(format, grid, "bfloat16") is None else "-" for format in FORMATS]
        cells += [
            "yes" if why_not_for(runtime, grid, "bfloat16") is None else "-" for runtime in RUNTIMES
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _known(what: str, name: str, table: dict) -> str:
    if name not in table:
        raise ValueError(f"`{what}` must be one of {', '.join(map(repr, table))}, but is {name!r}")
    return name


def _some(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
