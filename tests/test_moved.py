"""Import paths of release 0.1.0."""

import importlib
import sys

import pytest

from peft_lrqat._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_module_in_its_new_place(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"`{old}` is now `{MOVED[old]}`"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__spec__.name == MOVED[old]
