"""The ways to round a block with the help of data, by name."""

from .gptq import GPTQ
from .reconstruct import Reconstruction


METHODS = {"blocks": Reconstruction, "gptq": GPTQ}
