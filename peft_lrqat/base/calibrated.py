"""Low-bit bases whose integers are chosen with the help of calibration data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, default_data_collator
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..calibration.calibrate import Calibration, Ranges, RoundedBlock
from ..calibration.methods import METHODS, CalibrationMethod
from ..calibration.replay import Batch, Replay, find_blocks
from ..calibration.shelf import Shelf
from ..calibration.weights import StoredLinear
from ..quant import Grid, WeightFormat
from ..shared.checks import check_choice
from ..shared.frozen import frozen
from ..shared.words import some
from .config import LowBitConfig
from .downcast import DowncastLinear
from .embedding import Plain, find_ends, layer_class, let_resize, tie_head, width_of
from .experts import ExpertWeights, keep_apart, put_expert_weights, set_layer
from .quantizer import LowBitQuantizer, describe, find_targets


logger = logging.get_logger(__name__)
# `range_p` of the first ranges where weights are rounded with the help of data: there the squared
# error counts, and large weights less than in rounding to nearest.
CALIBRATED_P = 2.0


@dataclass(kw_only=True)
class CalibratedStart:
    """Says how blocks are rounded, and on which data.

    Args:
        method: "blocks", "gptq", or an object of `Reconstruction` or `GPTQ` with its settings.
        dataset: rows that the model takes, such as ``{"input_ids": [...]}``, all of one length
            unless ``data_collator`` pads them; labels are not needed.
        batch_size: rows in a batch.
        data_collator: makes a batch of rows; default: transformers' `default_data_collator`.
        activations: the grid of the inputs of the targets, if those will be rounded too.
        memory: bytes of hidden states that are kept in memory; the rest is kept in a file.
        directory: of that file; default: the system's for temporary files.
        device: where `prepare_low_bit` computes; default: a GPU if there is one. A loaded model
            stays where it is.
        progress: whether to show a bar.
    """

    method: str | CalibrationMethod = "blocks"
    dataset: Iterable[Mapping[str, Any]]
    batch_size: int = 4
    data_collator: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator
    activations: Grid | None = None
    memory: int = 8 * 10**9
    directory: str | None = None
    device: str | torch.device | None = None
    progress: bool = True
    losses: dict[str, tuple[float, float]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            check_choice("method", self.method, METHODS)
            self.method = METHODS[self.method]()
        self.batches = make_batches(self.dataset, self.batch_size, self.data_collator)

    def settle(self, config: LowBitConfig) -> None:
        """Sets what is better for calibrated bases, and was not given, in ``config``."""
        if "range_p" not in config.given_fields:
            config.range_p = CALIBRATED_P

    @property
    def name(self) -> str:
        """The name of the method."""
        return next(name for name, kind in METHODS.items() if type(self.method) is kind)

    @property
    def place(self) -> torch.device:
        """Where blocks are computed that are loaded for it."""
        return PartialState().device if self.device is None else torch.device(self.device)

    @property
    def tokens(self) -> int:
        return sum(cast("Tensor", next(iter(b.values()))).numel() for b in self.batches)

    def describe(self) -> dict[str, Any]:
        """Method, settings and data, as ``config.json`` has them."""
        digest = hashlib.blake2b(digest_size=8)
        for batch in self.batches:
            for key, value in batch.items():
                if isinstance(value, Tensor):
                    digest.update(key.encode() + value.contiguous().view(torch.uint8).numpy().data)
        method: Any = self.method
        return {
            "method": self.name,
            **asdict(method),
            "batch_size": self.batch_size,
            "tokens": self.tokens,
            "data": digest.hexdigest(),
        } | ({} if self.activations is None else {"activations": asdict(self.activations)})

    def round_blocks(
        self,
        model: nn.Module,
        config: LowBitConfig,
        formats: Mapping[str, WeightFormat],
        done: Callable[[str, RoundedBlock], None],
        *,
        load: Callable[[str], None] = lambda name: None,
        known: Callable[[str], RoundedBlock | None] = lambda name: None,
    ) -> None:
        """Rounds the blocks of ``model`` one after another.

        Args:
            model: in evaluation mode, with all weights outside its blocks.
            config: says how first ranges are found.
            formats: how each target in a block is stored, by name.
            done: takes the result of each block, once the block is no longer needed.
            load: gives a block its weights, by name.
            known: the result of a block that is finished already, by name.
        """
        device = next(p.device for p in model.parameters() if p.device.type != "meta")
        unused = () if getattr(model.config, "is_encoder_decoder", False) else ("labels",)
        batches = [
            {k: _to(v, device) for k, v in batch.items() if k not in unused}
            for batch in self.batches
        ]
        replay = Replay(model, batches, list(formats), load)
        ranges = Ranges(estimator=config.range_estimator, p=config.range_p)
        calibration = Calibration(
            replay,
            formats,
            ranges,
            cast("CalibrationMethod", self.method),
            activations=self.activations,
            shelf=Shelf(self.memory, self.directory),
            known=known,
            progress=self.progress,
        )
        with frozen(model):  # norms and biases, too
            for block, result in calibration.run():
                self.losses[block.name] = (result.before, result.after)
                done(block.name, result)


def make_batches(
    dataset: Iterable[Mapping[str, Any]],
    batch_size: int,
    collate: Callable[[list[Any]], Mapping[str, Any]],
) -> list[Batch]:
    """All rows of calibration data; ValueError if there are none, or some make no batch."""
    rows = iter(dataset)
    batches: list[Batch] = []
    while chunk := list(islice(rows, batch_size)):
        try:
            batches.append(collate(chunk))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"rows of the calibration data do not make a batch ({error}); give rows of one "
                "length, or a `data_collator` that pads them"
            ) from error
    if not batches:
        raise ValueError("the calibration data has no rows; give a data set with text in it")
    return batches


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def calibrate_low_bit(
    model: PreTrainedModel, config: LowBitConfig, start: CalibratedStart
) -> PreTrainedModel:
    """Makes a plain model a low-bit base in place, its blocks rounded with the help of data.

    ``model`` stays on its device; each block gives its memory back when it is rounded. Beside the
    model, memory holds one block's weights in float32 with the state of Adam, and the hidden states
    of the data, twice. Targets outside the blocks, such as embeddings, are rounded to nearest.

    Returns:
        The model, which ``save_pretrained`` writes as a low-bit base.

    Raises:
        ValueError: for blocks that cannot run alone, weights or data that are not finite, and group
            sizes that do not divide.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantised already; calibrate the model it was made from")
    start.settle(config)
    targets = find_targets(model, config)
    check_finite(targets)
    formats = {name: config.weight_format(name, width_of(m)) for name, m in targets.items()}
    for name, module in targets.items():
        if isinstance(module, ExpertWeights):
            put_expert_weights(model, name, module)
    inside = in_blocks(model, formats)
    quantizer = LowBitQuantizer(config)
    ends = None if config.embedding_bits is None else find_ends(model)
    training = model.training
    model.eval()

    def done(name: str, result: RoundedBlock) -> None:
        for target, stored in result.weights.items():
            plain = targets.pop(target)
            set_layer(model, target, as_layer(plain, stored, inside[target], start.name))

    start.round_blocks(model, config, inside, done)
    for name, module in targets.items():
        plain = module.fused() if isinstance(module, ExpertWeights) else module.weight.detach()
        quantizer.replace(model, name, plain)
    if ends is not None:
        let_resize(model)
        if ends.tied:
            tie_head(model, ends)
    keep_apart(model)
    model.train(training)
    config.calibration = start.describe()
    config.take_modules(
        {n: describe(m) for n, m in model.named_modules() if isinstance(m, DowncastLinear)}
    )
    model.config.quantization_config = config
    vars(model)["hf_quantizer"] = quantizer
    return model


