"""The door through which transformers loads and makes low-bit bases.

A stored base has ``"quantization_config": {"quant_method": "lrqat", ...}`` in its ``config.json``;
``from_pretrained`` then puts `DowncastLinear` modules in place before any weight is read. With a
`LowBitConfig` and a plain checkpoint, each target's weight is turned into one as it arrives.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)
from transformers.modeling_utils import (
    is_fsdp_enabled,
    is_local_dist_rank_0,
    load_state_dict,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging

from ..quant import unpack
from ..quant.grid import DTYPE_NAMES, SCALE_DTYPES
from ..shared.model_files import CONFIG, check_model, check_settings
from ..shared.names import PACKED_VERSIONS
from ..shared.pages import release_pages
from ..shared.words import some
from .config import METHOD, LowBitConfig, StoredWeight
from .downcast import DowncastLinear
from .embedding import (
    DowncastEmbedding,
    Ends,
    Plain,
    find_ends,
    input_embedding,
    layer_class,
    let_resize,
    tie_head,
    width_of,
)
from .experts import (
    ExpertWeights,
    expert_weights_at,
    find_experts,
    keep_apart,
    set_layer,
)
from .settings import HEADS, is_excluded
from .takeover import Takeover, put


logger = logging.get_logger(__name__)
# Threads that compute digests; more wait for the disk or the memory.
MAX_THREADS = 8
# Smaller tensors are read again sooner than their pages are found.
RELEASED_BYTES = 1 << 22


def find_targets(model: PreTrainedModel, config: LowBitConfig) -> dict[str, Plain]:
    """The modules that ``config`` names, by name; ValueError where it names none, or a tied one.

    'all-linear' leaves the output layer alone, like PEFT's; so do tied weights. With
    ``embedding_bits``, the embedding and an output layer of its own are among them, and their bits
    are written into ``config.bits_pattern``.
    """
    targets: dict[str, Plain] = dict(_linear_targets(model, config))
    targets |= cast("dict[str, Plain]", find_experts(model, config))
    if config.embedding_bits is not None:
        ends = find_ends(model)
        config.set_embedding_bits(dict.fromkeys(ends.weights, config.embedding_bits))
        for name in ends.weights:
            targets[name] = cast(Plain, model.get_submodule(name))
    return targets


def _linear_targets(model: PreTrainedModel, config: LowBitConfig) -> dict[str, nn.Linear | Conv1D]:
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and name
    }
    tied = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if _is_tied(model, n)}
    if config.target_modules == "all-linear":
        head = model.get_output_embeddings()
        chosen = {
            name: module
            for name, module in linears.items()
            if module is not head
            and not ("." not in name and name.endswith(HEADS))
            and id(module.weight) not in tied
            and not is_excluded(config, name)
        }
    else:
        chosen = {
            name: m for name, m in linears.items() if check_target_module_exists(config, name)
        }
        for name, module in chosen.items():
            if id(module.weight) in tied and config.embedding_bits is None:
                raise ValueError(
                    f"the weight of `{name}` is tied to another module's, which would be left "
                    "behind; leave it out of `target_modules`, or set `embedding_bits`"
                )
        chosen = {n: m for n, m in chosen.items() if id(m.weight) not in tied}
    if not chosen:
        raise ValueError(
            f"`target_modules`={config.target_modules!r} names no Linear or Conv1D of this "
            f"{type(model).__name__}, whose linears are {some(linears)}"
        )
    return chosen


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return name in tied or name in tied.values()


def digest(tensor: Tensor) -> str:
    """CRC-32 of the dtype, the shape and the bytes of a tensor, as 8 hexadecimal digits.

    It changes with any change that 4 bytes in a row hold, and is as fast as a disk.
    """
    return f"{zlib.crc32(_bytes(tensor), zlib.crc32(_heading(tensor))):08x}"


def _slow_digest(tensor: Tensor) -> str:
    """What the first bases of version 2 have, of tensors that belong to no target."""
    state = hashlib.blake2b(_heading(tensor), digest_size=8)
    state.update(_bytes(tensor))
    return state.hexdigest()


def _heading(tensor: Tensor) -> bytes:
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data


def _is_stored(opened: Any, files: list[str], name: str, expected: str) -> bool:
    """Whether a tensor of an open file has the digest that was written."""
    tensor = opened.get_tensor(name)
    same = (digest if len(expected) == 8 else _slow_digest)(tensor) == expected
    if tensor.nbytes >= RELEASED_BYTES:
        release_pages(tensor, files)
    return same


class _Downcast(ConversionOps):
    """Puts a `DowncastLinear` in place of the module whose weight has arrived."""

    def __init__(self, quantizer: LowBitQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(  # type: ignore[override]  # transformers passes all of these by name
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = self.hf_quantizer.target_of(full_layer_name)
        assert name is not None
        self.hf_quantizer.replace(model, name, weight)
        release_pages(weight, self.hf_quantizer.files)
        missing_keys.discard(full_layer_name)
        return {}


class _UnpackZeroPoints(ConversionOps):
    """Zero points of a packed export, (out, bytes) -> (out, groups) uint8."""

    def __init__(self, quantizer: LowBitQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(  # type: ignore[override]  # transformers passes all of these by name
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Tensor]:
        (packed,) = input_dict.values()
        packed = packed[0] if isinstance(packed, list) else packed
        stored = self.hf_quantizer.stored[full_layer_name.rpartition(".")[0]]
        grid = stored.format.grid
        groups = grid.num_groups(stored.shape[1])
        return {full_layer_name: unpack(packed, grid.bits, groups).contiguous()}


def downcast(
    linear: Plain, name: str, weight: Tensor, config: LowBitConfig
) -> DowncastLinear | None:
    """What stands for ``linear`` once its ``weight`` is there; None if that is not finite."""
    if not torch.stack(torch.aminmax(weight)).isfinite().all():
        return None
    if isinstance(linear, ExpertWeights):
        linear.take(weight)
    else:
        linear.weight = nn.Parameter(weight, requires_grad=False)
    width = width_of(linear)
    return layer_class(linear).from_linear(
        linear,
        config.weight_format(name, width),
        estimator=config.range_estimator,
        p=config.range_p,
        base_dtype=weight.dtype,
    )


def check_tied_copy(files: list[str], ends: Ends) -> None:
    """Raises ValueError where the files hold another weight for the tied output layer."""
    if not ends.tied:
        return
    names = (f"{ends.embedding}.weight", f"{ends.head}.weight")
    found: dict[str, Tensor] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            held = load_state_dict(file)  # mapped into memory, and tensors alone
            found |= {name: held[name] for name in names if name in held}
            continue
        with safe_open(file, framework="pt") as opened:
            for name in names:
                if name in opened.keys():  # noqa: SIM118, it is no dict
                    found[name] = opened.get_tensor(name)
    if len(found) == 2 and not torch.equal(*found.values()):
        raise ValueError(
            f"the config ties `{names[1]}` to `{names[0]}`, but the checkpoint holds another "
            "weight for each; set `tie_word_embeddings=false` in its config.json"
        )


class LowBitQuantizer(HfQuantizer):
    """Loads a stored low-bit base or packed export, or makes a base while a checkpoint is read."""

    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored: dict[str, StoredWeight] = quantization_config.stored_weights()
        self._targets: set[str] = set()
        self.files: list[str] = []
        self._conversions: list[Any] = []
        self._not_finite: list[str] = []
        self._takeover: Takeover | None = None

    # Before loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for what cannot be made."""
        if self.pre_quantized and not self.stored and not self.quantization_config.takes_over:
            raise ValueError(
                "the quantization config of this checkpoint names no module, so it is not a "
                "low-bit base; make one with `lrqat prepare`"
            )
        places = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" in places:
            raise ValueError(
                "`device_map` puts modules of a low-bit base on disk, where they cannot run; "
                "leave them on a device or the CPU"
            )

    @property
    def is_packed_export(self) -> bool:
        """Whether the files are those of ``export_model(..., format="packed")``."""
        return self.pre_quantized and self.quantization_config.format_version in PACKED_VERSIONS

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.files = list(checkpoint_files or [])
        if not self.pre_quantized:
            targets = find_targets(model, self.quantization_config)
            for name, module in targets.items():
                self.quantization_config.weight_format(name, width_of(module))
            self._targets = set(targets)
            if self.quantization_config.embedding_bits is not None:
                self._tie(model)
            self.quantization_config.made_from = model.config._name_or_path or None
            return
        if self.quantization_config.takes_over:
            source = self.quantization_config.source or {}
            self._takeover = Takeover(model, source, self.files)
            if any(
                model.get_submodule(name) is input_embedding(model)
                for name, _ in model.named_modules()
                if name in self._takeover.found
            ):
                self._tie(model)
            self.quantization_config.made_from = model.config._name_or_path or None
            return
        for name, stored in self.stored.items():
            self._put_empty(model, name, stored)
        if any(stored.embedding for stored in self.stored.values()):
            self._tie(model)
        self._check_settings()

    def _check_settings(self) -> None:
        """Raises ValueError for a ``config.json`` beside the weights that is not what was written.

        Of a packed export, whose digests lie in the same place, all tensors are looked at, too.
        """
        files = list(map(Path, self.files))
        folder = files[0].parent if files else None
        if folder is None or not (folder / CONFIG).is_file():
            return
        if self.is_packed_export and not _gets_its_share():
            check_model(folder, files)
        else:
            check_settings(folder)

    def _tie(self, model: PreTrainedModel) -> None:
        """The tied output layer computes with the integers of the embedding."""
        let_resize(model)
        ends = find_ends(model)
        check_tied_copy(self.files, ends)
        if ends.tied:
            tie_head(model, ends)

    def _put_empty(self, model: PreTrainedModel, name: str, stored: StoredWeight) -> None:
        try:
            linear = expert_weights_at(model, name) or model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the low-bit base has a weight for `{name}`, but {type(model).__name__} has no "
                "such module; its config.json belongs to another architecture or release"
            ) from None
        embeds, of_experts = isinstance(linear, nn.Embedding), isinstance(linear, ExpertWeights)
        conv1d = isinstance(linear, Conv1D)
        transposed = linear.is_transposed if isinstance(linear, ExpertWeights) else conv1d
        kinds = (transposed, embeds, of_experts)
        wanted = (stored.transposed, stored.embedding, stored.experts > 0)
        if not isinstance(linear, Plain) or kinds != wanted:
            raise ValueError(
                f"`{name}` is a {type(linear).__name__} in {type(model).__name__}, but the low-bit "
                "base holds the weight of another kind of module for it"
            )
        if isinstance(linear, ExpertWeights) and linear.experts != stored.experts:
            raise ValueError(
                f"`{name}` has {linear.experts} experts in {type(model).__name__}, but "
                f"{stored.experts} in the low-bit base; its config.json was changed"
            )
        shape = tuple(linear.weight.shape[::-1] if conv1d else linear.weight.shape)
        if shape != stored.shape:
            raise ValueError(
                f"`{name}` has shape {shape} in {type(model).__name__}, but {stored.shape} in the "
                "low-bit base; its config.json was changed"
            )
        made = layer_class(linear)(
            stored.shape[1],
            stored.shape[0],
            stored.format,
            bias=getattr(linear, "bias", None),
            dtype=linear.weight.dtype,
            base_dtype=SCALE_DTYPES[stored.base_dtype],
            first_range=stored.first_range,
            is_conv1d=conv1d,
            device="meta",
        )
        made.stand_for(linear)
        set_layer(model, name, made)

    # While loading

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether this is the weight of a target that is still a plain module."""
        return not self.pre_quantized and self.target_of(param_name) is not None

    def target_of(self, param_name: str) -> str | None:
        """The name of the target whose weight a parameter is: its module, or of experts its own."""
        module, _, kind = param_name.rpartition(".")
        if param_name in self._targets:
            return param_name
        return module if kind == "weight" and module in self._targets else None

    def get_quantize_ops(self) -> ConversionOps:
        return _Downcast(self)

    def replace(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """Puts the downcast layer of ``weight`` in place of the plain module ``name``."""
        linear = expert_weights_at(model, name) or cast(Plain, model.get_submodule(name))
        made = downcast(linear, name, weight, self.quantization_config)
        if made is None:
            # An exception here would end as a conversion that "encountered some issues".
            self._not_finite.append(name)
        else:
            put(model, name, made)

    def get_weight_conversions(self) -> list[Any]:
        """Packed exports call the same bytes by other names; other methods have other bytes."""
        if self._takeover is not None:
            self._conversions = [self._takeover.converter]
            return self._conversions
        if not self.is_packed_export:
            return []
        self._conversions = [
            WeightRenaming(r"\.codes$", ".phi"),
            WeightRenaming(r"\.scale$", ".scale0"),
            WeightConverter("zero_points", "zero_point", [_UnpackZeroPoints(self)]),
        ]
        return self._conversions

    # After loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self._not_finite:
            raise ValueError(
                f"the weights of {some(self._not_finite)} have NaN or infinite entries; repair the "
                "base model first"
            )
        if self._takeover is not None:
            self._takeover.finish(self.quantization_config)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, DowncastLinear)}
        for name, layer in layers.items():
            if isinstance(layer, DowncastEmbedding):
                layer.place_mark()
            for kind in ("phi", "scale0", "zero_point"):
                tensor = getattr(layer, kind)
                if tensor is None:
                    continue
                tensor.requires_grad_(False)
                if tensor.device.type == "meta":
                    raise ValueError(
                        f"the low-bit base has no `{name}.{kind}`: its files are not whole"
                    )
        if self.pre_quantized:
            self._verify(layers)
        elif missing := self._targets - layers.keys():
            raise ValueError(
                f"the checkpoint has no weight for {some(missing)}; its files are not whole, or "
                "belong to another architecture"
            )
        # Saved again, a packed export is a low-bit base.
        ours = set(map(id, self._conversions))
        conversions: Any = model._weight_conversions
        vars(model)["_weight_conversions"] = [c for c in conversions if id(c) not in ours]
        keep_apart(model)
        self.quantization_config.take_modules({n: describe(m) for n, m in layers.items()})
        model.config.quantization_config = self.quantization_config

    def _verify(self, layers: dict[str, DowncastLinear]) -> None:
        """Raises ValueError unless all that is stored is what was written."""
        if _gets_its_share():
            for name, layer in layers.items():
                if (known := self.stored[name].fingerprint) is not None:
                    layer.trust(known)
            return
        digests = self.quantization_config.digests
        read = {name for name in layers if f"{name}.phi" in digests}
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
            wrong = self._different_tensors(pool)
            others = [name for name in layers if name not in read]
            prints = dict(
                zip(others, pool.map(lambda n: layers[n].fingerprint, others), strict=True)
            )
        for name, stored in self.stored.items():
            if name in read and stored.fingerprint is not None:
                layers[name].trust(stored.fingerprint)
            elif stored.fingerprint not in (None, prints.get(name)):
                wrong.append(name)
        if wrong:
            raise ValueError(
                f"the files of this low-bit base are damaged or were changed: {some(wrong)} are "
                "not what was stored. Make the base again, or download it again"
            )

    def _different_tensors(self, pool: ThreadPoolExecutor) -> list[str]:
        """Names of tensors in the files whose digest differs, and of those that are not there."""
        wrong, expected = [], dict(self.quantization_config.digests)
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if name in expected]  # noqa: SIM118
                values = [expected.pop(name) for name in names]
                found = pool.map(partial(_is_stored, opened, self.files), names, values)
                wrong += [name for name, same in zip(names, found, strict=True) if not same]
        return wrong + sorted(expected)

    # Saving and training

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict | None, dict]:
        """Writes the digests of all tensors into the configuration.

        Raises:
            ValueError: adapters stand in the place of its layers.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves the adapter alone
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "adapters are attached to this low-bit base, under whose names it could not be "
                "loaded: save them with `save_pretrained` of the PEFT model, or take them off with "
                "its `unload()` first"
            )
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        config = model.config.quantization_config
        config.digests = {name: digest(tensor) for name, tensor in _in_files(model, state).items()}
        config.take_modules(
            {
                name: describe(module)
                for name, module in model.named_modules()
                if isinstance(module, DowncastLinear)
            }
        )
        return None, {}

    @property
    def is_trainable(self) -> bool:
        """With adapters: the Trainer refuses the base alone, and says to attach adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _gets_its_share() -> bool:
    """Whether FSDP sends this process its weights, which the first one of the machine reads."""
    return is_fsdp_enabled() and not is_local_dist_rank_0()


def _in_files(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` by the names and in the shapes that `save_pretrained` writes."""
    return revert_weight_conversion(model, dict(state))


def describe(layer: DowncastLinear) -> StoredWeight:
    """What the configuration says of a layer."""
    grid = layer.format.grid
    return StoredWeight(
        bits=grid.bits,
        shape=(layer.out_features, layer.in_features),
        symmetric=grid.symmetric,
        group_size=grid.group_size,
        downcast=layer.format.downcast,
        scale_dtype=layer.format.scale_dtype,
        base_dtype=DTYPE_NAMES[layer.base_dtype],
        first_range=layer.range,
        transposed=layer.transposed,
        embedding=isinstance(layer, DowncastEmbedding),
        balanced=grid.balanced,
        k_quant=grid.k_quant,
        experts=layer.experts,
        fingerprint=layer.fingerprint,
    )


def register_low_bit() -> None:
    """Registers the quantizer with transformers. Calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LowBitConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(LowBitQuantizer)
