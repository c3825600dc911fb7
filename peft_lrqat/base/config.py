"""The configuration of a low-bit base: how its frozen integers are made, and what it holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Optional, Union

from transformers.utils.quantization_config import QuantizationConfigMixin

from .._version import __version__
from ..quant import DOWNCASTS, Grid, WeightFormat
from ..quant.grid import SCALE_DTYPES
from ..shared.card import public_name
from ..shared.checks import check_choice, check_flag, check_integer, check_items, check_names
from ..shared.fields import helpful_arguments
from ..shared.names import PACKED_VERSIONS
from .settings import WeightSettings, as_parameter_names, check_bits, check_group_size


METHOD = "lrqat"
# Raised when a release before would read the files wrongly.
FORMAT_VERSION = 6
# Of a base without the weights of experts: releases before read it, too.
KINDS_VERSION = 4
# Likewise without the kinds of grids that are new in version 4.
WHOLE_VERSION = 3
NEW_KINDS = "balanced", "k_quant"
# Of a base without embeddings, which releases before version 3 read, too.
PLAIN_VERSION = 2
# Packed exports, which load as low-bit bases, share the count.
NEWEST_VERSION = max(FORMAT_VERSION, *PACKED_VERSIONS)


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """What ``quantization_config["modules"]`` says of one weight of shape (out, in)."""

    bits: int
    shape: tuple[int, int]
    symmetric: bool = True
    group_size: int = -1
    downcast: str = "int"
    scale_dtype: str = "bfloat16"
    base_dtype: str = "bfloat16"  # of the weight that the integers were made from
    first_range: str = "given"  # how the first scales were found, in words
    transposed: bool = False  # whether the module's own weight is (in, out)
    embedding: bool = False  # whether the module is an embedding, of (tokens, width)
    balanced: bool = False
    k_quant: bool = False
    experts: int = 0  # whose weights lie below one another; 0: it is one weight
    fingerprint: Optional[int] = None  # of integers, scales and zero points; None: not known yet

    @property
    def format(self) -> WeightFormat:
        grid = Grid(
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
            balanced=self.balanced,
            k_quant=self.k_quant,
        )
        return WeightFormat(
            grid=grid,
            downcast=self.downcast,
            scale_dtype=self.scale_dtype,
            in_features=self.shape[1],
        )

    @classmethod
    def from_dict(cls, name: str, fields: object) -> StoredWeight:
        """Checked; ValueError with the module's name for fields that describe no weight."""
        try:
            if not isinstance(fields, dict):
                raise ValueError(f"it must be a dict, but is {fields!r}")
            fields = dict(fields)
            shape = fields.pop("shape", None)
            if (
                not isinstance(shape, list | tuple)
                or len(shape) != 2
                or any(type(n) is not int or n < 1 for n in shape)
            ):
                raise ValueError(f"`shape` must be [out, in], but is {shape!r}")
            made = cls(shape=(shape[0], shape[1]), **fields)
            check_bits("bits", made.bits)
            check_group_size("group_size", made.group_size)
            check_choice("downcast", made.downcast, DOWNCASTS)
            check_choice("scale_dtype", made.scale_dtype, SCALE_DTYPES)
            check_choice("base_dtype", made.base_dtype, SCALE_DTYPES)
            check_flag("symmetric", made.symmetric)
            check_flag("transposed", made.transposed)
            check_flag("embedding", made.embedding)
            check_flag("balanced", made.balanced)
            check_flag("k_quant", made.k_quant)
            check_integer("experts", made.experts, 0)
            if made.experts and shape[0] % made.experts:
                raise ValueError(f"{made.experts} experts do not share {shape[0]} rows equally")
            made.format.grid.num_groups(shape[1])
        except (ValueError, TypeError) as error:
            raise ValueError(f"`modules` of the quantization config: `{name}`: {error}") from None
        return made

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self) | {"shape": list(self.shape)}
        if not self.embedding:
            del fields["embedding"]  # unknown to releases before version 3
        for name in (*NEW_KINDS, "experts"):
            if not fields[name]:
                del fields[name]  # likewise before versions 4 and 6
        return fields


