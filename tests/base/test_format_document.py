"""docs/low-bit-base.md: its reader reads what is written, and it names every stored field."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_lrqat.base.config import FORMAT_VERSION, LowBitConfig, StoredWeight
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.quant import DOWNCASTS


ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/low-bit-base.md").read_text()


@pytest.fixture(scope="module")
def reader():
    (code,) = re.findall(r"```py\n(import numpy.*?)```", DOCUMENT, flags=re.DOTALL)
    names = {}
    exec(code, names)
    return names["weight"]


@pytest.mark.parametrize(
    ("symmetric", "balanced"),
    [(True, False), (False, False), (True, True)],
    ids=["symmetric", "asymmetric", "balanced"],
)
@pytest.mark.parametrize("group_size", [-1, 6])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_reader_of_the_document(bits, group_size, symmetric, balanced, reader):
    settings = LowBitConfig(
        bits=bits, group_size=group_size, symmetric=symmetric, balanced=balanced
    )
    layer = DowncastLinear.from_linear(
        nn.Linear(18, 7),
        settings.weight_format("layer", 18),
        estimator="minmax",
        p=4.0,
        base_dtype=torch.float32,
    )
    zero_point = None if symmetric else layer.zero_point.numpy()
    found = reader(
        layer.phi.numpy(), layer.scale0.numpy(), zero_point, bits, (7, 18), symmetric, balanced
    )
    assert torch.equal(torch.from_numpy(found), layer.stored_weight())


def test_it_is_of_this_version_and_names_every_field():
    assert f"Version {FORMAT_VERSION}." in DOCUMENT
    for maker in (LowBitConfig, StoredWeight):
        for field in dataclasses.fields(maker):
            assert f"`{field.name}`" in DOCUMENT, field.name
    for downcast in DOWNCASTS:
        assert f"`{downcast}`" in DOCUMENT
