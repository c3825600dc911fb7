"""Checkpoints that are there completely or not at all, and the search for the last such one."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_lrqat.shared.adapter_files import WITHOUT_EFFECT, read_config
from peft_lrqat.shared.staging import flush
from peft_lrqat.shared.words import some

from .part import TrainerPart


logger = logging.get_logger(__name__)
# Beside the checkpoints. It is not a checkpoint's name, so nobody looks in it; and it begins with
# an underscore, so that it is not pushed to a hub.
STAGING = "_incomplete"
SET_ASIDE = "_set_aside"  # complete checkpoints that are not part of the current run
# What the Trainer resumes from, as one process, DDP and FSDP write it; with `save_only_model` all
# three are missing.
RESUMED_FROM = ("optimizer*", "scheduler.pt", "rng_state*.pth")
# Fields of an adapter's config that say where it came from, how it is checked and what was noted,
# but not what it is.
NOT_COMPARED = {
    "auto_mapping",
    "base_made_from",
    "base_model_name_or_path",
    "inference_mode",
    "init_weights",
    "library_version",
    "peft_version",
    "revision",
    "training_record",
    "verify_base",
}


class WholeCheckpoints(TrainerPart):
    """Writes every checkpoint beside its place and renames it when it is complete.

    Resumes only from complete checkpoints, with the adapters that wrote them. The checkpoints in
    the run's directory are those of this run, so that the last one is this run's last: a new run
    among checkpoints of another run is refused, unless ``overwrite_checkpoints`` is set. A run that
    resumes from an earlier checkpoint, and a trainer that trains again, set later ones aside.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._staging: Path | None = None  # while a checkpoint is being written
        self._push_when_in_place = False
        self._trial: Any = None  # of a hyperparameter search
        self._trained_in: set[Path] = set()  # directories in which this trainer has begun a run
        self._resumed: Path | None = None  # the checkpoint that this run continues
        self._begun = False  # whether this run has come to its first step
        super().__init__(*args, **kwargs)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Trains; True resumes from the last complete checkpoint, an incomplete one is refused."""
        self._trial = trial
        run_dir = Path(self._get_output_dir(trial)).resolve()
        if self.args.should_save:
            tidy_up(run_dir)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"there is no whole checkpoint in {self.args.output_dir} to resume from"
                )
        elif resume_from_checkpoint and (reason := why_incomplete(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} cannot be resumed from: {reason}; "
                "`resume_from_checkpoint=True` takes the last checkpoint that is whole"
            )
        if resume_from_checkpoint and not has_optimizer(resume_from_checkpoint):
            logger.warning(
                f"{resume_from_checkpoint} holds no state of the optimizer (`save_only_model`): "
                "its moments and the schedule restart from scratch, so the resumed run will differ "
                "from one that was not interrupted"
            )
        self._resumed = Path(resume_from_checkpoint).resolve() if resume_from_checkpoint else None
        continued = self._resumed is not None and self._resumed.parent == run_dir
        if not (continued or self.args.overwrite_checkpoints or run_dir in self._trained_in):
            check_no_checkpoints(run_dir)
        self.accelerator.wait_for_everyone()  # before the main process changes the directory
        self._trained_in.add(run_dir)
        return super().train(resume_from_checkpoint or None, trial, *args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        # `auto_find_batch_size` may make several attempts in one call of `train`.
        self._begun = False
        done = super()._init_training_state(*args, **kwargs)
        if self._resumed is not None and self.is_world_process_zero():
            logger.warning(
                f"resuming from step {self.state.global_step} of {self.state.max_steps} "
                f"({self._resumed})"
                + ("; this run is over, and nothing is trained" if self._is_over() else "")
            )
        return done

    def _is_over(self) -> bool:
        return self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # The Trainer looks at the number of steps only after a step.
        if self._is_over():
            self.control.should_training_stop = True
            return None
        if not self._begun:  # everything has been loaded by now
            self._begun = True
            self._clear_directory()
        return super()._run_epoch(*args, **kwargs)

    def _clear_directory(self) -> None:
        """Leaves no checkpoints but those that this run continues."""
        run_dir = Path(self._get_output_dir(self._trial)).resolve()
        continued = self._resumed is not None and self._resumed.parent == run_dir
        step = self.state.global_step if continued else -1
        others = [path for number, path in _checkpoints(run_dir) if number > step]
        if others and self.args.should_save:
            if self.args.overwrite_checkpoints:
                _delete(others)
            else:
                set_aside(others)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        check_same_adapters(
            resume_from_checkpoint, self.accelerator.unwrap_model(self.model).peft_config
        )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:  # the Trainer would load the adapter `default` into the active one, and no other
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / STAGING
        if self.args.should_save:
            tidy_up(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging, self._push_when_in_place = staging, False
        try:
            super()._save_checkpoint(model, trial)
            self._staging = None
            self._name_best_checkpoint(run_dir)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                move_into_place(staging / name, run_dir / name)
        except Exception as error:
            if self.args.should_save:
                tidy_up(run_dir)
            last = last_complete_checkpoint(run_dir)
            way_out = f"Resume from {last}" if last else "There is no checkpoint before it: restart"
            raise RuntimeError(
                f"{name} could not be written to {run_dir} ({type(error).__name__}: {error}); "
                f"no part of it is left. {way_out} once the cause is fixed (is the disk full?)"
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self._push_when_in_place:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            delete_older(
                run_dir / name, self.args.save_total_limit, self.state.best_model_checkpoint
            )

    def _name_best_checkpoint(self, run_dir: Path) -> None:
        # The Trainer looked for it in the place where this checkpoint was being written.
        step = self.state.best_global_step
        if step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if step == self.state.global_step or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        # A checkpoint is moved as a whole later; a process that may not save writes nothing.
        if self._staging is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with written_whole(str(output_dir)) as directory:
            card = Path(str(output_dir)) / "README.md"
            if card.exists():  # PEFT and the card of LR-QAT keep what others wrote there
                shutil.copy(card, directory)
            super()._save(str(directory), state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # An upload runs in the background, and its files must not be moved away.
        if self._staging is not None:
            self._push_when_in_place = True
            return
        super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            delete_older(Path(best), 1, best)  # before the Trainer does it in place
        return super()._finalize_training(trial, *args, **kwargs)


def why_incomplete(checkpoint: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint directory of the Trainer; None if every file is whole.

    The Trainer writes `trainer_state.json` last; a file that a crash or a full disk has cut off is
    found by its own format.
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
    """Whether more than the model was saved; DeepSpeed keeps everything in one directory."""
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
    """The newest checkpoint in ``output_dir`` whose files are all whole.

    Warns about newer ones that are not.
    """
    for _, path in sorted(_checkpoints(output_dir), reverse=True):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning(f"{path} is skipped: {reason}")
    return None


def delete_older(checkpoint: Path, limit: int | None, best: str | None) -> None:
    """Keeps ``limit`` checkpoints: ``checkpoint``, the ``best`` one, and the last written others.

    ``checkpoint`` was just written. Works like transformers' `rotate_checkpoints`, but renames each
    checkpoint before deleting it, so that half of one is never there.
    """
    if not limit or limit < 0:
        return
    kept = {checkpoint, *([Path(best)] if best else [])}
    found = [
        (path.stat().st_mtime_ns, step, path) for step, path in _checkpoints(checkpoint.parent)
    ]
    others = sorted(entry for entry in found if entry[-1] not in kept)
    _delete([path for _, _, path in others[: max(0, len(others) - max(0, limit - len(kept)))]])


def _delete(checkpoints: Iterable[Path]) -> None:
    """Deletes checkpoints; each is renamed before, so that half of one is never there."""
    for path in checkpoints:
        logger.info(f"Deleting checkpoint [{path}]")
        staging = path.with_name(STAGING)
        try:
            staging.mkdir(exist_ok=True)
            path.rename(staging / f"{path.name}.deleted")
        except OSError as error:
            logger.warning(f"{path} could not be deleted: {error}")
        shutil.rmtree(staging, ignore_errors=True)


def set_aside(checkpoints: Sequence[Path]) -> None:
    """Moves complete checkpoints of one directory into a numbered folder, and says so."""
    parent = checkpoints[0].with_name(SET_ASIDE)
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    folder = parent / str(max(taken, default=0) + 1)
    folder.mkdir(parents=True)
    for path in checkpoints:
        path.rename(folder / path.name)
    logger.warning(
        f"{some(path.name for path in checkpoints)} of an earlier run are now in {folder}: they "
        "are not part of this run. Delete them when you do not need them"
    )


def check_no_checkpoints(run_dir: str | os.PathLike[str]) -> None:
    """ValueError if ``run_dir`` holds checkpoints, which a new run there would mix with its own."""
    if found := sorted(_checkpoints(run_dir)):
        raise ValueError(
            f"a new run needs an `output_dir` without checkpoints, but {run_dir} holds "
            f"`{found[-1][1].name}` of an earlier run. Continue that run with "
            "`resume_from_checkpoint`, delete its checkpoints with `overwrite_checkpoints=True`, "
            "or give another `output_dir`"
        )


def _checkpoints(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Step and path of every directory with the name of a checkpoint."""
    return [
        (int(match[1]), path)
        for path in (Path(run_dir).iterdir() if Path(run_dir).is_dir() else ())
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    ]


