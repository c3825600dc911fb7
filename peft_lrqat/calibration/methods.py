"""The ways to round a block with the help of data, by name."""

from typing import TypeAlias

from .gptq import GPTQ
from .reconstruct import Reconstruction


CalibrationMethod: TypeAlias = Reconstruction | GPTQ
METHODS: dict[str, type[CalibrationMethod]] = {"blocks": Reconstruction, "gptq": GPTQ}
