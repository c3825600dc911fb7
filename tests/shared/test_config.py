"""What the configurations of both adapter types share."""

import pytest

from peft_lrqat import LoRAQuantConfig, LRQATConfig


@pytest.mark.parametrize("config", [LRQATConfig, LoRAQuantConfig])
def test_a_set_is_saved_in_one_order(config):
    """Another process would have another one, and with it another digest of the settings."""
    names = [f"layer_{number}" for number in range(9)]
    saved = config(target_modules=names[::-1]).to_dict()
    assert saved["target_modules"] == names
    assert config(**saved).target_modules == set(names)
