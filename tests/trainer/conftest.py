"""Trainers of tiny models on a few rows of tokens, and what they trained."""

import gc

import pytest
import torch
import transformers

from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments


QUIET = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}
SHORT = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}


@pytest.fixture(scope="session")
def tiny_llama():
    """What several processes train together."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module", autouse=True)
def _less_to_collect():
    """The Trainer collects garbage at every start, which takes long over all the imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def make_peft(make_base, make_peft):
    """As elsewhere, and with the same factors at every call."""

    def make(architecture="llama", dtype=torch.float32, seed=0, **fields):
        make_base(architecture, dtype, seed)  # the first call draws its weights
        torch.manual_seed(0)
        return make_peft(architecture, dtype, seed, **fields)

    return make


@pytest.fixture(scope="session")
def token_rows():
    """``token_rows(count, length)``: rows of random tokens, each its own labels."""

    def make(count=8, length=10):
        ids = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(0))
        return [{"input_ids": row, "labels": row} for row in ids]

    return make


@pytest.fixture(scope="session")
def args_in():
    """``args_in(folder, kind, **fields)``: three quiet steps of two rows, each one logged.

    The rates are constant, and nothing is saved.
    """

    def make(folder, kind=LRQATTrainingArguments, **fields):
        return kind(**{"output_dir": str(folder), **QUIET, **SHORT, **fields})

    return make


@pytest.fixture
def lrqat_args(args_in, tmp_path):
    """``lrqat_args(kind, **fields)``: `args_in` the folder ``out`` of this test."""

    def make(kind=LRQATTrainingArguments, **fields):
        return args_in(**{"folder": tmp_path / "out", "kind": kind, **fields})

    return make


@pytest.fixture
def lrqat_trainer(make_peft, token_rows, lrqat_args):
    """``lrqat_trainer(model, options, **fields)``: an `LRQATTrainer` on `token_rows`.

    It has these options and arguments. Without ``model``, it has one whose B is random: each group
    has a gradient from the first step on.
    """

    def make(model=None, options=None, **fields):
        options = {"train_dataset": token_rows(), **(options or {})}
        if "model_init" not in options:
            options["model"] = make_peft(init_weights=False) if model is None else model
        return LRQATTrainer(args=lrqat_args(**fields), **options)

    return make


@pytest.fixture(scope="session")
def trained_tensors():
    """``trained_tensors(model)``: copies of its trainable parameters by name."""

    def copy(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    return copy


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of each step, as the optimizer finds them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


@pytest.fixture
def gradients():
    """A callback whose ``steps`` are the gradients by name, of each step, after clipping."""
    return Gradients()


@pytest.fixture(scope="session")
def step_logs():
    """``step_logs(trainer)``: the logs of training steps."""

    def find(trainer):
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    return find
