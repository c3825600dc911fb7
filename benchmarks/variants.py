"""Ways to fine-tune a model that has to become low-bit, for the benchmarks: LoRA, full QAT, LR-QAT
by autograd, and ours.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_lrqat import LRQATConfig, LRQATLinear
from peft_lrqat.quant import Grid


RANK = 32


def clip(z: Tensor, grid: Grid) -> Tensor:
    """Clips to the grid; its ends pass the gradient on, which clamp does in some releases only."""
    low = torch.where(z < grid.qmin, float(grid.qmin), z)
    return torch.where(z > grid.qmax, float(grid.qmax), low)


class NaiveLRQAT(nn.Module):
    """The formula left to autograd, on the same int8 phi: a direct reading of the paper."""

    def __init__(self, layer: LRQATLinear, checkpointed: bool) -> None:
        super().__init__()
        self.layer, self.checkpointed = layer, checkpointed

    def weight(self, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
        base, grid = self.layer.base_layer, self.layer.base_layer.format.grid
        z = base.format.decode(base.phi) + self.layer.scaling["default"] * (B @ A)
        codes = clip(z + (z.round() - z).detach(), grid)
        return (grid.expand(scale, codes.shape[1]) * codes).to(base.dtype)

    def forward(self, x: Tensor) -> Tensor:
        factors = [getattr(self.layer, name)["default"] for name in self.layer.adapter_layer_names]

        def linear(x: Tensor, *factors: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight(*factors))

        return (
            checkpoint(linear, x, *factors, use_reentrant=False)
            if self.checkpointed
            else linear(x, *factors)
        )


class FullQAT(nn.Module):
    """The weight itself is trained through a learned step (LSQ)."""

    def __init__(self, linear: nn.Linear, grid: Grid) -> None:
        super().__init__()
        self.weight, self.grid = linear.weight.requires_grad_(), grid
        self.scale = nn.Parameter(
            grid.split(self.weight.detach().float()).abs().amax(-1) / grid.qmax
        )

    def forward(self, x: Tensor) -> Tensor:
        step = self.grid.expand(self.scale, self.weight.shape[1])
        z = clip(self.weight / step, self.grid)
        codes = z + (z.round() - z).detach()
        return nn.functional.linear(x, (codes * step).to(x.dtype))


def replace_modules(
    model: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Replaces every module of ``kind`` but the output head."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind) and not name.endswith("lm_head"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def lrqat(model: nn.Module, grid: Grid, downcast: str) -> nn.Module:
    """Ours."""
    config = LRQATConfig(
        r=RANK,
        target_modules="all-linear",
        bits=grid.bits,
        group_size=grid.group_size,
        downcast=downcast,
        # The search takes longer, and changes neither time nor memory of a step
        range_estimator="minmax",
    )
    return get_peft_model(model, config)


def lora(model: nn.Module, grid: Grid) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))


def half_lora(model: nn.Module, grid: Grid) -> nn.Module:
    config = LoraConfig(r=RANK, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def naive(model: nn.Module, grid: Grid, checkpointed: bool) -> nn.Module:
    return replace_modules(
        lrqat(model, grid, "fixed8"), LRQATLinear, lambda m: NaiveLRQAT(m, checkpointed)
    )


def full_qat(model: nn.Module, grid: Grid) -> nn.Module:
    return replace_modules(model.requires_grad_(False), nn.Linear, lambda m: FullQAT(m, grid))


def torchao_lora(model: nn.Module, grid: Grid) -> nn.Module:
    """LoRA beside a fake-quantised frozen weight, as torchtune and Unsloth train: rounded, but the
    product is not inside.
    """
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    size = (
        {"granularity": "per_channel"} if grid.group_size == -1 else {"group_size": grid.group_size}
    )
    config = IntxFakeQuantizeConfig(getattr(torch, f"int{grid.bits}"), **size)
    model = half_lora(model, grid)

    def fake_quantized(linear: nn.Linear) -> nn.Module:
        new = FakeQuantizedLinear.from_linear(linear, weight_config=config)
        return new.requires_grad_(False)

    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            module.base_layer = fake_quantized(module.base_layer)
    return model


# A bfloat16 model and a grid -> the model in training. In place.
VARIANTS: dict[str, Callable[[nn.Module, Grid], nn.Module]] = {
    "LoRA": lora,
    "LoRA, bf16 factors": half_lora,
    "full QAT (LSQ)": full_qat,
    "LR-QAT, naive autograd": lambda m, g: naive(m, g, False),
    "LR-QAT, checkpointed": lambda m, g: naive(m, g, True),
    "LR-QAT, bf16": lambda m, g: lrqat(m, g, "bf16"),
    "LR-QAT, fp16": lambda m, g: lrqat(m, g, "fp16"),
    "LR-QAT, fp32": lambda m, g: lrqat(m, g, "fp32"),
    "LR-QAT, fixed8": lambda m, g: lrqat(m, g, "fixed8"),
    "LR-QAT, int": lambda m, g: lrqat(m, g, "int"),
}
if find_spec("torchao"):
    VARIANTS["torchao QAT + LoRA"] = torchao_lora
