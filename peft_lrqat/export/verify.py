"""What an exported model computes, loaded by the loader it is for, against the LR-QAT model that it came from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from . import gguf, gptq
from .linears import lrqat_layers, model_tensors, quantized_linear
from .packed import load_quantized


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The comparison; ``exact`` says whether every weight is, bit for bit, what was trained."""

    loader: str
    layers: int
    different_layers: tuple[str, ...]
    different_tensors: tuple[str, ...]  # of all else
    logits_difference: (
        float | None
    )  # largest, on one row of tokens; None where nothing here runs the format
    bytes: int  # of the directory

    @property
    def exact(self) -> bool:
        return not self.different_layers and not self.different_tensors


@torch.no_grad()
def verify_export(
    model: PeftModel, path: str | os.PathLike[str], *, format: str, adapter_name: str | None = None
) -> Verification:
    """Loads the export in ``path`` and compares it with ``model``: all weights, and the logits of 32 tokens.

    GPTQ is read by this package alone; its weights are compared, and nothing is run.
    """
    path = Path(path)
    adapter_name = adapter_name or model.active_adapters[0]
    if format == "gptq":
        loaded, loader = None, "this package"
        weights = {
            name: gptq.read_weight(path, name, layer.base_layer.dtype)
            for name, layer in lrqat_layers(model).items()
        }
        others: dict[str, Tensor] = {}
    else:
        loaded, loader = _load(path, format, model, adapter_name)
        # compressed-tensors makes weights of its integers in the first forward pass.
        ids = torch.arange(32)[None] % loaded.config.vocab_size
        inputs = {"input_ids": ids} | (
            {"decoder_input_ids": ids} if loaded.config.is_encoder_decoder else {}
        )
        logits = loaded(**inputs).logits.float()
        weights = {name: _weight_of(loaded.get_submodule(name)) for name in lrqat_layers(model)}
        others = dict(loaded.state_dict())
    different, other = [], []
    for name, value in model_tensors(model, adapter_name):
        if not isinstance(value, Tensor):
            if not torch.equal(
                quantized_linear(name, value, adapter_name).weight.cpu(), weights[name]
            ):
                different.append(name)
        elif name in others and not torch.equal(value.cpu(), others[name]):
            other.append(name)
    difference = None
    if loaded is not None:
        mine = (
            model(**{name: ids.to(model.device) for name, ids in inputs.items()})
            .logits.float()
            .cpu()
        )
        difference = float((mine - logits).abs().max())
    return Verification(
        loader=loader,
        layers=len(weights),
        different_layers=tuple(different),
        different_tensors=tuple(other),
        logits_difference=difference,
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    )


def _load(
    path: Path, format: str, model: PeftModel, adapter_name: str
) -> tuple[PreTrainedModel, str]:
    if format == "packed":
        return load_quantized(path), "peft_lrqat.export.load_quantized"
    options = {}
    if format == "gguf":
        # Plain weights, whether kernels for the blocks are installed or not.
        unpack = GgufConfig(dequantize=True)
        options = {
            "gguf_file": gguf.FILE,
            "config": AutoConfig.from_pretrained(path),
            "quantization_config": unpack,
        }
    config = model.peft_config[adapter_name]
    written = (
        json.loads((path / "config.json").read_text(encoding="utf-8"))
        if format == "compressed-tensors"
        else {}
    )
    packs = written.get("quantization_config", {}).get("format") == "pack-quantized"
    if packs and not (config.bits_pattern or config.group_size_pattern):
        from transformers import CompressedTensorsConfig

        # Asymmetric weights load in no other way, and those of several widths not in this one.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    base = model.get_base_model()
    model_class = AutoModelForCausalLM if format == "gguf" else type(base)
    loaded = model_class.from_pretrained(path, dtype=base.dtype, **options)
    return loaded.eval(), f"transformers ({format})" if format in (
        "gguf",
        "compressed-tensors",
    ) else "transformers"


def _weight_of(module: nn.Module) -> Tensor:
    weight = module.weight.detach().cpu()
    return weight if isinstance(module, nn.Linear) else weight.T
