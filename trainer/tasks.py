"""Tasks with right and wrong answers, such as ARC and PIQA, through EleutherAI's `lm-eval`."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft_lrqat.shared.words import some


# lm-eval's own way to say that there is none.
NO_ERROR = "N/A"
Scores = dict[str, dict[str, Any]]


class Tasks:
    """Tasks of lm-eval by name; they and their data are looked for before a model is loaded.

    Args:
        names: tasks, groups or tags of lm-eval, such as ``arc_easy``.
        task_path: a directory with task files (YAML) of your own, which win over lm-eval's.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: there is no such directory or task, or the data of a task cannot be had.
    """

    def __init__(self, names: Sequence[str], task_path: str | None = None) -> None:
        if find_spec("lm_eval") is None:
            raise ImportError(
                'tasks need the package lm-eval; run `pip install "peft-lrqat[tasks]"`'
            )
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if not names:
            raise ValueError("name one task at least, such as arc_easy")
        if task_path is not None and not Path(task_path).is_dir():
            raise ValueError(f"the task files are looked for in {task_path}, which is no directory")
        self.names = list(names)
        # lm-eval's own tasks are some thousand files, which take seconds to list.
        known = TaskManager(include_path=task_path, include_defaults=False) if task_path else None
        if known is None or not set(names) <= set(known.all_tasks):
            known = TaskManager(include_path=task_path)
        self._known: Any = known
        for name in names:
            if name not in known.all_tasks:
                close = difflib.get_close_matches(name, known.all_tasks, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise ValueError(
                    f"there is no task {name!r}, neither in lm-eval nor in --task_path{hint}"
                )
        try:
            known.load(self.names)
        except OSError as error:
            raise ValueError(
                f"the data of {some(self.names)} cannot be had ({error}). lm-eval reads them from "
                "the Hub; without a network, describe local files in a task file: see `lrqat eval` "
                "in the documentation"
            ) from error

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        apply_chat_template: bool = False,
        batch_size: int = 8,
    ) -> Scores:
        """What a model scores, by task and metric.

        Args:
            model: a causal language model, also one with adapters.
            num_fewshot: examples before each question; None: what the task says.
            limit: the first questions of each task; None: all.
            apply_chat_template: whether questions are asked as in a chat.

        Returns:
            By task, or group: ``metrics``, the name of each with its ``value`` and its
            ``standard_error`` (None where lm-eval has none), and ``questions``, their number.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        was_training = model.training
        model.eval()
        try:
            found: Any = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=self.names,
                task_manager=self._known,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=apply_chat_template,
                log_samples=False,
            )
        finally:
            model.train(was_training)
        counts = found["n-samples"]
        scores: Scores = {}
        for name, row in {**found["results"], **(found.get("groups") or {})}.items():
            if metrics := _metrics(row):
                number = counts.get(name, {}).get("effective")
                scores[name] = {"metrics": metrics, "questions": number}
        return scores


def _metrics(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """A row of lm-eval's results: `acc,none` and `acc_stderr,none` belong together."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in row.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = row.get(f"{metric}_stderr,{how}", NO_ERROR)
        known = isinstance(error, float) and math.isfinite(error)
        name = metric if how == "none" else f"{metric} ({how})"
        found[name] = {"value": float(value), "standard_error": error if known else None}
    return found