@helpful_arguments()
@dataclass
class LowBitConfig(WeightSettings, QuantizationConfigMixin):
    """How ``from_pretrained`` makes a low-bit base, or how one that is stored was made.

    Every target linear becomes a frozen one on an integer grid as its weight arrives, so that the
    16-bit model is never in memory. The result runs as it is, is saved by ``save_pretrained`` and
    carries LR-QAT adapters.

    Example:
        ```py
        from transformers import AutoModelForCausalLM
        from peft_lrqat import LowBitConfig

        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=LowBitConfig(bits=4))
        model.save_pretrained("base-4bit")
        ```
    """

    newest_format: ClassVar[int] = NEWEST_VERSION

    downcast: Literal["fp32", "bf16", "fp16", "fixed8", "int"] = field(
        default="int",
        metadata={
            "help": "How the frozen weight is kept. int (default): rounded integers, densely "
            "packed, b/8 bytes a weight. fixed8: 8-bit fixed point, b integer and 8-b fractional "
            "bits, 1 byte a weight. fp32, bf16, fp16: for reference."
        },
    )
    target_modules: Union[list[str], str] = field(
        default="all-linear",
        metadata={
            "help": "Modules to quantise: names or endings of names, one regular expression, or "
            "'all-linear', the default: every Linear and Conv1D except the output layer."
        },
    )
    target_parameters: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": "Weights of experts to quantise, which transformers keeps as one parameter for "
            "each projection: names or endings of names, such as ['experts.down_proj'], or "
            "'all-experts'. Left out: none."
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Modules to leave alone: names, endings or one regular expression."},
    )
    modules: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "What is stored, by module; filled in when the base is made."},
    )
    made_from: Optional[str] = field(
        default=None, metadata={"help": "The model that the base was made from; filled in."}
    )
    source: Optional[dict[str, Any]] = field(
        default=None,
        metadata={
            "help": "The quantization config of the checkpoint that the integers were taken over "
            "from; filled in by `load_low_bit`."
        },
    )
    calibration: Optional[dict[str, Any]] = field(
        default=None,
        metadata={"help": "Method, settings and data of a calibrated base; filled in."},
    )
    digests: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "Digests of the other stored tensors, by name; filled in when saving."},
    )
    settings_digest: Optional[str] = field(
        default=None,
        compare=False,
        metadata={"help": "Digest of the stored config.json; filled in when saving."},
    )
    format_version: int = field(
        default=PLAIN_VERSION,
        metadata={"help": "Version of the stored format; leave it to the library."},
    )
    library_version: Optional[str] = field(
        default=None,
        compare=False,
        metadata={"help": "The release of peft_lrqat that made the base; filled in."},
    )
    # transformers annotates an enum that only it can extend.
    quant_method: str = field(  # type: ignore[assignment]
        default=METHOD, metadata={"help": "lrqat; for transformers."}
    )

    def __post_init__(self) -> None:
        check_integer("format_version", self.format_version, 1)
        if self.format_version > NEWEST_VERSION:
            raise ValueError(
                f"`format_version` is {self.format_version}, but this peft_lrqat reads up to "
                f"{NEWEST_VERSION}: a newer release made the base; run "
                "`pip install -U peft-lrqat`"
            )
        if self.quant_method != METHOD:
            raise ValueError(f"`quant_method` must be {METHOD!r}, but is {self.quant_method!r}")
        self.check_weight_settings()
        for name in ("target_modules", "exclude_modules"):
            check_names(name, getattr(self, name), one_string=True)
        self.target_parameters = as_parameter_names(self.target_parameters)
        check_items("digests", self.digests, "digests")
        for name in ("source", "calibration"):
            if getattr(self, name) is not None:
                check_items(name, getattr(self, name), "settings")
        self.stored_weights()

    @property
    def takes_over(self) -> bool:
        """Whether the checkpoint is that of another method, whose integers are to be taken over."""
        return self.source is not None and not self.modules

    def take_modules(self, weights: dict[str, StoredWeight]) -> None:
        """Sets what is stored, and the version that its readers need."""
        self.modules = {name: weight.to_dict() for name, weight in weights.items()}
        if any(weight.experts for weight in weights.values()):
            self.format_version = FORMAT_VERSION
        elif any(weight.balanced or weight.k_quant for weight in weights.values()):
            self.format_version = KINDS_VERSION
        else:
            embeds = any(weight.embedding for weight in weights.values())
            self.format_version = WHOLE_VERSION if embeds else PLAIN_VERSION

    def stored_weights(self) -> dict[str, StoredWeight]:
        """What is stored, by module, checked."""
        items = check_items("modules", self.modules, "dicts")
        return {name: StoredWeight.from_dict(name, fields) for name, fields in items}

    def to_dict(self) -> dict[str, Any]:
        """The fields as ``config.json`` has them."""
        fields = {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in asdict(self).items()
            if name != "settings_digest"  # of the file that was read, not of the next one
        }
        fields["made_from"] = public_name(self.made_from)
        if fields["embedding_bits"] is None:
            del fields["embedding_bits"]  # unknown to releases before version 3
        for name in (*NEW_KINDS, "target_parameters"):
            if not fields[name]:
                del fields[name]  # likewise before versions 4 and 6
        return fields | {"library_version": __version__}
