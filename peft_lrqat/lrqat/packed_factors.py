"""Factors of an LR-QAT adapter that are packed in its file: how they are found there and unpacked.

`LRQATConfig.packed_factors` says how they are kept, by the names of `LoRAQuantConfig`; the tensors
are those of `peft_lrqat.quant.factors.storage`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from ..quant.factors.storage import PackedFormat, check_packed, check_rank, expand
from ..quant.grid import SCALE_DTYPES
from ..shared.names import PREFIX
from .config import LRQATConfig


KINDS = ("codes", "scales", "zero_points")
# Under another name: a loader that does not unpack finds no fingerprint, and the layer refuses to
# run.
FINGERPRINT, PACKED_FINGERPRINT = "lrqat_fingerprint", "loraquant_fingerprint"


def unpack_factors(config: LRQATConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter's file with plain factors, ``lrqat_A`` (r, in) and ``lrqat_B``
    (out, r), float32.

    ValueError where ``state`` is not what ``config.packed_factors`` describes.
    """
    fields = config.packed_factors
    plain = {key: tensor for key, tensor in state.items() if ".loraquant_" not in key}
    try:
        formats = _formats(fields or {})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`packed_factors` in {CONFIG_NAME} does not describe packed factors ({error}); the "
            "configuration is damaged"
        ) from None
    for name, format in formats.items():
        stored = {
            kind: key for kind in KINDS if (key := f"{PREFIX}{name}.loraquant_{kind}") in state
        }
        packed = {kind: state[key] for kind, key in stored.items()}
        fingerprint = state.get(f"{PREFIX}{name}.{PACKED_FINGERPRINT}")
        try:
            check_packed(format, packed)
            if fingerprint is None:
                raise ValueError("the fingerprint of the base weight is missing")
            check_rank(format, config.r)
        except ValueError as error:
            raise ValueError(
                f"the stored adapter does not fit `{name}`: {error}. Its files are not whole, or "
                "were changed"
            ) from None
        B, A = expand(format, packed, torch.float32)
        missing = config.r - len(format.bits)
        plain[f"{PREFIX}{name}.lrqat_B"] = torch.nn.functional.pad(B, (0, missing)).contiguous()
        plain[f"{PREFIX}{name}.lrqat_A"] = torch.nn.functional.pad(
            A, (0, 0, 0, missing)
        ).contiguous()
        plain[f"{PREFIX}{name}.{FINGERPRINT}"] = fingerprint
    known = {f"{PREFIX}{name}" for name in formats}
    if extra := sorted(
        key for key in state if ".loraquant_" in key and key.rpartition(".")[0] not in known
    ):
        raise ValueError(
            f"the file has `{extra[0]}`, which {CONFIG_NAME} does not name; its files were changed"
        )
    return plain


def _formats(fields: dict[str, Any]) -> dict[str, PackedFormat]:
    formats = {}
    for name, bits in fields["component_bits"].items():
        rows, columns = fields["shapes"][name]
        if not all(type(n) is int and n > 0 for n in (rows, columns, fields["group_size"])):
            raise ValueError(f"`{name}` has the shape {fields['shapes'][name]!r}")
        formats[name] = PackedFormat(
            bits=bits,
            rows=rows,
            columns=columns,
            group_size=fields["group_size"],
            scale_dtype=SCALE_DTYPES[fields["scale_dtype"]],
            zero_points=bool(fields["zero_points"]),
        )
    return formats
