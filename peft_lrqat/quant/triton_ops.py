"""The layer's Triton kernels as operators of PyTorch: each operator is one launch.

Compilers, fake tensors and counters see such a launch as they see a matrix product. Triton
comes with PyTorch on GPUs. `serves` says whether the kernels can take a layer; where they cannot,
PyTorch's own operators compute the same (`low_rank`, `gradients`).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .grid import Grid


# Triton's interpreter runs the kernels on the CPU, for tests; Triton reads this when it is
# imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What one program of 4 warps makes of a weight, 32 weights a thread, and how many of the r products
# of each it adds up at a time: more would not stay in registers.
TILE_ELEMENTS = 1 << 12
TILE_COLUMNS = 64
RANKS = 16
# The fused multiply-add is part of the kernels' arithmetic: a sum of products is rounded once each.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
# Elements of a tensor that one program of an elementwise kernel takes.
BLOCK = 1 << 10
# Programs that compare the tensors of a held weight.
RENEW_PROGRAMS = 128
# Tokens that are summed at a time, and parts that the sums over all of them have at most.
TOKENS, MAX_PARTS = 32, 64
# Launches that are remembered: enough for every shape of a model, and many lengths of its input.
MAX_PLANS = 1 << 12

# A package that is imported anew, after its modules were dropped, defines its operators anew: under
# another name, because PyTorch keeps the first ones.
NAMESPACE = next(
    name
    for name in ("peft_lrqat", *(f"peft_lrqat_{number}" for number in range(2, 100)))
    if not hasattr(getattr(torch.ops, name), "weight")
)
_library = torch.library.Library(NAMESPACE, "DEF")
# What each operator does, by its name.
IMPLEMENTATIONS: dict[str, Callable] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """What the operators get of a layer: tensors and settings of a `LowRankWeight`."""

    phi: Tensor
    zero_point: Tensor | None
    A: Tensor
    B: Tensor
    scale: Tensor
    gamma: float
    downcast: str
    bits: int
    balanced: bool
    scale_dtype: str
    deployed: torch.dtype

    @property
    def out_features(self) -> int:
        return self.phi.shape[0]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @functools.cached_property
    def flat(self) -> tuple[Any, ...]:
        """All fields, as the arguments of an operator."""
        return tuple(getattr(self, name) for name in LAYER_FIELDS)

    @functools.cached_property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the kernels take them: contiguous, in the order of the fields."""
        A, B, scale = self.A.contiguous(), self.B.contiguous(), self.scale.contiguous()
        return self.phi, self.zero_point, A, B, scale

    @functools.cached_property
    def key(self) -> int:
        """All that launches for this layer depend on, except the memory of its tensors."""
        dtypes = self.phi.dtype, self.A.dtype, self.B.dtype, self.scale.dtype
        shapes = self.phi.shape, self.A.shape, self.scale.shape, self.zero_point is None
        settings = (
            self.gamma,
            self.downcast,
            self.bits,
            self.balanced,
            self.scale_dtype,
            self.deployed,
        )
        # Interned: a long tuple would be hashed again at every launch.
        return _interned((*dtypes, *shapes, *settings))

    def span(self, columns: int) -> int:
        """How many of some columns, which split no group, lie in one group."""
        return min(self.in_features // self.groups, columns)

    def constants(self, first_column: int, span: int) -> dict[str, Any]:
        """Compile-time constants of a kernel that makes tiles of this weight."""
        aligned = first_column % 8 == 0 and (span % 8 == 0 or self.groups == 1)
        symmetric = self.zero_point is None
        grid = Grid(bits=self.bits, symmetric=symmetric, balanced=self.balanced)
        return _tile_constants(len(self.A), self.downcast, grid, aligned, span)


LAYER_FIELDS = tuple(field.name for field in fields(Layer))
LAYER_SCHEMA = (
    "Tensor phi, Tensor? zero_point, Tensor A, Tensor B, Tensor scale, float gamma, "
    "str downcast, int bits, bool balanced, str scale_dtype, ScalarType deployed"
)


# Where the kernels run


@functools.cache
def serves_device(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for ``device``, bfloat16 included."""
    if device.type == "cpu" or find_spec("triton") is None:
        return INTERPRETED
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "xpu"


def serves(layer: Layer, *dtypes: torch.dtype) -> bool:
    """Whether the kernels can take a layer with its device and dtypes, together with ``dtypes``."""
    if not serves_device(layer.phi.device):
        return False
    own = (layer.A.dtype, layer.B.dtype, layer.scale.dtype, layer.deployed)
    return all(dtype in KERNEL_DTYPES for dtype in (*own, *dtypes))


def capturing() -> bool:
    """Whether a CUDA graph records what is launched now: the host may not wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# How they are launched


class Plan(NamedTuple):
    """A launch without its tensors, which are a kernel's first arguments."""

    file: str
    kernel: str
    grid: tuple[int, int, int]
    numbers: tuple[float, ...]  # the arguments after them
    constants: dict[str, Any]  # the compile-time arguments, in their order


_plans: dict[Any, tuple[Callable, tuple[Any, ...]]] = {}
_interned_keys: dict[Any, Any] = {}


def _interned(key: tuple[Any, ...]) -> int:
    return _interned_keys.setdefault(key, len(_interned_keys))


@functools.cache
def kernel_of(file: str, name: str) -> Any:
    """A kernel, imported where it is launched first: importing Triton takes a while."""
    module: ModuleType = importlib.import_module(f".{file}", __package__)
    return getattr(module, name)


def on(device: torch.device) -> AbstractContextManager:
    """Launches go to the current device of the process, which may not be that of the tensors."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def launch(
    key: tuple[Any, ...], plan: Callable[[], Plan], result: Tensor, *others: Tensor | None
) -> None:
    """Launches what ``plan`` says, which must depend on nothing but ``key`` and the device.

    ``key`` tells the dtypes of all tensors, too. Triton looks a kernel up by all of its
    arguments, which takes longer than a launch: for CUDA, it does so once for a key.
    """
    device, tensors = result.device, (result, *others)
    with on(device):
        if device.type == "cuda" and torch.version.hip is None:
            # Kernels are compiled for pointers that are multiples of 16, or for some that are not.
            places = [tensor.data_ptr() for tensor in tensors if tensor is not None]
            if not functools.reduce(int.__or__, places) % 16:
                _launch_planned((device.index, *key), plan, tensors)
                return
        made = plan()
        if all(made.grid):
            run = kernel_of(made.file, made.kernel)[made.grid]
            run(*tensors, *made.numbers, **made.constants, **OPTIONS)


def _launch_planned(
    key: tuple[Any, ...], plan: Callable[[], Plan], tensors: tuple[Tensor | None, ...]
) -> None:
    known = _plans.get(key)
    if known is not None:
        run, rest = known
        run(*tensors, *rest)
        return
    made = plan()
    if not all(made.grid):
        return
    run = kernel_of(made.file, made.kernel)[made.grid]
    compiled = run(*tensors, *made.numbers, **made.constants, **OPTIONS)
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    _plans[key] = compiled[made.grid], (*made.numbers, *made.constants.values())


def _operator(schema: str, returns: Callable | None = None) -> Callable[[Callable], Callable]:
    """Defines an operator by what it does and, for fake tensors, what it ``returns``, if anything.

    The result bypasses the dispatcher unless a compiler or a mode is watching.
    """
    name = schema.partition("(")[0]

    def define(function: Callable) -> Callable:
        _library.define(schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        IMPLEMENTATIONS[name] = function
        fake = returns or (lambda *arguments: None)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            seen = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
            return (operator if seen else function)(*arguments)

        return call

    return define


def _layer_operator(schema: str, returns: Callable | None = None) -> Callable[[Callable], Callable]:
    """The same for a function whose first argument is a `Layer`; the operator takes its fields."""

    def of_fields(function: Callable) -> Callable:
        number = len(LAYER_FIELDS)

        def flat(*arguments: Any) -> Any:
            layer = Layer(**dict(zip(LAYER_FIELDS, arguments[:number], strict=True)))
            return function(layer, *arguments[number:])

        return flat

    def define(function: Callable) -> Callable:
        fake = None if returns is None else of_fields(returns)
        operator = _operator(schema.replace("Layer", LAYER_SCHEMA, 1), fake)(of_fields(function))

        @functools.wraps(function)
        def call(layer: Layer, *arguments: Any) -> Any:
            if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
                return operator(*layer.flat, *arguments)
            return function(layer, *arguments)

        return call

    return define


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _blocks(number: int, size: int) -> int:
    return -(-number // size)


@functools.cache
def _tile_constants(
    rank: int, downcast: str, grid: Grid, aligned: bool, span: int
) -> dict[str, Any]:
    """What decides round(Z), and the shape of a tile, whose columns lie in one span."""
    columns = min(TILE_COLUMNS, max(16, _power_of_2(span)))
    return {
        "RANK": rank,
        "DOWNCAST": downcast,
        "BITS": grid.bits,
        "QMIN": grid.qmin,
        "BALANCED": grid.balanced,
        "RANKS": RANKS,
        "ALIGNED": aligned or downcast != "int",
        "ROWS": min(256, TILE_ELEMENTS // columns),
        "COLUMNS": columns,
    }


def _tiles(constants: dict[str, Any], rows: int, columns: int, span: int) -> tuple[int, int, int]:
    """Tiles of a span, blocks of rows, spans."""
    return _blocks(span, constants["COLUMNS"]), _blocks(rows, constants["ROWS"]), columns // span


def _triton_dtype(dtype: torch.dtype) -> Any:
    language = importlib.import_module("triton.language")
    return getattr(language, str(dtype).removeprefix("torch."))


# W_hat and its integers


def _launch_weight(
    layer: Layer,
    weight: Tensor,
    first_row: int,
    first_column: int,
    *,
    count: Tensor | None = None,
    places: Tensor | None = None,
    changed: Tensor | None = None,
) -> None:
    rows, columns = weight.shape
    room = 0 if places is None else len(places)
    programs = 0 if changed is None else len(changed)

    def plan() -> Plan:
        span = layer.span(columns)
        constants = {
            **layer.constants(first_column, span),
            "SCALE": layer.scale_dtype,
            "DEPLOYED": _triton_dtype(layer.deployed),
            "CHANGED": programs,
        }
        numbers = (
            *(first_row, rows, first_column, columns, room),
            *(layer.in_features, layer.phi.shape[1]),
            *(span, first_column * layer.groups // layer.in_features, layer.groups),
            layer.gamma,
        )
        grid = _tiles(constants, rows, columns, span)
        return Plan("triton_weight", "weight_kernel", grid, numbers, constants)

    part = first_row, rows, first_column, columns, room, programs
    key = "weight", layer.key, part, weight.dtype, count is None
    launch(key, plan, weight, changed, count, places, *layer.tensors)


def _empty_weight(
    layer: Layer,
    dtype: torch.dtype,
    first_row: int,
    last_row: int,
    first_column: int,
    last_column: int,
    *others: Any,
) -> Tensor:
    shape = last_row - first_row, last_column - first_column
    return torch.empty(shape, dtype=dtype, device=layer.phi.device)


@_layer_operator(
    "weight(Layer, ScalarType dtype, int first_row, int last_row, int first_column, "
    "int last_column, Tensor(a!)? count, Tensor(b!)? places) -> Tensor",
    _empty_weight,
)
def weight(
    layer: Layer,
    dtype: torch.dtype,
    first_row: int,
    last_row: int,
    first_column: int,
    last_column: int,
    count: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    """Some rows and columns of W_hat, rounded to the deployed dtype and handed over in ``dtype``.

    Adds the number of clipped weights to ``count`` (1,) int32. With ``places`` (n,) int64, writes
    ``row * in + column`` of the clipped weights there from ``count`` on, in any order.
    """
    made = _empty_weight(layer, dtype, first_row, last_row, first_column, last_column)
    _launch_weight(layer, made, first_row, first_column, count=count, places=places)
    return made


@_layer_operator("renew_weight(Layer, Tensor(a!) weight, Tensor changed) -> ()")
def renew_weight(layer: Layer, weight: Tensor, changed: Tensor) -> None:
    """Makes a held W_hat anew, in place, if any of ``changed`` is not 0; else leaves it."""
    _launch_weight(layer, weight, 0, 0, changed=changed)


@_operator(
    "renew_tensors(Tensor A, Tensor B, Tensor scale, Tensor(a!) held_A, Tensor(b!) held_B, "
    "Tensor(c!) held_scale) -> Tensor",
    lambda A, *others: A.new_empty(RENEW_PROGRAMS, dtype=torch.int32),
)
def renew_tensors(
    A: Tensor, B: Tensor, scale: Tensor, held_A: Tensor, held_B: Tensor, held_scale: Tensor
) -> Tensor:
    """Copies what differs, bit by bit, into the held tensors; says which programs found any."""
    changed = A.new_empty(RENEW_PROGRAMS, dtype=torch.int32)
    sizes = A.numel(), B.numel(), scale.numel()

    def plan() -> Plan:
        grid = RENEW_PROGRAMS, 1, 1
        return Plan("triton_held", "renew_kernel", grid, sizes, {"BLOCK": BLOCK})

    integers = {2: torch.int16, 4: torch.int32}
    live = A.contiguous(), B.contiguous(), scale.contiguous()
    bits = [t.view(integers[t.element_size()]) for t in (*live, held_A, held_B, held_scale)]
    launch(("renew", sizes, *(t.dtype for t in bits)), plan, changed, *bits)
    return changed


@_operator(
    "rounded(Tensor phi, Tensor A, Tensor B, float gamma, str downcast, int bits, bool symmetric, "
    "int first_column, int last_column) -> Tensor",
    lambda phi, A, B, gamma, downcast, bits, symmetric, first, last: phi.new_empty(
        len(phi), last - first, dtype=torch.int16
    ),
)
def rounded(
    phi: Tensor,
    A: Tensor,
    B: Tensor,
    gamma: float,
    downcast: str,
    bits: int,
    symmetric: bool,
    first_column: int,
    last_column: int,
) -> Tensor:
    """round(Z) of all rows of ``phi``, limited to a step beyond the grid; (rows, columns) int16."""
    rows, columns = len(phi), last_column - first_column
    made = phi.new_empty(rows, columns, dtype=torch.int16)

    def plan() -> Plan:
        aligned = first_column % 8 == 0
        integers = Grid(bits=bits, symmetric=symmetric)
        constants = _tile_constants(len(A), downcast, integers, aligned, columns)
        numbers = rows, first_column, columns, A.shape[1], phi.shape[1], gamma
        grid = _tiles(constants, rows, columns, columns)
        return Plan("triton_weight", "rounded_kernel", grid, numbers, constants)

    settings = gamma, downcast, bits, symmetric, first_column, last_column
    key = "rounded", phi.shape, A.shape, phi.dtype, A.dtype, B.dtype, *settings
    launch(key, plan, made, phi, A.contiguous(), B.contiguous())
    return made


# The backward pass by weight


def _empty_results(
    layer: Layer,
    gradient: Tensor,
    first_column: int,
    with_factors: bool,
    with_weight: bool,
    with_scale: bool,
    pass_through: bool,
) -> tuple[Tensor, Tensor]:
    weight = gradient.new_empty(gradient.shape if with_weight else 0)
    shape = (0, 0)
    if with_scale:
        span = layer.span(gradient.shape[1])
        rows, columns = gradient.shape
        tiles, _, spans = _tiles(layer.constants(first_column, span), rows, columns, span)
        shape = layer.out_features, spans * tiles
    return weight, gradient.new_empty(shape, dtype=torch.float32)


@_layer_operator(
    "weight_gradient(Layer, Tensor(a!) gradient, int first_column, bool with_factors, "
    "bool with_weight, bool with_scale, bool pass_through) -> (Tensor, Tensor)",
    _empty_results,
)
def weight_gradient(
    layer: Layer,
    gradient: Tensor,
    first_column: int,
    with_factors: bool,
    with_weight: bool,
    with_scale: bool,
    pass_through: bool,
) -> tuple[Tensor, Tensor]:
    """Turns columns of G, (out, columns) in the dtype of x, into those of dZ, in place.

    dZ takes the place of G ``with_factors``; for a float16 ``gradient`` as bfloat16, in which
    steps cannot underflow: see `as_grad_z`. Returns these columns of W_hat (empty unless
    ``with_weight``) and sums of G * (Q - zero_point) over the tiles of each group, (out, tiles)
    float32 (empty unless ``with_scale``).
    """
    settings = with_factors, with_weight, with_scale, pass_through
    weight, sums = _empty_results(layer, gradient, first_column, *settings)
    rows, columns = gradient.shape

    def plan() -> Plan:
        span = layer.span(columns)
        constants = {
            **layer.constants(first_column, span),
            "SCALE": layer.scale_dtype,
            "DEPLOYED": _triton_dtype(layer.deployed),
            "PASS_THROUGH": pass_through,
        }
        numbers = (
            *(layer.out_features, first_column, columns),
            *(layer.in_features, layer.phi.shape[1]),
            *(span, first_column * layer.groups // layer.in_features, layer.groups),
            layer.gamma,
        )
        grid = _tiles(constants, rows, columns, span)
        return Plan("triton_weight", "gradient_kernel", grid, numbers, constants)

    launch(
        ("gradient", layer.key, first_column, columns, gradient.dtype, *settings),
        plan,
        gradient,
        as_grad_z(gradient) if with_factors else None,
        weight if with_weight else None,
        sums if with_scale else None,
        *layer.tensors,
    )
    return weight, sums


def as_grad_z(gradient: Tensor) -> Tensor:
    """The memory of G as `weight_gradient` fills it with dZ."""
    return gradient.view(torch.bfloat16) if gradient.dtype == torch.float16 else gradient


# The factors and scales


@_operator(
    "cast_factors(Tensor A, Tensor B, Tensor? scale, str scale_dtype, float factor, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    lambda A, B, scale, scale_dtype, factor, dtype: (
        A.new_empty(A.shape, dtype=dtype),
        B.new_empty(B.shape, dtype=dtype),
    ),
)
def cast_factors(
    A: Tensor, B: Tensor, scale: Tensor | None, scale_dtype: str, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``factor * A`` and ``factor * B`` in ``dtype``; B times its step with ``scale`` (out, 1)."""
    cast_A, cast_B = A.new_empty(A.shape, dtype=dtype), B.new_empty(B.shape, dtype=dtype)

    def plan() -> Plan:
        grid = _blocks(A.numel(), BLOCK) + _blocks(B.numel(), BLOCK), 1, 1
        numbers = A.numel(), B.numel(), factor
        constants = {"RANK": len(A), "SCALE": scale_dtype, "BLOCK": BLOCK}
        return Plan("triton_gradients", "cast_factors_kernel", grid, numbers, constants)

    kept = None if scale is None else scale.contiguous()
    dtypes = A.dtype, B.dtype, None if scale is None else scale.dtype, dtype
    key = "cast", A.shape, len(B), dtypes, scale_dtype, factor
    launch(key, plan, cast_A, cast_B, A.contiguous(), B.contiguous(), kept)
    return cast_A, cast_B


def _parts(tokens: int) -> tuple[int, int]:
    """How many parts the tokens are summed in, and how many tokens a part has."""
    size = TOKENS * max(4, _blocks(tokens, TOKENS * MAX_PARTS))
    return _blocks(tokens, size), size


def _empty_sums(grad_y: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    parts, _ = _parts(len(y))
    shape = parts, y.shape[1]
    return (
        y.new_empty(shape, dtype=torch.float32),
        y.new_empty((0, 0) if bias is None else shape, dtype=torch.float32),
    )


@_operator("scale_sums(Tensor grad_y, Tensor y, Tensor? bias) -> (Tensor, Tensor)", _empty_sums)
def scale_sums(grad_y: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of gy * (y - bias) over parts of the tokens, (parts, out), and the largest |y - bias|.

    ``grad_y`` and ``y`` are (tokens, out), with rows of adjacent elements. Without a bias, the
    second result is empty.
    """
    sums, largest = _empty_sums(grad_y, y, bias)
    tokens, out = y.shape
    strides = grad_y.stride(0), y.stride(0)

    def plan() -> Plan:
        parts, size = _parts(tokens)
        constants = {"TOKENS": TOKENS, "ROWS": 128}
        grid = _blocks(out, constants["ROWS"]), parts, 1
        numbers = tokens, size, out, *strides
        return Plan("triton_gradients", "scale_sums_kernel", grid, numbers, constants)

    dtypes = grad_y.dtype, y.dtype, None if bias is None else bias.dtype
    tensors = sums, None if bias is None else largest, grad_y, y, bias
    launch(("sums", tokens, out, strides, dtypes), plan, *tensors)
    return sums, largest


def _empty_scale(layer: Layer, *others: Any) -> Tensor:
    return layer.scale.new_empty(layer.scale.shape, dtype=torch.float32)


@_layer_operator(
    "finish_rows(Layer, float smallest_step, float bias_share, Tensor? sums, Tensor? largest, "
    "Tensor? bias, Tensor? grad_y, Tensor? x, Tensor(a!)? grad_A, Tensor(b!)? grad_B) -> Tensor",
    _empty_scale,
)
def finish_rows(
    layer: Layer,
    smallest_step: float,
    bias_share: float,
    sums: Tensor | None,
    largest: Tensor | None,
    bias: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor | None,
    grad_A: Tensor | None,
    grad_B: Tensor | None,
) -> Tensor:
    """Multiplies the gradients of the factors, in place, with what their products left out.

    ``grad_A`` with gamma, ``grad_B`` with gamma * s, both float32. Returns the gradient of one
    scale per row, (out, 1), from what `scale_sums` gave; undefined without. Rows of which too
    little is left in the output get theirs from G instead, whose factors are ``grad_y``
    (tokens, out) and ``x`` (tokens, in), with rows of adjacent elements: where the step is below
    ``smallest_step``, or the ``largest`` output below ``bias_share`` times the bias.
    """
    grad_scale = _empty_scale(layer)
    tokens, strides, dtypes = 0, (0, 0), None
    if grad_y is not None and x is not None:
        tokens, strides = len(x), (grad_y.stride(0), x.stride(0))
        dtypes = grad_y.dtype, x.dtype
    elements_of_A = 0 if grad_A is None else grad_A.numel()

    def plan() -> Plan:
        # Few rows, as few are lost.
        constants = {**layer.constants(0, layer.in_features), "ROWS": 16}
        constants |= {"SCALE": layer.scale_dtype, "TOKENS": TOKENS, "BLOCK": BLOCK}
        blocks = _blocks(layer.out_features, constants["ROWS"])
        numbers = (
            *(layer.out_features, elements_of_A, 0 if sums is None else len(sums)),
            *(tokens, layer.in_features, layer.phi.shape[1], *strides),
            *(layer.gamma, smallest_step, bias_share),
        )
        grid = blocks + _blocks(elements_of_A, BLOCK), 1, 1
        return Plan("triton_gradients", "finish_rows_kernel", grid, numbers, constants)

    given = sums is not None, bias is None, grad_A is None, grad_B is None
    dtype = None if bias is None else bias.dtype
    key = "finish", layer.key, tokens, strides, smallest_step, bias_share, given, dtype, dtypes
    largest = None if bias is None else largest
    kept = (grad_scale, sums, largest, bias, grad_y, x, grad_A, grad_B)
    launch(key, plan, *kept, *layer.tensors)
    return grad_scale


# Clipped weights


@_operator(
    "sampled_product(Tensor places, Tensor grad_y, Tensor x, Tensor scale, str scale_dtype, "
    "float factor) -> (Tensor, Tensor)",
    lambda places, *others: (
        places.new_empty(len(places), dtype=torch.float32),
        places.new_empty(len(places)),
    ),
)
def sampled_product(
    places: Tensor, grad_y: Tensor, x: Tensor, scale: Tensor, scale_dtype: str, factor: float
) -> tuple[Tensor, Tensor]:
    """``factor * s * (gy.T @ x)`` at ``places`` row * in + column, (n,), and the places by column.

    ``grad_y`` (out, tokens) and ``x`` (in, tokens) are transposed and contiguous; ``scale`` is
    (out, 1). The second result is column * out + row, (n,) int64.
    """
    n = len(places)
    values, by_column = places.new_empty(n, dtype=torch.float32), places.new_empty(n)

    def plan() -> Plan:
        numbers = x.shape[1], len(grad_y), len(x), factor
        constants = {"SCALE": scale_dtype, "TOKENS": BLOCK}
        return Plan("triton_gradients", "sampled_product_kernel", (n, 1, 1), numbers, constants)

    dtypes = grad_y.dtype, x.dtype, scale.dtype
    key = "sampled", n, grad_y.shape, len(x), factor, scale_dtype, dtypes
    launch(key, plan, values, by_column, places, grad_y, x, scale.contiguous())
    return values, by_column


@_operator(
    "add_sparse_product(Tensor(a!) total, Tensor places, Tensor? order, Tensor values, "
    "Tensor factor) -> ()"
)
def add_sparse_product(
    total: Tensor, places: Tensor, order: Tensor | None, values: Tensor, factor: Tensor
) -> None:
    """``total += S @ factor``, where S holds ``values`` at sorted ``places`` key * others + other.

    ``total`` is (keys, r) float32, ``factor`` (others, r). With ``order`` (n,), the value of place
    i is ``values[order[i]]``.
    """
    n, others, rank = len(places), len(factor), total.shape[1]
    strides = *total.stride(), *factor.stride()

    def plan() -> Plan:
        ranks = min(64, _power_of_2(rank))
        constants = {"RANK": rank, "RANKS": ranks, "ENTRIES": 32}
        grid = n, _blocks(rank, ranks), 1
        numbers = n, others, *strides
        return Plan("triton_gradients", "add_sparse_product_kernel", grid, numbers, constants)

    key = "sparse", n, others, rank, strides, order is None, factor.dtype
    launch(key, plan, total, places, order, values, factor)
