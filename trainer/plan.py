"""What training and shipping a model takes, from its configuration alone.

The bytes of weights, factors and optimizer are formulas. What autograd keeps for the backward pass
is counted: the model runs forward without data ("meta" tensors), and every tensor that is kept is
seen. So the count follows the architecture and not a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_lrqat.base.experts import (
    ExpertWeights,
    LowBitExperts,
    by_expert,
    expert_weights,
    find_experts,
    put_expert_weights,
)
from peft_lrqat.export.layout import CheckpointLayout
from peft_lrqat.formats.base import Format, Outline
from peft_lrqat.formats.linear import Target, linear_names
from peft_lrqat.formats.table import FORMATS, bytes_by_format
from peft_lrqat.lrqat.config import LRQATConfig
from peft_lrqat.quant.fake_quant import gives_scale_gradient
from peft_lrqat.quant.packing import packed_bytes


# Of a factor or scale in training: itself, its gradient and AdamW's two moments, in float32.
TRAINED_BYTES = 16
# Temporaries of a layer, whatever its size: a chunk of the dense weight and of its gradient.
WORKSPACE = 32 * 2**20
# Float32 gradients of logits that the loss holds at once, beside what is kept.
LOSS_GRADIENTS = 2
DOWNCAST_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fixed8": 1}
ATTENTION = "peft_lrqat_plan"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes, unless it says otherwise."""

    weights: int  # quantised weights, their number
    frozen: int  # of these in training: phi, first scales, zero points
    others: int  # embeddings, norms, the output layer and whatever else is not quantised
    trainable: int  # parameters, their number
    training_state: int  # factors and scales, their gradients, AdamW's moments
    kept: int  # what autograd keeps of a forward pass
    kept_outside: int  # the part of it outside the blocks: final norm, loss
    kept_block: int  # of one block, the largest
    block_inputs: int  # of all blocks, which is what checkpointing keeps of them
    loss: int  # gradients of the logits
    architecture: str  # its name
    plain: int  # the unquantised model, which a teacher in memory costs as well
    adapter: int  # the saved adapter
    plain_experts: int  # of `others`: weights of experts that are not quantised
    unit: int  # what FSDP2 puts together at a time: a block, or what lies outside them
    shipped: dict[str, int | str]  # by format, or why not

    def peak(self, checkpointing: bool) -> int:
        """Of training on one device."""
        return self.peak_of_each(1, checkpointing)

    def peak_of_each(self, devices: int, checkpointing: bool) -> int:
        """Of training on each of several devices under FSDP2, with the same batch on each.

        Everything is shared out; two units are put together, one of them fetched ahead.
        """
        shared = self.frozen + self.others + self.training_state
        together = min(2 * self.unit, shared) if devices > 1 else 0
        return -(-shared // devices) + together + WORKSPACE + self.activations(checkpointing)

    @property
    def loading_plain(self) -> int:
        """The peak while adapters are put on the plain model: its layers are replaced in turn."""
        return self.plain + self.training_state // 4 + WORKSPACE

    @property
    def loading_base(self) -> int:
        """The peak while a low-bit base is loaded, and adapters are put on it."""
        return self.frozen + self.others + self.training_state // 4

    @property
    def held(self) -> int:
        """All that is there whatever the data are."""
        return self.frozen + self.others + self.training_state + WORKSPACE

    def activations(self, checkpointing: bool) -> int:
        """What comes and goes with a step, at its peak.

        That is when the loss is differentiated. With checkpointing, it may also be when a block is
        run again and then differentiated, after what the loss needs is gone.
        """
        if not checkpointing:
            return self.kept + self.loss
        return self.block_inputs + max(self.kept_outside + self.loss, self.kept_block)


def make_plan(name: str, config: LRQATConfig, *, tokens: int, batch: int = 1) -> Plan:
    """Plans LR-QAT training of a causal language model.

    Args:
        name: of the model, a directory or a repository of the Hub; only its configuration is read.
        config: of the adapter; without ``target_modules``, all linear layers but the head.
        tokens: in a row.
        batch: rows in a step.

    Raises:
        ValueError: a setting does not fit the model, or the model cannot run without data.
    """
    model = skeleton(name)
    shapes = linear_names(model)
    if config.target_modules:
        asked = config.schemes(shapes)
        shapes = {layer: shape for layer, shape in shapes.items() if asked[layer] is not None}
    experts = cast("dict[str, ExpertWeights]", find_experts(model, config))
    sizes = {n: (*shape, 0) for n, shape in shapes.items()}
    sizes |= {n: (m.out_features, m.in_features, m.experts) for n, m in experts.items()}
    targets = [
        Target(
            name=layer,
            grid=config.weight_format(layer, width).grid,
            scale_dtype=config.scale_dtype,
            out_features=rows,
            in_features=width,
            experts=number,
            dtype=model.dtype,
        )
        for layer, (rows, width, number) in sizes.items()
    ]
    own = {id(model.get_parameter(target.parameter_name)) for target in targets}
    groups = sum(target.out_features * target.num_groups for target in targets)
    factors = sum(_factors(target, config) for target in targets)
    left = sorted(expert_weights(model).keys() - experts.keys())
    plain_experts = sum(p.numel() * p.element_size() for p in map(model.get_parameter, left))
    refused = {name: _why_not(format, model, targets, left) for name, format in FORMATS.items()}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    others = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in own)
    vocabulary = cast(Any, model.config).get_text_config().vocab_size
    unit = _largest_unit(model, targets, config)
    kept = kept_bytes(model, targets, tokens=tokens, batch=batch)
    return Plan(
        weights=sum(target.num_weights for target in targets),
        frozen=sum(_frozen_bytes(target, config.downcast) for target in targets),
        others=others,
        trainable=factors + groups,
        training_state=TRAINED_BYTES * (factors + groups),
        **kept,
        loss=LOSS_GRADIENTS * 4 * batch * tokens * vocabulary,
        architecture=type(model).__name__,
        plain=size,
        adapter=4 * (factors + groups),
        plain_experts=plain_experts,
        unit=unit,
        shipped={
            name: size if isinstance(size, str) else refused[name] or size + others
            for name, size in bytes_by_format(targets).items()
        },
    )