def in_blocks(model: nn.Module, formats: Mapping[str, WeightFormat]) -> dict[str, WeightFormat]:
    """Those of the targets that are in a block; the others are rounded to nearest, and named."""
    prefixes = tuple(f"{b.name}." for stack in find_blocks(model, list(formats)) for b in stack)
    found = {name: format for name, format in formats.items() if name.startswith(prefixes)}
    if outside := [name for name in formats if name not in found]:
        logger.warning(
            f"{some(outside)} are outside the blocks of the model, and rounded to nearest"
        )
    return found


def check_finite(targets: Mapping[str, nn.Module]) -> None:
    """ValueError with the names of weights that are not finite."""
    weights = {
        name: module.values if isinstance(module, ExpertWeights) else module.weight
        for name, module in targets.items()
    }
    wrong = [
        name
        for name, weight in weights.items()
        if weight.device.type != "meta"
        and not torch.stack(torch.aminmax(cast("Tensor", weight))).isfinite().all()
    ]
    if wrong:
        raise ValueError(
            f"the weights of {some(wrong)} have NaN or infinite entries; repair the base model "
            "first"
        )


def as_layer(
    linear: Plain, stored: StoredLinear, format: WeightFormat, first_range: str
) -> DowncastLinear:
    """The layer of a stored weight, in the place of ``linear``."""
    dtype = linear.weight.dtype
    layer = layer_class(linear)(
        format.in_features,
        len(stored.phi),
        format,
        bias=getattr(linear, "bias", None),
        dtype=dtype,
        base_dtype=dtype,
        first_range=first_range,
        is_conv1d=isinstance(linear, Conv1D),
        device=stored.phi.device,
    )
    layer.stand_for(linear)
    layer.fill(stored.phi, stored.scale, stored.zero_point)
    return layer


