"""Checkpoints that are there as a whole or not at all, and which of those that lie in a directory can be used."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)
# Beside the checkpoints. No checkpoint's name, so nobody looks in it; with an underscore, so that it is not pushed to a hub.
STAGING = "_incomplete"
# What the Trainer goes on from, in the spellings of one process, of DDP and of FSDP; with `save_only_model` all three are missing.
RESUMED_FROM = ("optimizer*", "scheduler.pt", "rng_state*.pth")
# Of an adapter's config: where it came from, how it is checked and what was noted down, not what it is.
NOT_COMPARED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_weights",
    "peft_version",
    "revision",
    "training_record",
    "verify_base",
}


def why_incomplete(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint directory of the Trainer; None where every file in it is whole.

    The Trainer writes `trainer_state.json` last; a file cut off by a crash or a full disk is found by its own format.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such directory"
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    # Adapters, or what FSDP and DeepSpeed write instead.
    adapters = sorted(checkpoint.rglob("adapter_model.*"))
    sharded = any(any(checkpoint.rglob(pattern)) for pattern in ("*.distcp", "global_step*"))
    if not adapters and not sharded:
        return f"it has no {SAFETENSORS_WEIGHTS_NAME}"
    for path in adapters:
        if not path.with_name(CONFIG_NAME).is_file():
            return f"it has no {path.with_name(CONFIG_NAME).relative_to(checkpoint)}"
    missing = [pattern for pattern in RESUMED_FROM if not any(checkpoint.glob(pattern))]
    if not sharded and 0 < len(missing) < len(RESUMED_FROM):
        return f"it has no {missing[0]}"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if reason := _why_cut_off(path):
            return f"{path.relative_to(checkpoint)} is not whole ({reason})"
    return None


def has_optimizer(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether more than the model was saved; DeepSpeed keeps both in one directory."""
    return any(any(Path(checkpoint).glob(pattern)) for pattern in ("optimizer*", "global_step*"))


def _why_cut_off(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            # torch.save writes zip archives, whose directory comes last.
            return "the end of the archive is missing"
    except (OSError, ValueError, SafetensorError) as error:
        return str(error)
    return None


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in ``output_dir`` whose files are all whole; newer ones that are not are named in a warning."""
    for _, path in sorted(_checkpoints(output_dir), reverse=True):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning(f"{path} is passed over: {reason}")
    return None


def delete_older(checkpoint: Path, limit: int | None, best: str | None) -> None:
    """Keeps ``limit`` checkpoints beside each other: ``checkpoint``, just written, the ``best`` one, and the last written others.

    As transformers' `rotate_checkpoints`, but each is renamed away before it is deleted, so that none is ever there by half.
    """
    if not limit or limit < 0:
        return
    kept = {checkpoint, *([Path(best)] if best else [])}
    found = [
        (path.stat().st_mtime_ns, step, path) for step, path in _checkpoints(checkpoint.parent)
    ]
    others = sorted(entry for entry in found if entry[-1] not in kept)
    staging = checkpoint.parent / STAGING
    for _, _, path in others[: max(0, len(others) - max(0, limit - len(kept)))]:
        logger.info(f"Deleting older checkpoint [{path}] due to args.save_total_limit")
        try:
            staging.mkdir(exist_ok=True)
            path.rename(staging / f"{path.name}.deleted")
        except OSError as error:
            logger.warning(f"{path} could not be deleted: {error}")
    shutil.rmtree(staging, ignore_errors=True)


def _checkpoints(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Step and path of every directory that is named as a checkpoint."""
    return [
        (int(match[1]), path)
        for path in (Path(run_dir).iterdir() if Path(run_dir).is_dir() else ())
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]


@contextmanager
def written_whole(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh directory to write into; on leaving, its files take the places of those of the same names in ``directory``.

    Each file changes at once, by a rename, and only when all have been written; an exception while writing changes nothing.
    An adapter's config goes last, and away first where its settings change: they never stand beside another one's weights.
    """
    directory = Path(directory)
    tidy_up(directory)
    staging = directory / STAGING
    staging.mkdir(parents=True)
    try:
        yield staging
        files = sorted(_flushed(staging), key=lambda path: path.name == CONFIG_NAME)
        targets = {path: directory / path.relative_to(staging) for path in files}
        for path, target in targets.items():
            if path.name == CONFIG_NAME and target.exists() and not _same_settings(path, target):
                target.unlink()
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_into_place(staged: Path, target: Path) -> None:
    """Renames the directory ``staged`` to ``target``. One of that name is set aside before and deleted after."""
    _flushed(staged)
    aside = staged.with_name(f"{target.name}.replaced")
    if target.exists():
        target.rename(aside)
    staged.rename(target)
    shutil.rmtree(staged.parent, ignore_errors=True)


def tidy_up(run_dir: str | os.PathLike[str]) -> None:
    """Removes what a killed run left half-written, and puts back a checkpoint that it had set aside."""
    staging = Path(run_dir) / STAGING
    for aside in staging.glob("*.replaced"):
        target = Path(run_dir) / aside.name.removesuffix(".replaced")
        if not target.exists():
            aside.rename(target)
    shutil.rmtree(staging, ignore_errors=True)


def check_same_adapters(
    checkpoint: str | os.PathLike[str], configs: Mapping[str, PeftConfig]
) -> None:
    """ValueError where an adapter in ``checkpoint`` has other settings than its namesake in ``configs``, with both values."""
    if not any(Path(checkpoint).rglob(CONFIG_NAME)):  # shards of FSDP
        return
    for adapter, config in configs.items():
        # As PEFT lays them out.
        directory = Path(checkpoint) if adapter == "default" else Path(checkpoint, adapter)
        if not (directory / CONFIG_NAME).is_file():
            raise ValueError(
                f"{checkpoint} holds no adapter `{adapter}`; resume with the adapters that wrote it"
            )
        saved, mine = _comparable(PeftConfig.from_pretrained(str(directory))), _comparable(config)
        differences = [
            f"{name} is {saved.get(name)!r} there and {mine.get(name)!r} here"
            for name in sorted({*saved, *mine})
            if saved.get(name) != mine.get(name)
        ]
        if differences:
            raise ValueError(
                f"{checkpoint} holds the adapter `{adapter}` with another config: {'; '.join(differences)}. Resume with the config "
                "that it was trained with, or start a new run in another `output_dir`"
            )


def _same_settings(first: Path, second: Path) -> bool:
    try:
        one, two = (
            _comparable(PeftConfig.from_pretrained(str(path.parent))) for path in (first, second)
        )
        return one == two
    except (OSError, ValueError, TypeError, KeyError):  # whatever else lies there
        return False


def _comparable(config: PeftConfig) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPARED}
    return {
        name: sorted(v) if isinstance(v, set | list | tuple) else v for name, v in fields.items()
    }


def _flushed(directory: Path) -> list[Path]:
    """The files below ``directory``, all of them on the disk: a rename must not get there before what it names."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return files