def _why_not(
    format: Format, model: PreTrainedModel, targets: list[Target], left: list[str]
) -> str | None:
    """Why a format does not hold a model with these targets, and weights of experts left plain."""
    experts = [(target.name, target) for target in targets if target.experts]
    names = [name.rpartition(".") for name in left]
    outline = Outline(
        config=model.config,
        targets={target.name: target for target in targets},
        plain_linears=lambda: tuple(f"{owner}.0.{kind}" for owner, _, kind in names),
    )
    try:
        format.check(outline)
        if experts and format.experts == "apart":
            CheckpointLayout(model, lambda: experts[:2])  # the other blocks are like the first
    except ValueError as error:
        return str(error)
    return None


def _factors(target: Target, config: LRQATConfig) -> int:
    """Entries of A and B."""
    matrices = 1 if config.experts_share_a else max(1, target.experts)
    return config.r * (matrices * target.in_features + target.out_features)


def _largest_unit(model: PreTrainedModel, targets: list[Target], config: LRQATConfig) -> int:
    """Bytes of the block, or of all that is outside blocks, whose frozen and trained tensors are
    most.
    """
    held = {
        target.parameter_name: _frozen_bytes(target, config.downcast)
        + 4 * (_factors(target, config) + target.out_features * target.num_groups)
        for target in targets
    }
    block_of = {id(p): number for number, b in enumerate(_blocks(model)) for p in b.parameters()}
    units: dict[int | None, int] = {}
    for name, parameter in model.named_parameters():
        unit, plain = block_of.get(id(parameter)), parameter.numel() * parameter.element_size()
        units[unit] = units.get(unit, 0) + held.get(name, plain)
    return max(units.values())