@contextmanager
def written_whole(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh directory to write into; on leaving, its files replace their namesakes.

    Each file of ``directory`` changes at once, by a rename, and only when all have been written; an
    exception while writing changes nothing. An adapter's config is replaced last; if its settings
    change, the old one is removed first: settings never stand beside another adapter's weights.
    """
    directory = Path(directory)
    tidy_up(directory)
    staging = directory / STAGING
    staging.mkdir(parents=True)
    try:
        yield staging
        files = sorted(flush(staging), key=lambda path: path.name == CONFIG_NAME)
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
    """Renames the directory ``staged`` to ``target``.

    An existing ``target`` is set aside before, and deleted after.
    """
    flush(staged)
    aside = staged.with_name(f"{target.name}.replaced")
    if target.exists():
        target.rename(aside)
    staged.rename(target)
    shutil.rmtree(staged.parent, ignore_errors=True)


def tidy_up(run_dir: str | os.PathLike[str]) -> None:
    """Removes what a killed run left half-written; puts back a checkpoint that it set aside."""
    staging = Path(run_dir) / STAGING
    for aside in staging.glob("*.replaced"):
        target = Path(run_dir) / aside.name.removesuffix(".replaced")
        if not target.exists():
            aside.rename(target)
    shutil.rmtree(staging, ignore_errors=True)


def check_same_adapters(
    checkpoint: str | os.PathLike[str], configs: Mapping[str, PeftConfig]
) -> None:
    """ValueError if an adapter in ``checkpoint`` has other settings than the one in ``configs``."""
    if not any(Path(checkpoint).rglob(CONFIG_NAME)):  # shards of FSDP
        return
    for adapter, config in configs.items():
        # The layout is PEFT's.
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
                f"{checkpoint} holds the adapter `{adapter}` with another config: "
                f"{'; '.join(differences)}. Resume with the config that it was trained with, or "
                "start a new run in another `output_dir`"
            )


def _same_settings(first: Path, second: Path) -> bool:
    """Whether the two configs go with the same weights, by the digest of their settings."""
    try:
        one, two = map(read_config, (first, second))
    except ValueError:  # something else lies there
        return False
    return all(
        one.get(name) == two.get(name) for name in {*one, *two} if name not in WITHOUT_EFFECT
    )


def _comparable(config: PeftConfig) -> dict[str, Any]:
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPARED}
    return {
        name: sorted(v) if isinstance(v, set | list | tuple) else v for name, v in fields.items()
    }
