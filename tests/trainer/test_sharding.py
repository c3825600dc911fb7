"""Processes that train together hold the same frozen weights."""

import pytest
from torch import nn

from peft_lrqat.trainer import sharding


def test_processes_with_other_base_weights_are_refused(make_peft, monkeypatch):
    model, other = make_peft(bits=4), make_peft(bits=3)
    digests = []
    for each in (model, other, model):
        monkeypatch.setattr(sharding, "gather_object", lambda found: digests.extend(found) or found)
        sharding._check_same_base(each)
    assert digests[0] == digests[2] != digests[1]
    monkeypatch.setattr(sharding, "gather_object", lambda found: digests)
    with pytest.raises(ValueError, match=r"processes \[1\] hold other base weights than process 0"):
        sharding._check_same_base(model)


def test_a_model_without_adapters_has_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(sharding, "gather_object", lambda found: found * 2)
    sharding._check_same_base(nn.Linear(2, 2))