def skeleton(name: str) -> PreTrainedModel:
    """A causal language model without weights, in the dtype of its files."""
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def _frozen_bytes(target: Target, downcast: str) -> int:
    rows, groups = target.out_features, target.out_features * target.num_groups
    row = (
        packed_bytes(target.in_features, target.grid.bits)
        if downcast == "int"
        else target.in_features * DOWNCAST_BYTES[downcast]
    )
    return rows * row + 4 * groups + (0 if target.grid.symmetric else groups)


# What autograd keeps


class _Keeps(torch.autograd.Function):
    """Stands for a low-bit layer: its input is kept, and its output where rows have one scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, out: int, keeps_output: bool) -> Tensor:
        y = x.new_empty(*x.shape[:-1], out)
        ctx.save_for_backward(x, y if keeps_output else None)
        return y


class _LowBit(nn.Module):
    def __init__(self, target: Target, has_bias: bool) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(1, device="meta"))
        self.out = target.out_features
        self.keeps_output = gives_scale_gradient(target.num_groups, has_bias, target.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Keeps.apply(x, self.anchor, self.out, self.keeps_output))


class _LowBitExperts(nn.Module):
    """The same for the weights of experts, one of which gets some tokens."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(1, device="meta"))
        self.out = target.out_features // target.experts
        self.keeps_output = gives_scale_gradient(target.num_groups, False, target.dtype)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        def product(expert: int, tokens: Tensor) -> Tensor:
            kept = _Keeps.apply(tokens, self.anchor, self.out, self.keeps_output)
            return cast(Tensor, kept)

        return by_expert(x, counts, product, self.out)


class _Spread(LowBitExperts):
    """Experts of which each gets as many tokens as any other: there are no data to choose by."""

    def count(self, chosen: Tensor) -> list[int]:
        return [len(part) for part in chosen.tensor_split(self.num_experts)]


class _FlashAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and a number for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return cast(Tensor, _FlashAttention.apply(query, key, value)), None


class _Kept:
    """The storages that autograd keeps, each once; parameters and buffers are there anyway."""

    def __init__(self, model: nn.Module) -> None:
        held = [*model.parameters(), *model.buffers()]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        # Held here as well, so that no other storage comes to lie at the same address.
        self._seen: dict[int, Any] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._seen[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())


def kept_bytes(
    model: PreTrainedModel, targets: list[Target], *, tokens: int, batch: int
) -> dict[str, int]:
    """What autograd keeps for the backward pass: the fields of `Plan` that say so."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    model.set_attn_implementation(ATTENTION)
    low_bit = {target.name: _LowBitExperts(target) for target in targets if target.experts}
    for name, plain in expert_weights(model).items():
        put_expert_weights(model, name, low_bit.get(name, plain))
        model.get_submodule(name.rpartition(".")[0]).__class__ = _Spread
    for target in targets:
        if target.experts:
            continue
        layer = cast(Any, model.get_submodule(target.name))
        model.set_submodule(target.name, _LowBit(target, layer.bias is not None))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _LowBit | _LowBitExperts):
            module.anchor.requires_grad_(True)
    model.train()
    cast(Any, model.config).pad_token_id = None  # some look for padding in the data
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    kept = _Kept(model)
    blocks: dict[nn.Module, tuple[int, int]] = {}  # kept before and in a block, bytes of its input

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        blocks[block] = (kept.bytes, hidden.numel() * hidden.element_size())

    def after(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        start, size = blocks[block]
        blocks[block] = (kept.bytes - start, size)

    for block in _blocks(model):
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after, with_kwargs=True)
    try:
        with saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            model(input_ids=ids, labels=ids, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"a {type(model).__name__} cannot run without data, so what its training keeps cannot "
            f"be counted: {error}"
        ) from error
    inside = [own for own, _ in blocks.values()]
    return {
        "kept": kept.bytes,
        "kept_outside": kept.bytes - sum(inside),
        "kept_block": max(inside, default=0),
        "block_inputs": sum(size for _, size in blocks.values()),
    }


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of the decoder: the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
