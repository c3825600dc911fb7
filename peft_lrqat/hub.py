"""Publishing adapters with their cards; what other people wrote on a published card stays."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import PeftType
from transformers.utils import logging
from yaml import YAMLError

from ._version import __version__
from .registration import OWN_TYPES, has_own_adapter
from .shared.card import BEGIN, END, drop_local_base, is_hub_id
from .shared.config import AdapterConfig


logger = logging.get_logger(__name__)

CARD = "README.md"
# Tags that a save makes from the adapter: those of an earlier push may be out of date.
MADE_TAG = re.compile(r"\d+-bit|base_model:.*")


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Uploads the adapters of ``model`` and their cards in one commit. Parameters and result as
    transformers' ``push_to_hub``.

    Nothing is created on the Hub before all files are written. ``max_shard_size`` is accepted and
    changes nothing: an adapter is one file.
    """
    _check(model, tags)

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder))
        _warn_of_local_base(
            config.base_model_name_or_path for config in model.peft_config.values()
        )  # saving fills it in
        if "default" not in model.peft_config:
            # Every adapter lies in a folder of its own, and the card above them is PEFT's alone.
            name, config = next(iter(model.peft_config.items()))
            cast(AdapterConfig, config).write_card(str(folder), subfolder=name)

    return _publish(
        write,
        _subfolders(model),
        repo_id,
        tags,
        commit_message,
        commit_description,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def push_folder_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Uploads one adapter that is saved in ``folder``, with its card, in one commit.

    The files are uploaded as they are; the parameters are those of `push_to_hub`.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, AdapterConfig):
        raise ValueError(
            f"{folder} holds an adapter of type {PeftType(config.peft_type).value}, which PEFT "
            "itself can publish"
        )
    _check_tags(tags)

    def write(target: Path) -> None:
        for path in Path(folder).iterdir():
            if path.is_file() and not (path.name == CARD and (target / CARD).exists()):
                shutil.copyfile(path, target / path.name)
        config.write_card(str(target))
        _warn_of_local_base([config.base_model_name_or_path])

    return _publish(
        write,
        [""],
        repo_id,
        tags,
        commit_message,
        commit_description,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def override_push_to_hub() -> None:
    """Makes ``PeftModel.push_to_hub`` publish adapters of this package by `push_to_hub`.

    Models with only other adapters are published as before.

    The inherited method saves the adapter with its card and then writes a card of its own over it.
    """
    inherited = PeftModel.push_to_hub
    # functools.wraps hands the mark on, so that a method that somebody put around this one is left
    # in place, too.
    if getattr(inherited, "knows_peft_lrqat", False):
        return

    @functools.wraps(inherited)
    def push(self: PeftModel, *args: Any, **kwargs: Any) -> str:
        if not has_own_adapter(self):
            return inherited(self, *args, **kwargs)
        return push_to_hub(self, *args, **kwargs)

    vars(push)["knows_peft_lrqat"] = True
    setattr(PeftModel, "push_to_hub", push)  # noqa: B010, a method is replaced


def _publish(
    write: Callable[[Path], None],
    subfolders: list[str],
    repo_id: str,
    tags: list[str] | None,
    commit_message: str | None,
    commit_description: str | None,
    *,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """One commit of what ``write`` puts into a folder that has the published cards of
    ``subfolders`` already.
    """
    api = HfApi(library_name="peft_lrqat", library_version=__version__)
    if "/" not in repo_id:
        repo_id = f"{api.whoami(token=token)['name']}/{repo_id}"
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        published = {}
        for subfolder in subfolders:
            if path := _download_card(api, repo_id, f"{subfolder}{CARD}", revision, token):
                (folder / subfolder).mkdir(exist_ok=True)
                shutil.copyfile(path, folder / subfolder / CARD)
                published[subfolder] = _load_card(path, f"{subfolder}{CARD}", repo_id)
        write(folder)
        for subfolder in subfolders:
            _restore(folder / subfolder / CARD, published.get(subfolder), tags or [])
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr") and not create_pr:
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return api.create_commit(
            repo_id,
            operations=[
                CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files
            ],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def _check(model: PeftModel, tags: list[str] | None) -> None:
    """Raises ValueError for what can be refused without the Hub."""
    if not isinstance(model, PeftModel) or not has_own_adapter(model):
        known = ", ".join(sorted(peft_type.value for peft_type in OWN_TYPES))
        adapters = model.peft_config if isinstance(model, PeftModel) else {}
        found = {name: str(config.peft_type) for name, config in adapters.items()} or type(
            model
        ).__name__
        raise ValueError(
            f"`peft_lrqat.push_to_hub` needs a PeftModel with an adapter of type {known}, but has "
            f"{found}; use "
            "`model.push_to_hub` for a model of another kind"
        )
    _check_tags(tags)
    for adapter in model.peft_config:
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        for name, value in state.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(
                    f"an adapter must be finite to be published, but `{name}` of the adapter "
                    f"`{adapter}` has NaN or infinite "
                    "entries; go back to an earlier checkpoint, or train with a lower learning rate"
                )


def _check_tags(tags: list[str] | None) -> None:
    if isinstance(tags, str):
        raise ValueError(f"`tags` must be a list of strings, but is {tags!r}; use [{tags!r}]")


def _warn_of_local_base(bases: Iterable[str | None]) -> None:
    for base in set(bases):
        if not is_hub_id(base):
            logger.warning(
                "the base model of this adapter is not a repository on the Hub "
                f"(`base_model_name_or_path` is {base!r}): whoever "
                "loads the adapter must give `PeftModel.from_pretrained` a base model with the "
                "same weights. Publish the base "
                "and train from its name there to have it loaded for them"
            )


def _subfolders(model: PeftModel) -> list[str]:
    """Where `save_pretrained` puts cards: at the top, and beside every adapter that is not the
    default one.
    """
    return ["", *(f"{name}/" for name in model.peft_config if name != "default")]


def _download_card(
    api: HfApi, repo_id: str, filename: str, revision: str | None, token: bool | str | None
) -> str | None:
    """Where the card that is published now was downloaded to; None where there is none."""
    # A branch that is not there yet will start from the main one.
    for branch in dict.fromkeys((revision, None)):
        try:
            return api.hf_hub_download(repo_id, filename, revision=branch, token=token)
        except RevisionNotFoundError:
            continue
        # Not the wider EntryNotFoundError, which also means that the Hub gave no answer: the card
        # would be lost.
        except (RepositoryNotFoundError, RemoteEntryNotFoundError):
            return None
    return None


def _load_card(path: str, filename: str, repo_id: str) -> ModelCard:
    try:
        return ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"the metadata of a card must be YAML, but those of `{filename}` in `{repo_id}` cannot "
            f"be read ({error}); repair or "
            "delete that file first"
        ) from error


def _restore(path: Path, published: ModelCard | None, tags: list[str]) -> None:
    """Adds ``tags``, and the metadata that readers entered on the published card."""
    card = ModelCard.load(path)
    drop_local_base(card.data)
    earlier = (
        []
        if published is None
        else [t for t in published.data.get("tags") or [] if not MADE_TAG.fullmatch(t)]
    )
    card.data["tags"] = sorted({*(card.data.get("tags") or []), *earlier, *tags})
    if published is not None and not card.data.get("base_model"):
        # Somebody has entered what the local directory is called on the Hub, unless our own section
        # says it: then it is the base of an earlier adapter.
        base, section = (
            published.data.get("base_model") or [],
            published.text.partition(BEGIN)[2].partition(END)[0],
        )
        if not any(name in section for name in ([base] if isinstance(base, str) else base)):
            card.data["base_model"] = base or None
    card.save(path)
