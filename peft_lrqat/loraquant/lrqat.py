"""Packs the factors of LR-QAT adapters: A and B at a few bits in the file, float32 once loaded.

The factors of an LR-QAT adapter act inside the rounding. Packing them therefore changes integers of
the quantised weight where Z = phi + gamma * B A crosses a half. Scales, fingerprints and all other
tensors of the adapter are stored unchanged. `LRQATConfig.packed_factors` says how the factors are
stored, with the names of `LoRAQuantConfig`; quant/factors/storage.py describes the tensors.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from ..lrqat.config import LRQATConfig
from ..lrqat.layer import LRQATLayer
from ..lrqat.packed_factors import FINGERPRINT, PACKED_FINGERPRINT, unpack_factors
from ..quant import quantized_codes
from ..quant.factors.storage import expand
from ..shared.names import PREFIX
from .config import LoRAQuantConfig
from .files import write_adapter, write_packed
from .quantize import QuantizedFactors, check_factors, quantize_factors, report, stored_zero_points


def quantize_lrqat(
    config: LRQATConfig,
    state: dict[str, Tensor],
    target: str | os.PathLike[str],
    recipe: LoRAQuantConfig,
    layers: tuple[PeftModel, str] | None,
    *,
    progress: bool,
) -> LRQATConfig:
    """Writes an LR-QAT adapter with packed factors; ``config`` and ``state`` come from its files.

    ``packed_factors["report"]`` of the result is like that of a LoRA adapter. With ``layers``, a
    model and the name of the adapter in it, the report also has ``flipped_integers``: the share of
    the quantised weight's integers that change. Errors of modules are compared by the size of their
    steps.
    """
    if config.packed_factors is not None:
        raise ValueError(
            "the factors of this LR-QAT adapter are packed already; quantise the original adapter "
            "instead"
        )
    factors, rest = _split(state)
    check_factors(factors, lambda name: config.r, recipe.scale_dtype)
    steps = {
        name: float(rest[f"{PREFIX}{name}.lrqat_scale"].float().square().mean().sqrt())
        for name in factors
    }
    gamma = config.lora_alpha / config.r
    found = quantize_factors(
        factors, recipe, {name: gamma * step for name, step in steps.items()}, progress=progress
    )
    made = copy.deepcopy(config)
    fields = {
        name: getattr(recipe, name)
        for name in ("method", "bits_high", "ratio", "average_bits", "group_size", "scale_dtype")
    }
    fields["zero_points"] = stored_zero_points(found)
    fields["component_bits"] = {name: quantized.format.bits for name, quantized in found.items()}
    fields["shapes"] = {name: [len(B), A.shape[1]] for name, (B, A) in factors.items()}
    flips = (
        {} if layers is None else {"flipped_integers": round(flipped_integers(*layers, found), 6)}
    )

    def finished(stored_bytes: int) -> LRQATConfig:
        """Fills in the report, once the size of the file is known."""
        made.packed_factors = {**fields, "report": report(factors, found, stored_bytes) | flips}
        return made

    return write_packed(
        target, {name: quantized.tensors for name, quantized in found.items()}, rest, finished
    )


def dequantize_lrqat(
    config: LRQATConfig, state: dict[str, Tensor], target: str | os.PathLike[str], source: str
) -> LRQATConfig:
    """Writes the same adapter with plain float32 factors and the same integers."""
    try:
        tensors = unpack_factors(config, state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    config.packed_factors = None
    write_adapter(target, tensors, config)
    return config


@torch.no_grad()
def flipped_integers(
    model: PeftModel, adapter_name: str, found: dict[str, QuantizedFactors]
) -> float:
    """Returns the share of the targets' integers that change with the factors ``found``."""
    changed = total = 0
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LRQATLayer) or name not in found:
            continue
        before = layer.low_rank_weight(adapter_name)
        B, A = expand(found[name].format, found[name].tensors, torch.float32)
        after = replace(before, A=A.to(before.A.device), B=B.to(before.B.device))
        changed += int((quantized_codes(before) != quantized_codes(after)).sum())
        total += layer.out_features * layer.in_features
    return changed / total


def _split(state: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Returns B (out, r) and A (r, in) by module, and the tensors that are stored unchanged.

    Raises ValueError if tensors are missing, or not finite.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        if kind in ("lrqat_A", "lrqat_B"):
            name = module.removeprefix(PREFIX)
            B, A = state.get(f"{module}.lrqat_B"), state.get(f"{module}.lrqat_A")
            if B is None or A is None or f"{module}.lrqat_scale" not in state:
                raise ValueError(
                    f"`{name}` needs lrqat_A, lrqat_B and lrqat_scale, but not all are there; the "
                    "adapter's file is not whole"
                )
            if B.dim() != 2:
                raise ValueError(
                    f"the factors of `{name}` belong to {len(B)} experts, which are not packed; "
                    "keep this adapter as it is, or train it without `target_parameters`"
                )
            factors[name] = B, A
        elif kind == FINGERPRINT:
            rest[f"{module}.{PACKED_FINGERPRINT}"] = tensor
        else:
            rest[key] = tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"`{key}` has NaN or infinite entries; nothing was written")
    return factors, rest
