"""What won at a number of bits: `lrqat recipe --bits B`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from peft_lrqat.quant.grid import Grid


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Options of `lrqat prepare` and `lrqat train`, and what was measured with them."""

    grid: dict[str, Any]
    base: dict[str, Any] | None  # None: trained from round-to-nearest
    train: dict[str, Any] = field(default_factory=dict)
    measured: str


CALIBRATED = {"downcast": "fixed8", "method": "blocks"}
# The first that divides the widths of a model is taken.
GROUP_SIZES = (64, 32, 16, -1)
TWO = Recipe(
    grid={"symmetric": False, "group_size": GROUP_SIZES},
    # A second pass over the calibration text is worse here than more text.
    base={**CALIBRATED, "epochs": 1},
    train={"per_device_train_batch_size": 1, "learning_rate": 2.5e-3},
    measured="SmolLM2-135M, groups of 64, calibrated and trained on 123k tokens: perplexity 57.6 "
    "calibrated, 28.7 trained in steps of one example (73.1 and 30.7 if calibrated on 33k "
    "of them in three passes); unquantised 20.5, or 13.7 with LoRA trained on the same text",
)
THREE = Recipe(
    grid={"symmetric": True, "group_size": -1},
    base=CALIBRATED,
    measured="SmolLM2-135M, one scale per row, 123k tokens: perplexity 34.6 calibrated on 33k of "
    "them in three passes, 21.6 trained; unquantised 20.5, or 14.4 with LoRA trained on the same "
    "text",
)
MORE = Recipe(
    grid={"symmetric": True, "group_size": -1},
    base=None,
    measured="the demo's model, 4 bits, one scale per row: perplexity 11.25 and 11.22 (two seeds) "
    "trained from round-to-nearest, 11.25 unquantised; SmolLM2-135M was not trained so",
)


def recipe_for(bits: int, shapes: Iterable[tuple[int, int]] = ()) -> Recipe:
    """The recipe of a number of bits, with a group size that divides the widths of a model.

    Args:
        shapes: (out, in) of the layers; empty: those of large models, which 64 divides.

    Raises:
        ValueError: there are no such bits.
    """
    Grid(bits=bits, symmetric=True)
    found = {2: TWO, 3: THREE}.get(bits, MORE)
    if found.grid["group_size"] is not GROUP_SIZES:
        return found
    widths = [width for _, width in shapes]
    size = next(s for s in GROUP_SIZES if s == -1 or all(width % s == 0 for width in widths))
    return replace(found, grid={**found.grid, "group_size": size})


def commands(bits: int, recipe: Recipe, model: str) -> list[str]:
    """The command lines, with words in capitals where something must be filled in."""
    grid = {"bits": bits, **recipe.grid}
    trained = {"dataset": "TEXT", "output_dir": "ADAPTER", **recipe.train}
    if recipe.base is None:
        lines = [_line("train", {"model": model, **trained, **grid})]
    else:
        made = {"model": model, "output": "BASE", "dataset": "TEXT", **grid, **recipe.base}
        if "distillation_weight" in recipe.train:
            trained["teacher_model"] = model
        lines = [_line("prepare", made), _line("train", {"model": "BASE", **trained})]
    return [*lines, "lrqat eval ADAPTER --dataset HELDOUT"]


def _line(command: str, options: dict[str, Any]) -> str:
    words = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return f"lrqat {command} {words}"
