"""The store of expanded factors: its limit, what makes room, copies."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peft_lrqat.shared.tensor_cache import TensorCache


FACTORS = torch.zeros(2, 4), torch.zeros(4, 3)  # 80 bytes


def held(cache, adapter):
    return [layer for layer in "abcde" if cache.get(layer, adapter) is not None]


def test_within_the_limit_everything_is_kept():
    cache = TensorCache(limit=240)
    for layer in "abc":
        cache.put(layer, "one", FACTORS)
    assert held(cache, "one") == ["a", "b", "c"]
    assert cache.get("a", "one") is FACTORS
    assert cache.bytes == 240


def test_layers_of_one_adapter_do_not_drive_each_other_out():
    cache = TensorCache(limit=200)
    for _ in range(3):
        for layer in "abcde":
            if cache.get(layer, "one") is None:
                cache.put(layer, "one", FACTORS)
        assert held(cache, "one") == ["a", "b"]
    assert cache.bytes == 160


def test_another_adapter_makes_room_oldest_first():
    cache = TensorCache(limit=240)
    for layer in "abc":
        cache.put(layer, "one", FACTORS)
    cache.get("a", "one")
    cache.put("a", "two", FACTORS)
    assert (held(cache, "one"), held(cache, "two")) == (["a", "c"], ["a"])


def test_putting_again_replaces():
    cache = TensorCache(limit=100)
    cache.put("a", "one", FACTORS)
    cache.put("a", "one", (FACTORS[0], FACTORS[1]))
    assert cache.bytes == 80
    cache.drop("a", "one")
    cache.drop("a", "one")
    assert (cache.bytes, held(cache, "one")) == (0, [])


def test_no_limit_fits_nothing():
    cache = TensorCache(limit=0)
    cache.put("a", "one", FACTORS)
    assert held(cache, "one") == []


def test_a_new_limit_and_copies_start_empty():
    cache = TensorCache(limit=100)
    cache.put("a", "one", FACTORS)
    duplicate = copy.deepcopy(cache)
    assert (duplicate.limit, duplicate.bytes, held(duplicate, "one")) == (100, 0, [])
    cache.set_limit(50)
    assert (cache.limit, cache.bytes, held(cache, "one")) == (50, 0, [])


def test_requests_in_threads():
    cache = TensorCache(limit=320)
    interval = sys.getswitchinterval()

    def use(first):
        for number in range(first, first + 3000):
            if cache.get("a", str(number % 9)) is None:
                cache.put("a", str(number % 9), FACTORS)

    sys.setswitchinterval(1e-7)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert (
        cache.bytes
        == sum(80 for number in range(9) if cache.get("a", str(number)) is not None)
        == 320
    )


@pytest.mark.parametrize("limit", [-1, 1.5, None, True])
def test_limits_that_are_refused(limit):
    with pytest.raises(ValueError, match="a number of bytes"):
        TensorCache().set_limit(limit)
