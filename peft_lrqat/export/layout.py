"""Names and shapes of the tensors in a checkpoint, where they differ from those in memory.

transformers fuses the weights of experts, and renames modules, while it loads some architectures,
and undoes that in `save_pretrained`. Runtimes know the names of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..base.experts import as_plain
from ..formats.linear import Target


Tensors = Callable[[], Iterable[tuple[str, "Tensor | Target"]]]


class CheckpointLayout:
    """What becomes of each tensor of a model in a checkpoint of its architecture.

    Args:
        model: the model; only its architecture counts.
        tensors: all names and tensors in memory; those of targets stand for their weight.

    Raises:
        ValueError: the checkpoint stores a target's weight together with other weights.
    """

    def __init__(self, model: PreTrainedModel, tensors: Tensors) -> None:
        self._model, self._tensors = model, tensors
        shapes = {_key(name, value): _empty(value) for name, value in tensors()}
        self.targets = {
            _key(n, value): value for n, value in tensors() if isinstance(value, Target)
        }
        # The weights of experts, each a linear layer in the checkpoint: its rows by its name.
        self._parts = {
            key: self._apart(key, target) for key, target in self.targets.items() if target.experts
        }
        # The experts' layers by name: the weights they are rows of, and which (rows,).
        self.parts = {
            part.removesuffix(".weight"): (name, rows)
            for name, parts in self._parts.items()
            for part, rows in parts.items()
        }
        whole = _reverted(model, dict(shapes))
        # By the first of its tensors: the tensors that are converted together.
        self._groups: dict[str, list[str]] = {name: [name] for name in shapes}
        self._names = {name: name for name in self.targets if name not in self._parts}
        if {n: t.shape for n, t in whole.items()} != {n: t.shape for n, t in shapes.items()}:
            self._find_groups(shapes, whole)
        # Whatever runtimes may take for the weight of a linear layer, without ".weight".
        self.linears = [
            name.removesuffix(".weight")
            for name, tensor in whole.items()
            if tensor.ndim == 2 and name.endswith(".weight")
        ]
        self.target_names = {name.removesuffix(".weight") for name in self._names.values()}
        self.target_names |= self.parts.keys()

    def _apart(self, name: str, target: Target) -> dict[str, Tensor]:
        """Where the rows of experts' weights are in a checkpoint: (rows,) by name."""
        made = _reverted(self._model, {name: _empty(target)})
        if not all(
            part.endswith(".weight") and t.dim() == 2 and t.shape[1] == target.in_features
            for part, t in made.items()
        ):
            raise ValueError(
                f"checkpoints of this architecture store `{name}` as "
                f"{', '.join(map(repr, list(made)[:2]))}, and not as one linear layer for each "
                "expert; export it as 'packed' or 'dequantized'"
            )
        # Whole rows go to one layer or another, so a column of their numbers shows where.
        numbers = torch.arange(target.out_features).view(target.experts, -1, 1)
        made = _reverted(self._model, {name: numbers})
        return {part: rows.flatten() for part, rows in made.items()}

    def _find_groups(self, shapes: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
        made: dict[str, list[str]] = {}
        for name, tensor in shapes.items():
            alone = _reverted(self._model, {name: tensor})
            for out in alone:
                made.setdefault(out, []).append(name)
            if name in self._names:
                ((out, result), *more) = alone.items()
                if more or result.shape != tensor.shape or not out.endswith(".weight"):
                    raise ValueError(_apart(name, alone))
                self._names[name] = out
        for out, names in made.items():
            if len(names) > 1:
                if quantised := [name for name in names if name in self.targets]:
                    raise ValueError(_apart(quantised[0], [out]))
                for name in names:
                    self._groups[name] = []
                self._groups[names[0]] = names

    def tensors(self) -> Iterator[tuple[str, Tensor | Target]]:
        """All tensors as the checkpoint has them, one conversion after another."""
        waiting: dict[str, Tensor] = {}
        members = {name: first for first, group in self._groups.items() for name in group}
        for name, value in self._tensors():
            key = _key(name, value)
            if isinstance(value, Target) and value.experts:
                for part, rows in self._parts[key].items():
                    layer = part.removesuffix(".weight")
                    yield (
                        layer,
                        replace(
                            value, name=layer, out_features=len(rows), experts=0, is_conv1d=False
                        ),
                    )
                continue
            if isinstance(value, Target):
                yield self._names[key].removesuffix(".weight"), value
                continue
            group = self._groups[members[key]]
            waiting[key] = value
            if all(member in waiting for member in group):
                together = {member: waiting.pop(member) for member in group}
                yield from _reverted(self._model, together).items()


def _reverted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a checkpoint has them."""
    with as_plain(model):
        return revert_weight_conversion(model, tensors)


def _key(name: str, value: Tensor | Target) -> str:
    return value.parameter_name if isinstance(value, Target) else name


def _empty(value: Tensor | Target) -> Tensor:
    if isinstance(value, Target):
        weight = torch.empty(value.out_features, value.in_features, device="meta")
        weight = weight.unflatten(0, (value.experts, -1)) if value.experts else weight
        return weight.mT if value.is_conv1d else weight
    return torch.empty_like(value, device="meta")


def _apart(name: str, made: Iterable[str]) -> str:
    return (
        f"checkpoints of this architecture store `{name}` as {', '.join(map(repr, made))}, together"
        " with other weights or in parts, which integers cannot be; export it as 'packed', or leave"
        " it out of `target_modules`"
    )
