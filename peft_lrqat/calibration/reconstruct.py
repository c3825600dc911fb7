"""Block reconstruction: a block's rounded output is trained towards its unquantised output.

    loss = sum over the tokens of |block_q(x_q) - block(x)|^2 / sum over the tokens of |block(x)|^2

``x`` comes from the unquantised blocks before and ``x_q`` from the rounded ones, so that a block
also mends what the ones before it have lost (Li et al., "BRECQ", arXiv 2102.05426; Chen et al.,
"EfficientQAT", arXiv 2407.11062). Only one block's weights are trained at a time, in float32. No
labels are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from .calibrate import BlockAtWork, block_loss
from .weights import StoredLinear, TrainedWeight


REPORTED_EVERY = 8  # batches


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How a block is reconstructed."""

    epochs: int = field(
        default=2, metadata={"help": "passes over the calibration data for each block"}
    )
    learning_rate: float = field(
        default=0.03,
        metadata={
            "help": "of the weights of a block, for Adam, in steps of their grid (the mean first "
            "scale of each weight); it falls to 0 along a cosine"
        },
    )
    scale_learning_rate: float = field(
        default=0.006,
        metadata={"help": "of its scales, as a share of their mean, and of its zero points"},
    )
    seed: int = field(default=0, metadata={"help": "of the order of the batches"})

    def __call__(
        self, work: BlockAtWork, report: Callable[[float], None]
    ) -> dict[str, StoredLinear]:
        """Trains the weights of one block, and returns what is stored of them."""
        trained = {name: work.first(name) for name in work.linears}
        steps = self.epochs * len(work.targets)
        optimizer = self._optimizer(list(trained.values()))
        schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
        order = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            batches = torch.randperm(len(work.targets), generator=order).tolist()
            for number, batch in enumerate(batches):
                with torch.enable_grad():
                    output = work.run(batch, {name: weight() for name, weight in trained.items()})
                    loss = block_loss(output, work.targets[batch], work.masks[batch])
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if number % REPORTED_EVERY == 0:  # on a GPU, it waits for the number
                    report(float(loss.detach()))
        return {name: weight.stored() for name, weight in trained.items()}

    def _optimizer(self, trained: list[TrainedWeight]) -> Adam:
        groups: list[dict[str, Any]] = []
        for weight in trained:
            step = float(weight.scale.detach().mean())
            groups.append({"params": [weight.weight], "lr": self.learning_rate * step})
            groups.append({"params": [weight.scale], "lr": self.scale_learning_rate * step})
            if weight.zero_point is not None:
                groups.append({"params": [weight.zero_point], "lr": self.scale_learning_rate})
        return Adam(groups, fused=True)
