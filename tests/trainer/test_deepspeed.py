"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes and CPUs, by the configuration of the docs.

Under torchrun this file is the script. `make test` puts DeepSpeed beside the environment, so that
the other tests run without it.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file

from peft_lrqat import LowBitConfig, LRQATConfig, prepare_low_bit
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments


BESIDE = Path(sys.prefix) / "deepspeed"
DOCUMENT = Path(__file__).parents[2] / "docs" / "many-gpus.md"
ROWS, STEPS = 4, 4


def train(base, out, processes=1, config=None, resume=False):
    args = LRQATTrainingArguments(
        out,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // processes,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        # DeepSpeed clips by one norm over everything, and not group by group.
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=config,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    fields = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4}
    model = get_peft_model(model, LRQATConfig(**fields, init_weights=False))
    ids = torch.randint(0, 96, (16, 10), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = LRQATTrainer(model=model, args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(f"{out}/final")
    frozen = [p for n, p in model.named_parameters() if n.endswith(".phi")]
    held = [
        tensor
        for module in model.modules()
        for name, tensor in getattr(module, "_held", {}).items()
        if name == "phi"
    ]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "phi": sum(getattr(p, "ds_tensor", p).numel() for p in frozen),
        "held": sum(tensor.numel() for tensor in held),
    }


def script(base, out, config, resume):
    """What each process does."""
    # It would compile a faster way of adding, for a minute.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    torch.set_num_threads(1)
    found = train(base, out, 2, json.loads(config), bool(resume))
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tiny_llama):
    """``launch(out, stage, resume=False)``: what each process found."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch was built without gloo, the only backend for CPUs")
    if not BESIDE.is_dir():
        pytest.skip(f"{BESIDE} does not hold DeepSpeed; `make test` puts it there")
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_llama.save_pretrained(folder / "plain")
    prepare_low_bit(folder / "plain", folder / "base", LowBitConfig(bits=4, group_size=8))
    (documented,) = re.findall(r"```json\n(\{.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)

    def run(out, stage, *, resume=False):
        settings = json.loads(documented)
        assert settings["zero_optimization"]["stage"] == 3
        settings["zero_optimization"]["stage"] = stage
        settings["bf16"]["enabled"] = False
        words = [__file__, str(folder / "base"), str(folder / out), json.dumps(settings)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        path = os.pathsep.join([str(BESIDE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        done = subprocess.run(
            [*launcher, "--nproc_per_node", "2", *words, "resume" if resume else ""],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"},
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return [json.loads((folder / out / f"{rank}.json").read_text()) for rank in range(2)]

    run.folder = folder  # type: ignore[attr-defined]
    return run


def adapter(launch, out):
    return load_file(launch.folder / out / "final" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single(launch):
    return train(launch.folder / "base", str(launch.folder / "single"))


@pytest.fixture(scope="module")
def zero3(launch):
    return launch("zero3", 3)


def assert_same_training(launch, found, single, out):
    for rank in found:
        assert rank["losses"] == pytest.approx(single["losses"], abs=1e-5)
    one, other = adapter(launch, "single"), adapter(launch, out)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


def test_zero2_trains_as_one_process(launch, single):
    assert_same_training(launch, launch("zero2", 2), single, "zero2")


def test_zero3_trains_as_one_process(launch, single, zero3):
    assert_same_training(launch, zero3, single, "zero3")


def test_zero3_shards_the_integers(zero3, single):
    assert [2 * rank["phi"] for rank in zero3] == [single["phi"]] * 2
    assert [rank["held"] for rank in zero3] == [0, 0]  # nothing keeps them whole
    assert single["held"] == single["phi"]


def test_zero3_resumes_exactly(launch, zero3):
    shutil.copytree(launch.folder / "zero3", launch.folder / "again")
    shutil.rmtree(launch.folder / "again" / f"checkpoint-{STEPS}")
    shutil.rmtree(launch.folder / "again" / "final")
    resumed = launch("again", 3, resume=True)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in zero3]
    one, other = adapter(launch, "zero3"), adapter(launch, "again")
    assert all(torch.equal(one[name], other[name]) for name in one)


if __name__ == "__main__":
    script(*sys.argv[1:])
