"""Memory of mapped files is given back, and no value changes."""

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peft_lrqat.shared.pages import release_pages


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone")
MB = 1 << 20


def mapped_bytes():
    """Resident bytes of this process that lie in files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


def test_a_tensor_in_a_file_gives_its_memory_back_and_keeps_its_values(tmp_path):
    made = torch.randint(256, (32 * MB,), dtype=torch.uint8)
    file = tmp_path / "file.safetensors"
    save_file({"a": made[: 8 * MB + 5].clone(), "b": made}, file)
    with safe_open(file, framework="pt") as opened:
        tensor, other = opened.get_tensor("b"), opened.get_tensor("a")
        assert torch.equal(tensor, made)
        assert torch.equal(other, made[: 8 * MB + 5])
        before = mapped_bytes()
        release_pages(tensor, [str(tmp_path / "another")])
        assert before - mapped_bytes() < MB
        release_pages(tensor, [str(file)])
        assert before - mapped_bytes() > 31 * MB
        assert torch.equal(tensor, made)
        assert torch.equal(other, made[: 8 * MB + 5])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3 * MB),
        torch.arange(4 * MB).view(2048, 2048).T,
        torch.empty(0),
        torch.empty(5, 5, device="meta"),
    ],
    ids=["in memory", "transposed", "empty", "meta"],
)
def test_other_tensors_stay(tensor):
    copy = tensor.clone()
    release_pages(tensor, [__file__])
    if tensor.device.type != "meta":
        assert torch.equal(tensor, copy)
