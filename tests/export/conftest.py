"""A trained-looking LR-QAT model on the demo's base, small enough to export many times."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_lrqat import LRQATConfig
from peft_lrqat.demo import model_path


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="session")
def make_model():
    """``make_model(dtype, **fields)``: integers that differ from round-to-nearest, scales that have moved; in eval mode."""

    def make(dtype=torch.bfloat16, trained=True, **fields):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
        defaults = {"target_modules": "all-linear", "range_estimator": "minmax", "r": 4, "init_weights": not trained}
        model = get_peft_model(base, LRQATConfig(task_type="CAUSAL_LM", **{**defaults, **fields})).eval()
        if trained:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lrqat_scale" in name:
                        parameter *= 1 + 0.2 * torch.rand_like(parameter)
        return model

    return make
