"""The formula of the fake-quantised linear layer as anyone would write it, and weights to try it
on.
"""

import torch
from torch.nn.functional import linear

from peft_lrqat.quant import Grid, LowRankWeight, WeightFormat, effective_scale, estimate_range


OUT, IN, RANK = 10, 24, 3


def make(
    bits,
    symmetric,
    group_size,
    downcast,
    dtype=torch.float64,
    spread=1.0,
    scale_dtype="bfloat16",
    out=OUT,
    in_=IN,
    pass_through=False,
):
    """A weight as after training: factors that move it by `spread` steps, and moved scales.

    ``symmetric`` is True, False or "balanced".
    """
    balanced, symmetric = symmetric == "balanced", bool(symmetric)
    grid = Grid(bits=bits, symmetric=symmetric, group_size=group_size, balanced=balanced)
    fmt = WeightFormat(grid=grid, downcast=downcast, scale_dtype=scale_dtype, in_features=in_)
    weight = torch.randn(out, in_)
    scale, zero_point = estimate_range(weight, grid, estimator="lp", scale_dtype=scale_dtype, p=4.0)
    units = weight / grid.expand(scale, in_) + grid.expand(zero_point.float(), in_)
    phi = fmt.encode(units - 0.5 if balanced else units)
    return LowRankWeight(
        format=fmt,
        phi=phi,
        zero_point=None if symmetric else zero_point,
        A=torch.randn(RANK, in_, dtype=dtype).requires_grad_(),
        B=(spread * torch.randn(out, RANK, dtype=dtype)).requires_grad_(),
        scale=(scale * (1 + 0.1 * torch.rand_like(scale))).to(dtype).requires_grad_(),
        gamma=0.7,
        dtype=dtype,
        pass_through=pass_through,
    )


def offset(w):
    """What is subtracted from the integers of a weight, (out, in) or broadcastable to it."""
    grid = w.format.grid
    if w.zero_point is None:
        return -0.5 if grid.balanced else 0
    return grid.expand(w.zero_point.float(), w.shape[1])


def straight_through(rounded, smooth):
    return smooth + (rounded - smooth).detach()


def clip(x, low, high):
    """A clamp that passes the gradient on at its bounds; torch does so in some releases only."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def plain(x, w, bias=None):
    """METHODS: the formula as anyone would write it, left to autograd."""
    grid = w.format.grid
    z = w.format.decode(w.phi).to(w.A.dtype) + w.gamma * (w.B @ w.A)
    codes = clip(straight_through(z.round(), z), grid.qmin, grid.qmax)
    codes = straight_through(codes, z) if w.pass_through else codes
    if grid.balanced:
        codes = codes + 0.5
    if w.zero_point is not None:
        codes = codes - grid.expand(w.zero_point.to(z.dtype), z.shape[1])
    step = straight_through(effective_scale(w.scale, w.format.scale_dtype), w.scale)
    return linear(x, grid.expand(step, z.shape[1]) * codes, bias)
