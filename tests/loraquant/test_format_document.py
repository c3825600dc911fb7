"""The reader in docs/packed-adapters.md reads what is written.

The document names the version and every stored field.
"""

import re
from pathlib import Path

import pytest
import torch

from peft_lrqat.quant.factors.storage import FORMAT_VERSION, expand, pack_components


ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/packed-adapters.md").read_text()


@pytest.fixture(scope="module")
def reader():
    (code,) = re.findall(r"```py\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    names = {}
    exec(code, names)
    return names["factors"]


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", ["1", "22", "876543211", "3311"])
@pytest.mark.parametrize("shape", [(13, 24), (1, 5), (7, 16)])
def test_the_reader_of_the_document(shape, bits, zero_points, make_components, reader):
    rows, columns = shape
    options = {"group_size": 7, "scale_dtype": torch.bfloat16, "zero_points": zero_points}
    components = make_components(bits, rows, columns, **options)
    format, tensors = pack_components(components, rows=rows, columns=columns, **options)
    stored = {
        kind: t.float().numpy() if kind == "scales" else t.numpy() for kind, t in tensors.items()
    }
    found = reader(
        stored["codes"], stored["scales"], stored.get("zero_points"), format.bits, shape, 7
    )
    for mine, theirs in zip(expand(format, tensors, torch.float32), found):
        assert mine.shape == theirs.shape
        assert torch.equal(mine, torch.from_numpy(theirs).float())


def test_it_is_of_this_version_and_names_every_field():
    assert f"Version {FORMAT_VERSION}." in DOCUMENT
    for name in (
        "component_bits",
        "shapes",
        "group_size",
        "scale_dtype",
        "zero_points",
        "embeddings",
        "format_version",
    ):
        assert f"| `{name}` |" in DOCUMENT
