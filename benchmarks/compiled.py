"""The Triton kernels compiled ahead of time, without a GPU: registers, spills, shared memory.

    python benchmarks/compiled.py            # a table for sm_80 and sm_90

The launches are those of real steps on meta tensors (`launches`), with the same argument types.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from launches import as_on_a_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_lrqat.quant import Grid, LowRankWeight, WeightFormat, fake_quant_linear, triton_ops
from peft_lrqat.quant.held import HeldWeight


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Recorder(TorchDispatchMode):
    """Runs our operators on meta tensors up to the launch, which it keeps instead."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.name() == "aten::_local_scalar_dense":
            return 1000  # clipped weights
        namespace, _, name = func.name().partition("::")
        if namespace != "peft_lrqat":
            return func(*args, **(kwargs or {}))
        with patch.object(triton_ops, "launch", self._keep):
            return triton_ops.IMPLEMENTATIONS[name](*args)

    def _keep(self, key: Any, plan: Callable[[], triton_ops.Plan], *tensors: Tensor | None) -> None:
        made = plan()
        function = triton_ops.kernel_of(made.file, made.kernel)
        self.launches.append((function, (*tensors, *made.numbers), made.constants))


def source(function: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """What Triton's JIT would compile for these arguments."""
    signature, values, attributes = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(function.arg_names, arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            values[name] = value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    signature = {n: "constexpr" if n in values else signature[n] for n in function.arg_names}
    return ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack (where registers are spilled) and of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def compile_launch(launch: tuple[Any, ...], capability: int) -> dict[str, int]:
    """Compiles one recorded launch for a compute capability, such as 90."""
    function, arguments, constants = launch
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(
        source(function, arguments, constants), target=target, options=dict(triton_ops.OPTIONS)
    )
    return {**resources(built.asm["cubin"]), "shared": built.metadata.shared}


def meta_weight(
    out: int = 4096,
    width: int = 4096,
    rank: int = 32,
    downcast: str = "fixed8",
    bits: int = 4,
    symmetric: bool = True,
    group_size: int = -1,
    dtype: torch.dtype = torch.bfloat16,
) -> LowRankWeight:
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size)
    fmt = WeightFormat(grid=grid, downcast=downcast, scale_dtype="bfloat16", in_features=width)
    groups = grid.num_groups(width)

    def empty(*shape: int, dtype: torch.dtype = torch.float32, trained: bool = True) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=trained)

    return LowRankWeight(
        format=fmt,
        phi=empty(out, fmt.row_elements, dtype=fmt.storage_dtype, trained=False),
        zero_point=None if symmetric else empty(out, groups, dtype=torch.uint8, trained=False),
        A=empty(rank, width),
        B=empty(out, rank),
        scale=empty(out, groups),
        gamma=1.0,
        dtype=dtype,
    )


def launches_of(tokens: int = 2048, **settings: Any) -> list[tuple[Any, ...]]:
    """The launches of a training step and of a token through a held weight."""
    w = meta_weight(**settings)
    x = torch.empty(tokens, w.shape[1], dtype=w.dtype, device="meta", requires_grad=True)
    with as_on_a_gpu(), Recorder() as recorder:
        y = fake_quant_linear(x, w)
        y.backward(torch.empty_like(y))
        with torch.no_grad():
            HeldWeight.make(w, 0).current(w, 0)
    return recorder.launches
