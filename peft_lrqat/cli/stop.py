"""Ctrl-C and SIGTERM during training: the step ends, a checkpoint is saved, and the run stops."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class StopOnSignal(TrainerCallback):
    """Stops training with a checkpoint once a signal has arrived.

    ``received`` is the number of that signal, or 0.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, the first signal asks for the stop; a second one acts as it always does."""
        before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        self._before = before
        try:
            yield
        finally:
            self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Asks the trainer for a checkpoint and the end."""
        if self._anywhere(args):
            control.should_save = True
            control.should_training_stop = True

    def _anywhere(self, args: TrainingArguments) -> int:
        """The signal, if any process has received one: all of them must stop at the same step."""
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        return self.received
