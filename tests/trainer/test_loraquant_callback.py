"""Packed adapters beside a LoRA run's checkpoints: whole, up to date, no effect on the run."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter
from peft_lrqat.quant.factors import groups, paper, residual
from peft_lrqat.quant.factors.allocation import relative_errors
from peft_lrqat.trainer import LoRAQuantCallback, loraquant_callback


RECIPE = LoRAQuantConfig(group_size=8, ratio=0.8)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Conversions in a fraction of the time; what is computed once for all is computed as ever."""
    for group_size in (8, 128):
        relative_errors(group_size)
    monkeypatch.setattr(groups, "CANDIDATES", 3)
    monkeypatch.setattr(residual, "MAX_SWEEPS", 1)
    monkeypatch.setattr(paper, "STEPS", 10)


@pytest.fixture
def make_lora(make_base):
    def make(**fields):
        base = make_base()
        torch.manual_seed(0)
        config = {
            "target_modules": ["q_proj", "down_proj"],
            "r": 4,
            "task_type": "CAUSAL_LM",
            **fields,
        }
        return get_peft_model(base, LoraConfig(**config))

    return make


@pytest.fixture
def run(tmp_path, make_lora, token_rows):
    """``run(model, resume, callback, **fields)``: trains, by default three steps; the trainer."""

    def train(model=None, resume=None, callback=None, output="out", **fields):
        defaults = {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 1,
        }
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
        trainer = transformers.Trainer(
            model=make_lora() if model is None else model,
            args=transformers.TrainingArguments(
                str(tmp_path / output), **{**defaults, **quiet, **fields}
            ),
            train_dataset=token_rows(),
            eval_dataset=token_rows(2),
            callbacks=[LoRAQuantCallback(RECIPE) if callback is None else callback]
            if callback is not False
            else [],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def outcome(trainer):
    return {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_checkpoint_has_the_packed_adapter_of_its_lora_adapter(
    run, tmp_path, make_base, logits_of
):
    trainer = run()
    packed = tmp_path / "out" / "loraquant"
    assert names_in(packed) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "final"]
    for name in names_in(packed)[:3]:
        quantize_adapter(tmp_path / "out" / name, tmp_path / name, RECIPE, progress=False)
        assert (packed / name / WEIGHTS).read_bytes() == (tmp_path / name / WEIGHTS).read_bytes()
    last, final = (load_file(packed / name / WEIGHTS) for name in ("checkpoint-3", "final"))
    assert_same(last, final)
    loaded = PeftModel.from_pretrained(make_base(), packed / "final").eval()
    base, lora = logits_of(make_base()), logits_of(trainer.model.eval())
    # The product of trained factors, up to what is lost of it.
    assert (logits_of(loaded) - lora).norm() < 0.7 * (lora - base).norm()


def test_training_and_resuming_are_as_without_it(run, tmp_path):
    options = {"max_steps": 4, "lr_scheduler_type": "constant", "save_steps": 2}
    expected = outcome(run(callback=False, output="without", **options))
    assert_same(outcome(run(**options)), expected)
    assert_same(outcome(run(resume=str(tmp_path / "out" / "checkpoint-2"), **options)), expected)
    run(output="again", **{**options, "max_steps": 2})
    resumed = run(resume=True, output="again", **options)
    assert_same(outcome(resumed), expected)
    assert resumed.model.peft_config.keys() == {"default"}
    assert names_in(tmp_path / "again" / "loraquant") == ["checkpoint-2", "checkpoint-4", "final"]


def test_packed_adapters_go_with_their_checkpoints(run, tmp_path):
    run(save_total_limit=2, max_steps=4)
    assert names_in(tmp_path / "out") == ["checkpoint-3", "checkpoint-4", "loraquant"]
    assert names_in(tmp_path / "out" / "loraquant") == ["checkpoint-3", "checkpoint-4", "final"]
    # What else lies there stays; what is there already is written anew.
    (tmp_path / "out" / "loraquant" / "notes").mkdir()
    before = (tmp_path / "out" / "loraquant" / "final" / WEIGHTS).read_bytes()
    run(resume=True, save_total_limit=2, max_steps=6)
    assert names_in(tmp_path / "out" / "loraquant") == [
        "checkpoint-5",
        "checkpoint-6",
        "final",
        "notes",
    ]
    assert (tmp_path / "out" / "loraquant" / "final" / WEIGHTS).read_bytes() != before


def test_the_best_checkpoint_is_the_final_one(run, tmp_path):
    losses = iter([2.0, 1.0, 3.0])

    class SetLoss(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **_):
            metrics["eval_loss"] = next(losses)

    class Both(LoRAQuantCallback, SetLoss):
        pass

    trainer = run(
        callback=Both(RECIPE), eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    assert trainer.state.best_global_step == 2
    packed = tmp_path / "out" / "loraquant"
    final, best, last = (
        (packed / name / WEIGHTS).read_bytes() for name in ("final", "checkpoint-2", "checkpoint-3")
    )
    assert final == best != last


def test_a_failure_is_a_warning_and_leaves_nothing(run, tmp_path, monkeypatch, caplog):
    quantize, calls = quantize_adapter, []

    def fail_once(*args, **kwargs):
        calls.append(args)
        made = quantize(*args, **kwargs)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return made

    monkeypatch.setattr(loraquant_callback, "quantize_adapter", fail_once)
    expected = outcome(run(callback=False, output="without"))
    assert_same(outcome(run()), expected)
    packed = tmp_path / "out" / "loraquant"
    assert names_in(packed) == ["checkpoint-1", "checkpoint-3", "final"]
    (warning,) = [
        record.getMessage() for record in caplog.records if "packed adapter" in record.getMessage()
    ]
    place = packed / "checkpoint-2"
    assert f"no packed adapter was written to {place}: RuntimeError: out of luck. " in warning


def test_factors_that_are_not_finite_are_a_warning(run, make_lora, tmp_path, caplog):
    model = make_lora()
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = torch.nan
    run(model, max_steps=1)
    assert caplog.text.count("has NaN or infinite entries; nothing was written") == 2
    assert not (tmp_path / "out" / "loraquant").exists()


def test_what_a_killed_run_left_is_removed(run, tmp_path):
    left = tmp_path / "out" / "loraquant" / "..checkpoint-7-0a1b2c3d"
    left.mkdir(parents=True)
    (left / WEIGHTS).touch()
    run(max_steps=1)
    assert names_in(left.parent) == ["checkpoint-1", "final"]


def test_one_of_several_adapters(run, make_lora, tmp_path):
    model = make_lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    run(model, callback=LoRAQuantCallback(RECIPE, adapter_name="other"), max_steps=1)
    made = LoRAQuantConfig.from_pretrained(tmp_path / "out" / "loraquant" / "final")
    assert made.r == 2
    assert all(name.endswith("v_proj") for name in made.component_bits)


def test_only_the_main_process_writes_and_no_trial_of_a_search(make_lora, tmp_path):
    args, callback = (
        SimpleNamespace(output_dir=str(tmp_path), disable_tqdm=True),
        LoRAQuantCallback(RECIPE),
    )
    for state in ({"is_world_process_zero": False}, {"is_hyper_param_search": True}):
        state = transformers.TrainerState(global_step=1, **state)
        for event in (callback.on_train_begin, callback.on_save, callback.on_train_end):
            event(args, state, None, model=make_lora())
    assert names_in(tmp_path) == []


def refused(model, callback=None):
    args = SimpleNamespace(output_dir="nowhere", disable_tqdm=True)
    with pytest.raises(ValueError, match="adapter") as error:
        (callback or LoRAQuantCallback()).on_train_begin(
            args, transformers.TrainerState(), None, model=model
        )
    return str(error.value)


def test_models_that_it_is_not_for(make_base, make_peft, make_lora, run, monkeypatch):
    with pytest.raises(
        ValueError,
        match="needs a PEFT model with a LoRA adapter, but the model is a LlamaForCausalLM",
    ):
        run(make_base())
    assert (
        "the adapter in the model is of type LRQAT, but a LoRA adapter is needed here"
        in refused(make_peft())
    )
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'` takes"):
        run(make_lora(init_lora_weights="pissa"))
    assert "the adapter uses `lora_bias`" in refused(make_lora(lora_bias=True))
    assert "no adapter `none` for LoRAQuantCallback, only `default`" in refused(
        make_lora(), LoRAQuantCallback(adapter_name="none")
    )
    sharded = make_lora()
    next(
        p for n, p in sharded.named_parameters() if "lora_A" in n
    ).full_tensor = DTensor.full_tensor
    assert "is spread over processes (FSDP, DeepSpeed ZeRO-3)" in refused(sharded)
