"""LoRA's fields are understood, and misspelt ones are answered."""

import inspect
import pydoc
import warnings

import pytest
from peft import LoraConfig

from peft_lrqat import LoRAQuantConfig, LowBitConfig, LRQATConfig
from peft_lrqat.trainer import LRQATTrainingArguments


def test_neutral_fields_of_lora_change_nothing():
    config = LRQATConfig(
        bits=3, lora_dropout=0, bias="none", use_rslora=False, init_lora_weights=True
    )
    assert config == LRQATConfig(bits=3)


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [("lora_dropout", 0.1, "0.0"), ("use_dora", True, "False"), ("bias", "all", "'none'")],
)
def test_other_values_are_refused_by_name(field, value, neutral):
    message = f"`{field}` is a field of LoraConfig .* must be {neutral}, but is {value!r}"
    with pytest.raises(ValueError, match=message):
        LRQATConfig(**{field: value})


@pytest.mark.parametrize(
    ("config", "field", "known"),
    [
        (LRQATConfig, "group_sizes", "group_size"),
        (LRQATConfig, "bit", "bits"),
        (LoRAQuantConfig, "averagebits", "average_bits"),
        (LowBitConfig, "downcasts", "downcast"),
    ],
)
def test_a_misspelt_field_is_answered(config, field, known):
    with pytest.raises(TypeError, match=f"argument '{field}'; did you mean `{known}`"):
        config(**{field: 4})


def test_a_strange_field_is_answered_with_the_known_ones():
    with pytest.raises(TypeError, match=r"its fields are .*bits, .*downcast"):
        LRQATConfig(quux=1)


@pytest.mark.parametrize(
    ("config", "listed", "left_out"),
    [
        (LRQATConfig, "bits (default 4): Bits per weight, 2 to 8.", "base_made_from"),
        (LoRAQuantConfig, "average_bits (default ", "report"),
        (
            LowBitConfig,
            "downcast (default 'int'): How the frozen weight is kept.",
            "library_version",
        ),
        (LRQATTrainingArguments, "scale_learning_rate (default None): ", "num_train_epochs"),
    ],
)
def test_help_lists_the_fields_that_a_user_sets(config, listed, left_out):
    shown = pydoc.plain(pydoc.render_doc(config)).split("Method resolution order")[0]
    assert f"\n |      {listed}" in shown
    assert f"{left_out} (default" not in shown
    assert all(len(line) <= 100 for line in config.__doc__.splitlines())


def test_signature_and_files_of_newer_releases_are_as_before(tmp_path):
    assert "bits" in inspect.signature(LRQATConfig).parameters
    # PEFT leaves out fields that it does not know, with a warning.
    saved = LRQATConfig(bits=3).to_dict() | {"invented_later": 1}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = LRQATConfig.from_peft_type(**saved)
    assert config.bits == 3
    assert any("invented_later" in str(warning.message) for warning in said)


def test_from_lora():
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        modules_to_save=["lm_head"], layers_to_transform=[0, 1], fan_in_fan_out=True,
    )  # fmt: skip
    config = LRQATConfig.from_lora(lora, bits=3, group_size=64)
    assert config == LRQATConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        modules_to_save=["lm_head"], layers_to_transform=[0, 1], bits=3, group_size=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`lora_dropout`"):
        LRQATConfig.from_lora(LoraConfig(lora_dropout=0.05))
    assert LRQATConfig.from_lora(LoraConfig(lora_dropout=0.05), lora_dropout=0).r == 8
