"""A low-bit base written from a checkpoint a tensor at a time, so that memory holds one of them.

The files to be written are planned before the first tensor is read, and each is recorded when it
is on the disk. A run that was interrupted goes on after the last one.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .._version import __version__
from ..calibration.calibrate import RoundedBlock
from ..calibration.replay import find_blocks
from ..formats.shards import ShardWriter
from ..shared.model_files import sign_settings
from ..shared.staging import check_target, flush, locked, whole_directory
from .calibrated import (
    CalibratedStart,
    FinishedBlocks,
    as_layer,
    calibrate_low_bit,
    check_finite,
    in_blocks,
)
from .card import write_card
from .config import LowBitConfig, StoredWeight
from .downcast import DowncastLinear
from .embedding import Plain, find_ends, width_of
from .quantizer import check_tied_copy, describe, digest, downcast, find_targets
from .takeover import PLACE, Takeover, load_low_bit, low_bit_settings


logger = logging.get_logger(__name__)
PLAN, RECORDS, BASE, BLOCKS = "plan.json", "records", "base", "blocks"
# Room for the entry of a tensor in the header of its file, beside the name.
ENTRY_BYTES = 160


def prepare_low_bit(
    name: str,
    output: str | os.PathLike[str],
    settings: LowBitConfig | None = None,
    *,
    start: CalibratedStart | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 * 10**9,
    auto_class: Any = AutoModelForCausalLM,
    progress: bool = True,
    **place: Any,
) -> LowBitConfig:
    """Writes the low-bit base of a checkpoint into the directory ``output``.

    ``output`` appears when it is whole. Until then the files lie beside it, in a directory whose
    name ends in ``.partial``, and the same call goes on after the last finished file. Memory
    holds one tensor and what is made of it; a checkpoint whose tensors transformers renames or
    merges is loaded as a low-bit base and saved instead, which takes as much as the base.
    A calibrated base takes one block's weights and training state more, and the hidden states of
    the data; an interrupted run goes on after the last finished block.

    Args:
        name: a directory or a name on the Hub; plain, or quantised as `load_low_bit` takes it.
        output: a new directory.
        settings: how to make a base of a plain checkpoint.
        start: calibrates the base with data; None: every weight is rounded to nearest.
        dtype: of what stays plain; None: as the checkpoint's configuration says.
        max_shard_bytes: of tensors in a file.
        auto_class: what loads the model.
        progress: whether to show a bar.
        place: where the checkpoint is, as for ``from_pretrained``: revision, token and so on.

    Raises:
        ValueError: as `load_low_bit`, and for a ``.partial`` directory of another run.
        FileExistsError: if ``output`` holds something.
        OSError: for a checkpoint without safetensors files, and for a full disk.
    """
    if unknown := set(place) - set(PLACE):
        raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")
    name = os.fspath(name)
    target = Path(output).resolve()
    check_target(target)
    config = AutoConfig.from_pretrained(name, **place)
    made_by = copy.deepcopy(low_bit_settings(config, name, settings))
    if made_by is None:
        raise ValueError(f"{name} is a low-bit base already; load it with `from_pretrained`")
    if start is not None and made_by.takes_over:
        raise ValueError(
            f"the integers of {name} are kept as they are, so calibration data changes nothing; "
            "leave it out, or start from the model before its quantisation"
        )
    if start is not None:
        start.settle(made_by)
    job = _Job(name, config, made_by, dtype, auto_class, place, start)
    if job.reason is None:
        with _readable_errors(target):
            return job.stream(target, max_shard_bytes, progress)
    logger.warning(
        f"{name} cannot be read a tensor at a time: {job.reason}. It is loaded as a low-bit base "
        "and saved, which takes as much memory as the base."
    )
    kwargs = {} if dtype is None else {"dtype": dtype}
    with whole_directory(target) as directory:
        if start is None:
            model = load_low_bit(name, settings, auto_class=auto_class, **kwargs, **place)
        else:
            plain = auto_class.from_pretrained(name, **kwargs, **place)
            model = calibrate_low_bit(plain, made_by, start)
        model.save_pretrained(directory, max_shard_size=max_shard_bytes)
        _write_rest(directory, name, model.config.quantization_config, place)
    return model.config.quantization_config


class _readable_errors:  # noqa: N801, a context manager
    """Tells what to do about a full disk."""

    def __init__(self, target: Path) -> None:
        self.partial = _partial(target)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{error.strerror} while writing {self.partial}; make room and run the same again, "
                "which goes on after the last finished file, or delete that directory",
            ) from error


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


@dataclass
class _Job:
    """One checkpoint, the names of its tensors in the model, and how each becomes low-bit."""

    name: str
    config: PretrainedConfig
    made_by: LowBitConfig
    dtype: torch.dtype | None
    auto_class: Any
    place: dict[str, Any]
    start: CalibratedStart | None = None
    calibrated: FinishedBlocks | None = field(init=False, default=None)
    reason: str | None = field(init=False)  # why it cannot be streamed

    def __post_init__(self) -> None:
        hub = {
            k: v for k, v in self.place.items() if k not in ("trust_remote_code", "code_revision")
        }
        self.files = _checkpoint_files(self.name, hub)
        self.model = self._skeleton()
        self.takeover = (
            Takeover(self.model, self.made_by.source, self.files)
            if self.made_by.takes_over and self.made_by.source is not None
            else None
        )
        self.tensors = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in self._tied
        }
        # By name in the model: the file and the key of each part; a plain tensor has one part, "".
        self.parts: dict[str, dict[str, tuple[str, str]]] = {}
        unknown = self._find_parts()
        self.targets = self._find_targets()
        self.reason = self._why_not(unknown)

    def _skeleton(self, place: Any = None) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        for part in (config, config.get_text_config(decoder=True)):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        dtype = self.dtype or config.dtype or _first_dtype(self.files)
        code = {k: v for k, v in self.place.items() if k == "trust_remote_code"}
        with torch.device("meta") if place is None else place:
            return self.auto_class.from_config(config, dtype=dtype, **code)

    @property
    def _tied(self) -> dict[str, str]:
        return getattr(self.model, "all_tied_weights_keys", None) or {}

    def _find_parts(self) -> list[str]:
        """Fills ``parts``; returns the keys that have no place in the model."""
        unknown = []
        kinds = self.takeover.layout.parts if self.takeover else ()
        ignored = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118, it is not a dict
                    module, _, kind = key.rpartition(".")
                    part = kind if kind in kinds else ""
                    name = self._name_of(f"{module}.weight" if part else key)
                    if name is not None:
                        self.parts.setdefault(name, {})[part] = (file, key)
                    elif not self._is_superfluous(key, ignored):
                        unknown.append(key)
        return unknown

    def _is_superfluous(self, key: str, ignored: Iterable[str]) -> bool:
        """Whether the model has no use for a tensor: a tied copy, or one that it computes."""
        module, _, kind = key.rpartition(".")
        # A bias of zeros: `Takeover` has looked at its values.
        zeros = self.takeover is not None and kind == "bias" and module in self.takeover.found
        return zeros or key in self._tied or any(re.search(pattern, key) for pattern in ignored)

    def _name_of(self, key: str) -> str | None:
        prefix = f"{self.model.base_model_prefix}."
        candidates = (key, prefix + key, key.removeprefix(prefix))
        return next((name for name in candidates if name in self.tensors), None)

    def _find_targets(self) -> set[str]:
        """Names of the modules that become low-bit."""
        if self.takeover is not None:
            return {
                name.rpartition(".")[0] for name, parts in self.parts.items() if "" not in parts
            }
        targets = find_targets(self.model, self.made_by)
        for name, module in targets.items():
            self.made_by.weight_format(name, width_of(module))
        if self.made_by.embedding_bits is not None:
            check_tied_copy(self.files, find_ends(self.model))
        return set(targets)

    def _why_not(self, unknown: list[str]) -> str | None:
        missing = self.tensors.keys() - self.parts.keys()
        if unknown or missing:
            name = sorted(unknown or missing)[0]
            return f"`{name}` has another name in its files than in {type(self.model).__name__}"
        if getattr(self.model, "_keep_in_fp32_modules", None):
            return "it keeps some modules in float32"
        if getattr(self.config, "auto_map", None):
            return "it comes with code of its own"
        if self.targets & self.tensors.keys():
            return "it keeps the weights of its experts in one tensor"
        for name, parts in self.parts.items():
            for part, (file, key) in parts.items():
                with safe_open(file, framework="pt") as opened:
                    shape = tuple(opened.get_slice(key).get_shape())
                if not part and shape != tuple(self.tensors[name].shape):
                    return f"`{name}` has another shape in its files"
        return None

    # Writing

    def stream(self, target: Path, max_shard_bytes: int, progress: bool) -> LowBitConfig:
        """Writes everything, going on where an earlier run stopped."""
        shards = self._plan(max_shard_bytes)
        partial = _partial(target)
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            _start(partial, self._identity(shards))
            try:
                if self.start is not None:
                    self._calibrate(partial, self.start)
                config = self._write(partial, shards, progress)
            except ValueError:
                shutil.rmtree(partial)  # of the checkpoint or the data: going on would not help
                raise
            check_target(target)
            (partial / BASE).rename(target)
            shutil.rmtree(partial)
        return config

    def _calibrate(self, partial: Path, start: CalibratedStart) -> None:
        """Rounds the blocks one after another, each loaded when it is needed."""
        model = self._skeleton(init_empty_weights(include_buffers=False)).eval()
        formats = {
            name: self.made_by.weight_format(name, width_of(cast(Plain, module)))
            for name, module in model.named_modules()
            if name in self.targets
        }
        formats = in_blocks(model, formats)
        prefixes = tuple(f"{b.name}." for s in find_blocks(model, list(formats)) for b in s)
        device = start.place

        def fill(names: Iterable[str]) -> None:
            for name in names:
                ((file, key),) = self.parts[name].values()
                tensor = _read(file, key)
                if tensor.is_floating_point():
                    tensor = tensor.to(self.tensors[name].dtype)
                set_module_tensor_to_device(model, name, device, value=tensor)

        def of_block(block: str) -> list[str]:
            return [name for name in self.tensors if name.startswith(f"{block}.")]

        def load(block: str) -> None:
            fill(of_block(block))
            check_finite({n: model.get_submodule(n) for n in formats if n.startswith(f"{block}.")})

        def done(block: str, result: RoundedBlock) -> None:
            finished.save(block, result)
            for name in of_block(block):
                set_module_tensor_to_device(model, name, "meta")

        finished = FinishedBlocks(partial / BLOCKS)
        fill(name for name in self.tensors if not name.startswith(prefixes))
        model.tie_weights()
        for buffer_name, buffer in list(model.named_buffers()):
            set_module_tensor_to_device(model, buffer_name, device, value=buffer)
        start.round_blocks(model, self.made_by, formats, done, load=load, known=finished.load)
        self.calibrated = finished
        self.made_by.calibration = start.describe()

    def _write(self, partial: Path, shards: list[list[str]], progress: bool) -> LowBitConfig:
        directory, records = partial / BASE, partial / RECORDS
        for folder in (directory, records):
            folder.mkdir(exist_ok=True)
        modules: dict[str, Any] = {}
        digests: dict[str, str] = {}
        index: dict[str, str] = {}
        total = 0
        with tqdm(
            total=len(self.parts), desc="preparing", unit="tensor", disable=not progress
        ) as bar:
            for number, names in enumerate(shards, start=1):
                file = _shard_name(number, len(shards))
                record = records / f"{number}.json"
                if record.exists() and (directory / file).exists():
                    bar.update(len(names))
                else:
                    _write_json(record, self._write_shard(directory, file, names, bar))
                written = json.loads(record.read_text())
                modules |= written["modules"]
                digests |= written["digests"]
                index |= dict.fromkeys(written["keys"], file)
                total += written["bytes"]
        if len(shards) > 1:
            weights = {"metadata": {"total_size": total}, "weight_map": index}
            _write_json(directory / SAFE_WEIGHTS_INDEX_NAME, weights)
        config = self._finished(modules, digests)
        self.model.config.save_pretrained(directory)
        sign_settings(directory)
        _write_rest(directory, self.name, config, self.place)
        flush(directory)
        return config

    def _plan(self, max_shard_bytes: int) -> list[list[str]]:
        """Names in the model, by the file that is to hold them."""
        shards: list[list[str]] = [[]]
        size = 0
        for name in self.tensors:
            bytes_ = self._low_bit_bytes(name)
            if shards[-1] and size + bytes_ > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += bytes_
        return shards

    def _low_bit_bytes(self, name: str) -> int:
        """Bytes of what is written for a tensor; about those, where the layout is another's."""
        tensor = self.tensors[name]
        module = name.rpartition(".")[0]
        if not self._is_target(name):
            return tensor.numel() * tensor.element_size()
        if self.takeover is not None:
            return self._stored_bytes(name)
        conv1d = isinstance(self.model.get_submodule(module), Conv1D)
        rows, columns = reversed(tensor.shape) if conv1d else tensor.shape
        format = self.made_by.weight_format(module, columns)
        groups = format.grid.num_groups(columns)
        scales = groups * (4 if format.grid.symmetric else 5)
        return rows * (format.row_elements * format.storage_dtype.itemsize + scales)

    def _stored_bytes(self, name: str) -> int:
        total = 0
        for file, key in self.parts[name].values():
            with safe_open(file, framework="pt") as opened:
                shape = opened.get_slice(key).get_shape()
            total += 4 * int(torch.tensor(shape).prod())
        return total

    def _is_target(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        return kind == "weight" and module in self.targets

    def _identity(self, shards: list[list[str]]) -> dict[str, Any]:
        """What must be the same for a run to go on with the files of another."""
        settings = asdict(self.made_by)
        files = [(Path(f).name, os.path.getsize(f), _header_digest(f)) for f in self.files]
        return {
            "peft_lrqat": __version__,
            "name": self.name,
            "settings": settings,
            "dtype": str(self.model.dtype),
            "files": files,
            "shards": shards,
            "calibration": None if self.start is None else self.start.describe(),
        }

    def _write_shard(
        self, directory: Path, file: str, names: list[str], bar: tqdm
    ) -> dict[str, Any]:
        """Writes one file; returns what to record about it."""
        working = directory.parent / "writing"
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        modules: dict[str, Any] = {}
        digests: dict[str, str] = {}
        keys: list[str] = []
        header = sum(3 * (ENTRY_BYTES + len(name)) for name in names) + ENTRY_BYTES
        with ShardWriter(working, 2**62, header) as writer:
            for name in names:
                for key, tensor, layer in self._made(name):
                    writer.write(key, tensor)
                    keys.append(key)
                    digests[key] = digest(tensor)
                    if layer is not None:
                        modules[name.rpartition(".")[0]] = describe(layer).to_dict()
                bar.update()
        (working / SAFE_WEIGHTS_NAME).replace(directory / file)
        return {"modules": modules, "digests": digests, "keys": keys, "bytes": writer.total}

    def _made(self, name: str) -> Iterator[tuple[str, Tensor, DowncastLinear | None]]:
        """What is written for one tensor of the model: keys, tensors, and the layer they make."""
        if not self._is_target(name):
            ((file, key),) = self.parts[name].values()
            tensor = _read(file, key)
            dtype = self.tensors[name].dtype
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor, None
            return
        module = name.rpartition(".")[0]
        layer = self._layer(module, name)
        for part in ("phi", "scale0", "zero_point"):
            tensor = getattr(layer, part)
            if tensor is not None:
                yield f"{module}.{part}", tensor, layer

    @torch.no_grad()
    def _layer(self, module: str, name: str) -> DowncastLinear:
        if self.takeover is not None:
            tensors = {part: _read(*place) for part, place in self.parts[name].items()}
            layer = self.takeover.take(self.model, module, tensors)
            if layer is None:
                self.takeover.finish(self.made_by)  # raises
        else:
            ((file, key),) = self.parts[name].values()
            linear = cast(Plain, self.model.get_submodule(module))
            stored = None if self.calibrated is None else self.calibrated.weight(module)
            if stored is not None and self.start is not None:
                format = self.made_by.weight_format(module, width_of(linear))
                return as_layer(cast("nn.Linear", linear), stored, format, self.start.name)
            weight = _read(file, key).to(self.tensors[name].dtype)
            layer = downcast(linear, module, weight, self.made_by)
            linear.weight = nn.Parameter(self.tensors[name], requires_grad=False)
        if layer is None:
            raise ValueError(
                f"the weights of `{module}` have NaN or infinite entries; repair the base model "
                "first"
            )
        return layer

    def _finished(self, modules: dict[str, Any], digests: dict[str, str]) -> LowBitConfig:
        config = self.made_by
        if self.takeover is not None:
            stored = {n: StoredWeight.from_dict(n, fields) for n, fields in modules.items()}
            self.takeover.formats = {n: weight.format for n, weight in stored.items()}
            self.takeover.finish(config)
        order = [n for n, _ in self.model.named_modules() if n in modules]
        config.take_modules({name: StoredWeight.from_dict(name, modules[name]) for name in order})
        config.digests, config.made_from = digests, self.name
        self.model.config.quantization_config = config
        self.model.config.dtype = self.model.dtype
        self.model.config.architectures = [type(self.model).__name__]
        return config


def _start(partial: Path, identity: dict[str, Any]) -> None:
    """Makes the directory of a run, or checks that it is that of the same run."""
    plan = partial / PLAN
    if plan.exists():
        if json.loads(plan.read_text()) == json.loads(json.dumps(identity)):
            return
        raise ValueError(
            f"{partial} holds the beginning of another run, with other settings or another "
            "checkpoint; delete it, or give another output directory"
        )
    if any(path.name != _temporary(plan).name for path in partial.iterdir()):
        raise ValueError(
            f"{partial} exists, but this command did not make it; rename it, or give another "
            "output directory"
        )
    _write_json(plan, identity)


def _write_rest(directory: Path, name: str, config: LowBitConfig, place: dict[str, Any]) -> None:
    """Generation config, tokenizer with chat templates, and card."""
    try:
        GenerationConfig.from_pretrained(name, **_without_code(place)).save_pretrained(directory)
    except OSError:
        logger.info(f"{name} has no generation config")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **place)
        if len(tokenizer) < 2:  # transformers makes some up where there are no files
            raise ValueError("its files hold no words")
        tokenizer.save_pretrained(directory)
    except (OSError, ValueError) as error:
        logger.warning(f"{name} has no tokenizer that can be loaded, so none is written: {error}")
    write_card(directory, config)


def _without_code(place: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in place.items() if k not in ("trust_remote_code", "code_revision")}


def _checkpoint_files(name: str, place: dict[str, Any]) -> list[str]:
    quiet = {"_raise_exceptions_for_missing_entries": False, **place}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    if index is not None:
        return list(get_checkpoint_shard_files(name, index, **place)[0])
    file = cached_file(name, SAFE_WEIGHTS_NAME, **quiet)
    if file is None:
        raise OSError(
            f"{name} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}; a low-bit base "
            "is made from safetensors files only"
        )
    return [file]


def _first_dtype(files: list[str]) -> torch.dtype:
    """The dtype of the first floating-point tensor."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118, it is not a dict
                tensor = opened.get_slice(key)[:0] if opened.get_slice(key).get_shape() else None
                if tensor is not None and tensor.is_floating_point():
                    return tensor.dtype
    return torch.get_default_dtype()


def _read(file: str, key: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def _header_digest(file: str) -> str:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return hashlib.blake2b(opened.read(length), digest_size=16).hexdigest()


def _shard_name(number: int, count: int) -> str:
    return SAFE_WEIGHTS_NAME if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = _temporary(path)
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")
