"""Runs that stay finite: a loss, gradient or parameter that is not finite stops the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.hyperparameter_search import default_hp_search_backend
from transformers.utils import logging

from peft_lrqat.shared.words import some

from .checkpoint import last_complete_checkpoint
from .labels import has_no_label
from .part import TrainerPart


logger = logging.get_logger(__name__)


class FiniteRuns(TrainerPart):
    """Stops a run with FloatingPointError as soon as something is not finite.

    Names the place, and saves nothing of that step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parameters_checked = False  # for the checkpoint that is being written
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        # What computes a loss may take entries out of `inputs`.
        batch = dict(inputs) if isinstance(inputs, Mapping) else None
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            if not has_no_label(batch):
                self._stop(f"the loss is {loss.item()}", self._find_nonfinite(batch))
            logger.warning(
                f"a batch of step {self.state.global_step + 1} has no label to score and teaches "
                "nothing"
            )
            loss = torch.zeros_like(loss)
        # A scaler of float16 gradients lowers its scale and skips the step by itself.
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            self._check_gradients()
        return loss

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Searches; with optuna, a trial that is not finite has failed and the search continues."""
        backend = kwargs.get("backend") or default_hp_search_backend()
        if getattr(backend, "value", backend) == "optuna":
            kwargs.setdefault("catch", (FloatingPointError,))
        return super().hyperparameter_search(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_parameters()
        self._parameters_checked = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._parameters_checked = False

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if self.args.should_save and not self._parameters_checked:
            self._check_parameters()
        super()._save(output_dir, state_dict)

    def _find_nonfinite(self, batch: dict[str, Any] | None) -> str:
        # Not the wrapper of DDP: its forward pass waits for the other processes, which have no
        # reason for a second one.
        model = self.accelerator.unwrap_model(self.model)
        named = list(model.named_modules())
        if self.teacher is not None:
            named += self.teacher.named_modules(prefix="teacher")
        names = nonfinite_tensors(
            p for name, module in named for p in module.named_parameters(name, recurse=False)
        )
        if names:
            return f"parameters that are not finite: {some(names)}"
        if batch is not None:
            module = first_nonfinite_module(
                named, lambda: self.compute_loss(model, self._prepare_inputs(batch))
            )
            if module is not None:
                return f"the first module with an output that is not finite: `{module}`"
        return "all parameters and, in a second pass, all outputs of modules are finite"

    def _check_gradients(self) -> None:
        # Before clipping, which multiplies a whole group by the norm that one gradient has spoilt.
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        grads = {name: p.grad for name, p in named if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        if not math.isfinite(norm):
            names = some(nonfinite_tensors(grads.items()))
            self._stop(
                f"the gradient norm is {float(norm)}",
                "gradients that are not finite: "
                + (names or "none, but their squares are too large for float32"),
            )

    def _check_parameters(self) -> None:
        names = nonfinite_tensors(
            (n, p) for n, p in self.model.named_parameters() if p.requires_grad
        )
        if names:
            self._stop(
                "there are parameters that are not finite",
                f"these: {some(names)}",
                self.state.global_step,
            )

    def _stop(self, what: str, where: str, step: int | None = None) -> None:
        step = self.state.global_step + 1 if step is None else step
        last = last_complete_checkpoint(self._get_output_dir(self._trial))
        kept = (
            f"the last checkpoint, {last}, is unchanged" if last else "there is no checkpoint yet"
        )
        raise FloatingPointError(
            f"{what} at step {step}; {where}. Nothing of this step was saved; {kept}. A lower "
            "learning rate (of the scales first), a longer warm-up or bfloat16 in place of float16 "
            "often helps"
        )


def nonfinite_tensors(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the floating-point tensors with NaN or infinite entries."""
    return [
        name
        for name, t in named
        if t is not None and t.is_floating_point() and not bool(torch.isfinite(t.detach()).all())
    ]


@torch.no_grad()
def first_nonfinite_module(
    named: Iterable[tuple[str, nn.Module]], run: Callable[[], Any]
) -> str | None:
    """Calls ``run``; the name of the first module with a NaN or infinite output, or None."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and nonfinite_tensors(("", t) for t in _tensors(output)):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in named if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