class FinishedBlocks:
    """Results of blocks in a directory, each whole or not there, so that a run can go on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def save(self, name: str, result: RoundedBlock) -> None:
        """Writes the result of a block; one that is there already stays."""
        file = self._file(name)
        if file.exists():
            return
        tensors = {
            f"{target}.{part}": tensor.contiguous()
            for target, stored in result.weights.items()
            for part, tensor in asdict(stored).items()
            if tensor is not None
        }
        temporary = file.with_name(f"{file.name}.tmp")
        losses = json.dumps([result.before, result.after])
        save_file(tensors, temporary, metadata={"losses": losses})
        with open(temporary, "rb") as opened:
            os.fsync(opened.fileno())
        temporary.replace(file)

    def load(self, name: str) -> RoundedBlock | None:
        """The result of a block; None if it is not finished."""
        file = self._file(name)
        if not file.exists():
            return None
        with safe_open(file, framework="pt") as opened:
            before, after = json.loads(opened.metadata()["losses"])
            parts: dict[str, dict[str, Tensor]] = {}
            for key in opened.keys():  # noqa: SIM118, it is no dict
                target, _, part = key.rpartition(".")
                parts.setdefault(target, {})[part] = opened.get_tensor(key)
        weights = {
            target: StoredLinear(
                phi=found["phi"], scale=found["scale"], zero_point=found.get("zero_point")
            )
            for target, found in parts.items()
        }
        return RoundedBlock(weights=weights, before=before, after=after)

    def weight(self, target: str) -> StoredLinear | None:
        """The stored weight of one target; None if it is in no block."""
        files = {file.name.removesuffix(".safetensors"): file for file in self.directory.iterdir()}
        file = next((file for name, file in files.items() if target.startswith(f"{name}.")), None)
        if file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            parts = {
                part: opened.get_tensor(f"{target}.{part}")
                for part in ("phi", "scale", "zero_point")
                if f"{target}.{part}" in names
            }
        return StoredLinear(
            phi=parts["phi"], scale=parts["scale"], zero_point=parts.get("zero_point")
        )
