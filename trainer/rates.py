"""The learning rates of the parameter groups: what each is called, and which values it may have.

`scale_learning_rate` is the name of the scales' rate in arguments, logs, messages and cards; the
same holds for `A_learning_rate` and `B_learning_rate`. Functions that make PyTorch's optimizers
say `lr` as PyTorch does. The names of the groups stand in saved optimizers, so they stay.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from numbers import Real

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from peft_lrqat.calibration.methods import METHODS
from peft_lrqat.lrqat.layer import LRQATLayer


# The parameter groups, in the optimizer's order.
GROUPS = ("A", "B", "scales", "other", "other_no_decay")
FACTORS = ("A", "B")  # the groups of the low-rank factors
CONSTANT = 1e-4  # the usual rate of the scales


def usual_scale_rate(model: nn.Module) -> float:
    """1e-4; on a calibrated base, 1 % of the mean of its scales.

    A calibrated base starts near the unquantised model, so that its scales can take longer steps
    than those of a model that round-to-nearest has ruined. It is the same in all processes.
    """
    bases = (m.base_layer for m in model.modules() if isinstance(m, LRQATLayer))
    means = [float(b.scale0.mean()) for b in bases if b.range in METHODS and not b.scale0.is_meta]
    rate = 0.01 * statistics.mean(means) if means else CONSTANT
    if PartialState().num_processes > 1:  # the other ones may not have read the weights yet
        rate = broadcast_object_list([rate])[0]
    return rate if 0 < rate < math.inf else CONSTANT


def setting_name(group: str, setting: str) -> str:
    """``("scales", "learning_rate")`` -> ``"scale_learning_rate"``; in the same way for others."""
    return f"{'scale' if group == 'scales' else group}_{setting}"


def check_rates(rates: Mapping[str, float | None]) -> None:
    """ValueError for a learning rate that is not a finite number above 0; None means not set."""
    for name, rate in rates.items():
        if rate is None or (isinstance(rate, Real) and 0 < rate < math.inf):
            continue
        if isinstance(rate, str):
            raise ValueError(
                f"`{name}` must be a number, but is the string {rate!r}; YAML reads 5e-3 as a "
                "string, write 5.0e-3"
            )
        what = "`.lrqat_scale.`" if "scale" in name else "`.lrqat_A.` and `.lrqat_B.`"
        raise ValueError(
            f"`{name}` must be a learning rate above 0, but is {rate!r}; to keep them fixed, set "
            f"`requires_grad_(False)` on the parameters with {what} in their names"
        )
