"""Hidden states in memory, and in a file beyond a limit."""

import torch

from peft_lrqat.calibration.shelf import Shelf


def test_tensors_beyond_the_limit_are_in_files(tmp_path):
    shelf = Shelf(limit=1000, directory=tmp_path)
    tensors = [torch.randn(10, 10).to(dtype) for dtype in (torch.float32, torch.bfloat16) * 3]
    kept = [shelf.keep(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, copy)
        assert copy.dtype == tensor.dtype
        assert copy.data_ptr() != tensor.data_ptr()
    assert shelf.in_memory() == 1000  # 400 + 200 + 400; the next 200 find no room
    assert not any(tmp_path.iterdir())  # a mapping needs no name


def test_memory_that_is_given_back_is_used_again(tmp_path):
    shelf = Shelf(limit=400, directory=tmp_path)
    for _ in range(5):
        kept = shelf.keep(torch.randn(100, requires_grad=True))
        assert shelf.in_memory() == 400
        assert not kept.requires_grad
        del kept
