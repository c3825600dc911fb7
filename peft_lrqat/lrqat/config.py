"""The configuration of an LR-QAT adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Optional, Union

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..base.settings import WeightSettings, as_parameter_names, check_bits
from ..quant import Grid
from ..quant.grid import SCALE_DTYPES
from ..shared.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_json,
    check_names,
    check_regex,
)
from ..shared.config import AdapterConfig
from ..shared.fields import helpful_arguments


logger = logging.get_logger(__name__)
# Raised when the same file would give other integers than before.
FORMAT_VERSION = 1
EXPERT_FIELDS = "target_parameters", "experts_share_a"


@helpful_arguments(like=LoraConfig)
@dataclass
class LRQATConfig(WeightSettings, AdapterConfig):
    """Configuration of LR-QAT, low-rank quantisation-aware training (arXiv 2406.06385).

    Each target linear's weight is replaced by a downcast one on an integer grid; rank-``r`` factors
    inside the rounding and the scales are trained. ``merge_and_unload()`` gives one integer matrix
    times its scales.

    Example:
        ```py
        from peft import get_peft_model
        from peft_lrqat import LRQATConfig

        model = get_peft_model(model, LRQATConfig(task_type="CAUSAL_LM",
        target_modules="all-linear", bits=3))
        ```
    """

    newest_format: ClassVar[int] = FORMAT_VERSION
    patterns: ClassVar[tuple[str, ...]] = ("bits_pattern", "group_size_pattern")

    r: int = field(
        default=32,
        metadata={"help": "Rank of the factors lrqat_A and lrqat_B. Default 32, as in the paper."},
    )
    lora_alpha: float = field(
        default=32,
        metadata={
            "help": "The low-rank product is multiplied by gamma = lora_alpha / r. Default 32: "
            "gamma = 1, with which the factors move integers soonest at a given learning rate. "
            "The paper uses 1 (gamma = 1/32 at r = 32)."
        },
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Modules to quantise and train: names or endings of names, one regular "
            "expression, or 'all-linear': every Linear and Conv1D but the output layer, which is "
            "what the paper quantises and what the command line takes by default. Without a value "
            "in Python: PEFT's LoRA targets of the architecture, often only two in each block."
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Modules to leave alone: names or endings of names, or one regular expression."
        },
    )
    target_parameters: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Weights of experts to quantise and train, which transformers keeps as one "
            "parameter for each projection: names or endings of names, such as "
            "['experts.gate_up_proj', 'experts.down_proj'], or 'all-experts'. Left out: those that "
            "a low-bit base holds; in other models none."
        },
    )
    experts_share_a: bool = field(
        default=False,
        metadata={
            "help": "The experts of a layer share lrqat_A, which makes the adapter smaller. "
            "Default False: each has its own."
        },
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Further modules to train in full and to save with the adapter, such as a "
            "classification head."
        },
    )
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings are trained in full and saved with the adapter, such "
            "as those added for a chat format: their ids, in the input embedding (and in the head "
            "that is tied to it), or ids by the name of an embedding: {'embed_tokens': [1, 2]}. "
            "For plain embeddings, without embedding_bits."
        },
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None,
        metadata={
            "help": "Index or indices of the layers to work on; with target_modules as a list of "
            "names."
        },
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Name of the ModuleList that layers_to_transform counts in, where it is not "
            "'layers' or 'h'."
        },
    )
    train_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Train the embedding and the output layer of embedding_bits like other "
            "targets. False, the default: their integers and scales are frozen."
        },
    )
    activation_bits: Optional[int] = field(
        default=None,
        metadata={
            "help": "Bits of the inputs of the target modules, 2 to 8; the paper has 8 and 4. "
            "Dynamic: each token has a range of its own, found in every forward pass. Attention's "
            "softmax, norms and residuals stay in the model's dtype. Left out: the inputs stay as "
            "they are."
        },
    )
    kv_cache_bits: Optional[int] = field(
        default=None,
        metadata={
            "help": "Bits of the keys (after rotary embedding) and values in the attention layers "
            "that target modules lie in, 2 to 8; the paper has 8 and 4. One range for each token "
            "and head. Left out: they stay as they are."
        },
    )
    activation_symmetric: bool = field(
        default=False,
        metadata={
            "help": "Ranges of activation_bits and kv_cache_bits. False, the default and the "
            "paper's: from the smallest to the largest value, with a zero point. True: as far "
            "below zero as above."
        },
    )
    clipped_gradient: Literal["zero", "pass_through"] = field(
        default="zero",
        metadata={
            "help": "What a weight outside the grid hands on to A and B. zero (default): nothing, "
            "the exact gradient of the clip. pass_through: as if it lay inside, which saves a "
            "little time."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True, the default: A Kaiming-uniform and B zero, so that training starts "
            "from round-to-nearest. False: B random, of one grid step; useful in tests only."
        },
    )
    base_dtype: Optional[str] = field(
        default=None,
        metadata={
            "help": "The dtype of the base weights that the frozen weights are made from; filled "
            "in when the adapter is created. A base loaded in a wider dtype is rounded to it "
            "first, so that the same integers come out."
        },
    )
    base_dtype_pattern: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "The modules whose base weight had another dtype, by full name; filled in "
            "like base_dtype."
        },
    )
    base_made_from: Optional[str] = field(
        default=None,
        metadata={
            "help": "The model that the low-bit base was made from, where the base is one; filled "
            "in for the model card."
        },
    )
    base_dtype_found: bool = field(
        default=False,
        init=False,
        compare=False,
        metadata={
            "help": "Whether base_dtype was found in a base model, and not asked for: found anew "
            "in the next one. Not saved."
        },
    )
    verify_base: bool = field(
        default=True,
        metadata={
            "help": "Refuse to load the adapter on a base model other than the one it was trained "
            "on. Not saved. Default True; False is for those who know that the difference does no "
            "harm."
        },
    )
    training_record: Optional[dict] = field(
        default=None,
        metadata={
            "help": "What the trainer writes down for the model card: steps, settings, metrics; "
            "filled in. It changes nothing else."
        },
    )
    packed_factors: Optional[dict] = field(
        default=None,
        metadata={
            "help": "How A and B lie in the saved file, where they are packed "
            "(`peft_lrqat.loraquant.quantize_adapter`); filled in by the conversion, and None "
            "once they are loaded."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LRQAT")
        self.check_weight_settings()
        self._check_choices()
        self._check_numbers()
        self._check_targets()
        _check_record(self.training_record)
        if self.packed_factors is not None and not isinstance(self.packed_factors, dict):
            raise ValueError(
                f"`packed_factors` must be None or a dict, but is {self.packed_factors!r}"
            )

    def _check_choices(self) -> None:
        for name, known in (
            ("clipped_gradient", ("zero", "pass_through")),
            ("base_dtype", (*SCALE_DTYPES, None)),
        ):
            check_choice(name, getattr(self, name), known)
        flags = ("activation_symmetric", "init_weights", "train_embeddings", "verify_base")
        for name in (*flags, "experts_share_a"):
            check_flag(name, getattr(self, name))

    def _check_numbers(self) -> None:
        check_integer("r", self.r, 1)
        for name in ("activation_bits", "kv_cache_bits"):
            if getattr(self, name) is not None:
                check_bits(name, getattr(self, name), or_none=True)
        if (
            isinstance(self.lora_alpha, bool)
            or not isinstance(self.lora_alpha, int | float)
            or not 0 < self.lora_alpha < 1e6
        ):
            raise ValueError(f"`lora_alpha` must be a positive number, but is {self.lora_alpha!r}")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name), one_string=True)
        check_names("modules_to_save", self.modules_to_save, one_string=False)
        self._check_experts()
        _check_tokens(self.trainable_token_indices)
        if self.trainable_token_indices is not None and self.embedding_bits is not None:
            raise ValueError(
                "`trainable_token_indices` trains rows of plain embeddings, but `embedding_bits` "
                "rounds them; leave one of the two out, or set `train_embeddings=True`"
            )
        layers = self.layers_to_transform
        if layers is not None:
            for index in layers if isinstance(layers, list | tuple | set) else [layers]:
                check_integer("layers_to_transform", index, 0)
        if isinstance(self.target_modules, str) and layers is not None:
            # One expression is matched as it is, and 'all-linear' becomes full names, which PEFT
            # takes whatever their layer.
            raise ValueError(
                "`layers_to_transform` needs `target_modules` as a list of names, such as "
                "['q_proj', 'down_proj'], but it is "
                f"{self.target_modules!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "`layers_pattern` needs `layers_to_transform`: it only says where its indices count"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_regex(name, getattr(self, name))

    def _check_experts(self) -> None:
        self.target_parameters = as_parameter_names(self.target_parameters)
        if self.target_parameters and self.activation_bits is not None:
            raise ValueError(
                "`activation_bits` is not for experts, whose inputs stay as they are; leave out "
                "`activation_bits` or `target_parameters`"
            )

    @classmethod
    def from_lora(cls, config: LoraConfig, **changes: Any) -> LRQATConfig:
        """The configuration of a LoRA script, with LR-QAT in LoRA's place.

        Takes over the rank, ``lora_alpha``, targets, layers, modules to save and trained tokens.
        ``changes`` are fields of this class, such as ``bits``, and win over LoRA's.

        Raises:
            ValueError: ``config`` has a setting that LR-QAT does not have, such as dropout; the
                message names it. ``lora_dropout=0`` among the ``changes`` leaves it out.

        Example:
            ```py
            config = LRQATConfig.from_lora(LoraConfig(r=16, target_modules="all-linear"), bits=4)
            ```
        """
        # What LoRA writes down itself, and the layout of Conv1D, which is found from the module.
        own = {"peft_type", "peft_version", "fan_in_fan_out", "runtime_config"}
        taken = {
            option.name: getattr(config, option.name)
            for option in fields(LoraConfig)
            if option.init and option.name not in own
        }
        return cls(**taken | changes)

    @classmethod
    def for_runtime(
        cls, runtime: str, *, bits: int = 4, model: nn.Module | None = None, **fields: Any
    ) -> LRQATConfig:
        """A configuration whose result a runtime runs as it is.

        The group size is one that the runtime's files store at about the bits that are trained; if
        there is none, a warning says what they take.

        Args:
            runtime: ``transformers``, ``vllm`` or ``llama.cpp``.
            bits: bits per weight.
            model: the base model, to choose a group size that divides the widths of its layers.
            fields: fields of the class, which override the preset's.

        Raises:
            ValueError: the runtime does not run these settings.

        Example:
            ```py
            config = LRQATConfig.for_runtime(
                "vllm", task_type="CAUSAL_LM", target_modules="all-linear"
            )
            model = get_peft_model(model, config)
            ```
        """
        # The formats behind it are many files, which training and loading do without.
        from ..formats.linear import linear_names
        from ..formats.runtimes import runtime_named

        chosen = runtime_named(runtime)
        known: dict[str, Any] = {} if model is None else {"shapes": linear_names(model).values()}
        k_quant = fields.get("k_quant")
        if k_quant is None and fields.get("scale_dtype", "float16") != "float16":
            k_quant = False
        preset = chosen.preset(
            bits,
            fields.get("symmetric"),
            **known,
            balanced=fields.get("balanced", False),
            k_quant=k_quant,
        )
        config = cls(**{**preset, "bits": bits, **fields})
        is_conv1d = model is not None and any(isinstance(m, Conv1D) for m in model.modules())
        for b in {config.bits, *config.bits_pattern.values()}:
            for size in {config.group_size, *config.group_size_pattern.values()}:
                grid = config.grid_of(b, size)
                reason = chosen.why_not(
                    grid, config.scale_dtype, is_conv1d=is_conv1d
                ) or chosen.why_not_activations(grid, config.activation_grid, config.kv_cache_grid)
                if reason is not None:
                    raise ValueError(reason)
        names = sum(chosen.fused, ()) if model is None else linear_names(model)
        if reason := chosen.why_not_fused(config.schemes(names)):
            raise ValueError(reason)
        grid = config.grid_of(bits, config.group_size)
        found = chosen.stored_bits(grid, **known)
        if found.wasteful:
            logger.warning(f"{found.remark(chosen.format)}; other bits or group sizes take less")
        return config

    def schemes(self, names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
        """Bits and group size of linear layers by name; None: not a target.

        A name without a path, such as ``q_proj``, stands for that layer in a block. Without
        ``target_modules`` nothing is known, and the result is empty.
        """
        if self.target_modules is None:
            return {}
        asked = self
        if self.target_modules == "all-linear":
            asked = replace(self, target_modules=r".*")
        chosen = self.layers_to_transform
        index = chosen if isinstance(chosen, int) else next(iter(chosen or [0]))
        found: dict[str, tuple[int, int] | None] = {}
        for name in names:
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            full = name if "." in name else f"model.layers.{index}.{block}.{name}"
            grid = self.weight_grid(full)
            is_target = check_target_module_exists(asked, full)
            found[name] = (grid.bits, grid.group_size) if is_target else None
        return found

    @property
    def activation_grid(self) -> Grid | None:
        """The grid of each token of a target's input; None: it stays as it is."""
        return self._token_grid(self.activation_bits)

    @property
    def kv_cache_grid(self) -> Grid | None:
        """The grid of each token and head of keys and values; None: they stay as they are."""
        return self._token_grid(self.kv_cache_bits)

    def _token_grid(self, bits: int | None) -> Grid | None:
        return None if bits is None else Grid(bits=bits, symmetric=self.activation_symmetric)

    def base_dtype_of(self, module_name: str) -> str | None:
        """The dtype that one target's frozen weight is made from; None before it is filled in."""
        return self.base_dtype_pattern.get(module_name, self.base_dtype)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved; some belong to one run and are left out."""
        _check_record(self.training_record)  # the trainer sets it on a finished config
        fields = super().to_dict()
        del fields["verify_base"], fields["base_dtype_found"]
        for name in EXPERT_FIELDS:
            if not fields[name]:
                del fields[name]  # unknown to release 0.1
        return fields

    @property
    def base_dtype_is_open(self) -> bool:
        """Whether the dtype of the base weights is to be found in the base model."""
        return self.base_dtype is None or self.base_dtype_found


def _check_tokens(tokens: object) -> None:
    for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if ids is None and tokens is None:
            return
        if not isinstance(ids, list) or not ids:
            raise ValueError(
                "`trainable_token_indices` must be a list of token ids, such as [1, 2], or such "
                f"lists by the names of embeddings, but is {tokens!r}"
            )
        for index in ids:
            check_integer("trainable_token_indices", index, 0)
        if len(set(ids)) < len(ids):
            raise ValueError(f"`trainable_token_indices` names a token twice: {ids}")


def _check_record(record: object) -> None:
    if record is None:
        return
    parts = (
        [record, record.get("settings", {}), record.get("metrics", {})]
        if isinstance(record, dict)
        else [record]
    )
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            "`training_record` must be None or a dict such as "
            '{"steps": 10, "settings": {"lr": 0.1}, "metrics": {"loss": 2.5}}, '
            f"but is {record!r}"
        )
    check_json("training_record", record, allow_nan=False)
