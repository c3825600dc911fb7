"""One quantised linear layer as file formats see it: what is known before, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..quant.grid import SCALE_DTYPES, Grid
from ..shared.routers import is_router


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is known of a quantised weight before its integers are computed."""

    name: str  # of the module in the plain model
    grid: Grid
    scale_dtype: str  # such as "bfloat16"
    out_features: int
    in_features: int
    is_conv1d: bool = False  # transformers' Conv1D, or experts, whose weight is (in, out)
    is_embedding: bool = False  # an embedding, to which the output layer may be tied
    experts: int = 0  # whose weights lie below one another; 0: it is one weight
    dtype: torch.dtype = torch.bfloat16  # of the weight that the model computes with

    @property
    def parameter_name(self) -> str:
        """The name of the weight in the plain model."""
        return self.name if self.experts else f"{self.name}.weight"

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return self.out_features * self.in_features

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales in 16 bits, which is how most formats keep them."""
        return 2 * self.out_features * self.num_groups

    @property
    def trained_bytes(self) -> int:
        """Bytes of all that training found: integers, scales and zero points, without padding."""
        grid, groups = self.grid, self.out_features * self.num_groups
        bits = self.num_weights * grid.bits
        if grid.k_quant:  # four bits a group, and a float16 for each 256 weights
            bits += 4 * groups + self.num_weights // 16
        else:
            bits += groups * 8 * SCALE_DTYPES[self.scale_dtype].itemsize
        return -(-(bits + (0 if grid.symmetric else groups * grid.bits)) // 8)

    @property
    def num_groups(self) -> int:
        """Scales in a row."""
        return self.grid.num_groups(self.in_features)

    @property
    def group_size(self) -> int:
        """Weights that share a scale; -1 where one group is the whole row."""
        return -1 if self.num_groups == 1 else self.grid.group_size


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """The tensors of a target: ``weight = scale * (codes - zero_point)``, rounded to ``dtype``."""

    name: str  # of the module in the plain model
    grid: Grid
    codes: Tensor  # (out, in), int8 on a symmetric grid, uint8 on an asymmetric one
    scale: Tensor  # (out, groups) in the dtype that training rounded it to
    zero_point: Tensor | None  # (out, groups) uint8; None on a symmetric grid
    weight: Tensor  # (out, in) in ``dtype``: what the model computes with
    is_conv1d: bool
    experts: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        return self.weight.dtype

    @property
    def group_size(self) -> int:
        """Weights that share a scale; the width of a row where the grid says -1."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def centered(self) -> Tensor:
        """``codes - zero_point``, (out, in) int16."""
        codes = self.codes.to(torch.int16)
        return codes if self.zero_point is None else self.grid.centered(codes, self.zero_point)

    def on(self, grid: Grid) -> QuantizedLinear:
        """The same weight, its integers on a grid that holds them, see `Format.stored_grid`."""
        if not self.grid.balanced or grid.balanced:
            return replace(self, grid=grid)
        # Halving a scale is exact.
        return replace(self, grid=grid, codes=2 * self.codes + 1, scale=self.scale / 2)

    @property
    def parameter(self) -> Tensor:
        """The weight in the layout of the plain model."""
        weight = self.weight.unflatten(0, (self.experts, -1)) if self.experts else self.weight
        return weight.mT.contiguous() if self.is_conv1d else weight

    def rows(self, name: str, rows: Tensor) -> QuantizedLinear:
        """Some rows as a weight of their own."""
        zero_point = None if self.zero_point is None else self.zero_point[rows]
        return replace(
            self,
            name=name,
            codes=self.codes[rows],
            scale=self.scale[rows],
            zero_point=zero_point,
            weight=self.weight[rows],
            is_conv1d=False,
            experts=0,
        )

    def scale_as(self, dtype: torch.dtype) -> Tensor:
        """The scales in another dtype; ValueError if it cannot represent them exactly."""
        scale = self.scale.to(dtype)
        lost = self.scale.double() != scale.double()
        if lost.any():
            worst = float(self.scale.double()[lost].abs().min())
            raise ValueError(
                f"{int(lost.sum())} of {lost.numel()} scales of `{self.name}` (such as"
                f" {worst:.3g}) cannot be represented exactly in {dtype}, which this format uses"
                " for scales; export in another format, or train in bfloat16 with"
                " scale_dtype='bfloat16'"
            )
        return scale


def linear_names(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer but the head of a model, by name."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {}
    for name, module in model.named_modules():
        if is_router(module):
            continue
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nf, module.nx)
    if not found:
        raise ValueError(f"a {type(model).__name__} has no linear layers to quantise")
    return found


def widened(grid: Grid, bits: int | None) -> Grid:
    """The grid with more bits, which also holds all its integers. None: the grid itself.

    Raises:
        ValueError: ``bits`` is less than the grid's, or more than 8.
    """
    if bits is None:
        return grid
    if not grid.bits <= bits <= 8:
        raise ValueError(
            f"`container_bits` must be {grid.bits}, the bits of the weights, to 8, but is {bits!r}"
        )
    return replace(grid, bits=bits)
