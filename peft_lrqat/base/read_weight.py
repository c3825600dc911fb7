"""The weight of a low-bit layer for owners that read it instead of calling the layer.

WavLM's attention hands the weights of its projections to a function; T5 asks `wo` for the dtype of
its weight in every forward pass. What is read is the weight that the layer multiplies with, and
gradients flow through it to an adapter. It is made only if its values are used: shape, dtype and
device are known without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# What reveals nothing about the values.
_DESCRIPTIONS = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype",
        "device",
        "shape",
        "ndim",
        "layout",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_leaf",
        "requires_grad",
        "grad_fn",
        "itemsize",
        "nbytes",
    )
}
_DESCRIPTIONS |= {
    getattr(Tensor, name)
    for name in (
        "size",
        "stride",
        "dim",
        "numel",
        "nelement",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "__len__",
        "__hash__",
    )
}


class ReadWeight(Tensor):
    """A weight that is made when its values are first used, once for all uses of this object."""

    _make: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(
        cls: type[ReadWeight],
        make: Callable[[], Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        requires_grad: bool,
    ) -> ReadWeight:
        self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=requires_grad
        )
        self._make, self._made = make, None
        return self

    def values(self) -> Tensor:
        """The weight itself."""
        if self._made is None:
            with torch._C.DisableTorchFunctionSubclass():
                self._made = self._make()
        return self._made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*map(_used, args), **{name: _used(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub has no `args` defaults
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(
            *map(_used, args), **{name: _used(value) for name, value in (kwargs or {}).items()}
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.values().detach().clone()


def _used(value: Any) -> Any:
    """An argument with the weights themselves, in lists and tuples, too."""
    if isinstance(value, ReadWeight):
        return value.values()
    if isinstance(value, list | tuple) and any(isinstance(v, ReadWeight) for v in value):
        return type(value)(map(_used, value))
    return value
