"""The configurations of docs/many-gpus.md with `accelerate launch`, on CPUs: DDP and FSDP2.

Under accelerate this file is the script.
"""

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
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from peft_lrqat import LowBitConfig, LRQATConfig, prepare_low_bit
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments


DOCUMENT = Path(__file__).parents[2] / "docs" / "many-gpus.md"
ROWS = 4  # in a step, over all processes
STEPS = 4


def script(base, out, resume):
    """What each process does."""
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = LRQATTrainingArguments(
        out,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // (2 * processes) or 1,
        gradient_accumulation_steps=2 if processes < ROWS else 1,
        gradient_checkpointing=True,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards models on GPUs only, by this type.
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    fields = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4}
    model = get_peft_model(model, LRQATConfig(**fields, init_weights=False))
    ids = torch.randint(0, 96, (16, 10), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = LRQATTrainer(model=model, args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(f"{out}/final")
    frozen = {n: p for n, p in model.named_parameters() if n.endswith(".phi")}
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen.values())
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "phi": [local, sum(p.numel() for p in frozen.values())],
        "sharded": any(isinstance(p, DTensor) for p in model.parameters()),
    }
    Path(out, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def launch(tmp_path_factory, tiny_llama):
    """``launch(out, config, processes, resume=False)``: what each process found."""
    if not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo, the only backend for CPUs")
    folder = tmp_path_factory.mktemp("accelerate")
    tiny_llama.save_pretrained(folder / "plain")
    prepare_low_bit(folder / "plain", folder / "base", LowBitConfig(bits=4, group_size=8))
    blocks = re.findall(r"```yaml\n# (\w+).yaml\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    configs = dict(blocks)
    assert configs.keys() == {"ddp", "fsdp2"}

    def run(out, config=None, processes=1, *, resume=False):
        words = [__file__, str(folder / "base"), str(folder / out)]
        words += ["resume"] if resume else []
        command = [sys.executable, *words]
        if config is not None:
            text = configs[config].replace("bf16", "'no'")
            text = text.replace("num_processes: 2", f"num_processes: {processes}\nuse_cpu: true")
            (folder / "config.yaml").write_text(text)
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
            command = [*launcher, str(folder / "config.yaml"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        ranks = [folder / out / f"{rank}.json" for rank in range(processes)]
        return [json.loads(path.read_text()) for path in ranks]

    run.folder = folder  # type: ignore[attr-defined]
    return run


def adapter(launch, out):
    return load_file(launch.folder / out / "final" / "adapter_model.safetensors")


def assert_same(one, two, within):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=within)


def stopped_after_two(launch, source, out):
    """A copy of a run as it was after two steps."""
    shutil.copytree(launch.folder / source, launch.folder / out)
    shutil.rmtree(launch.folder / out / f"checkpoint-{STEPS}")
    shutil.rmtree(launch.folder / out / "final")


@pytest.fixture(scope="module")
def single(launch):
    return launch("single")[0]


@pytest.fixture(scope="module")
def sharded(launch):
    return launch("fsdp2", "fsdp2", 2)


def test_ddp(launch, single):
    found = launch("ddp", "ddp", 2)
    for rank in found:
        assert rank["losses"] == pytest.approx(single["losses"], abs=1e-5)
        assert not rank["sharded"]
    assert_same(adapter(launch, "ddp"), adapter(launch, "single"), 1e-6)


def test_one_process_becomes_two_and_one_again(launch, single):
    stopped_after_two(launch, "single", "more")
    launch("more", "ddp", 2, resume=True)
    assert_same(adapter(launch, "more"), adapter(launch, "single"), 1e-6)
    stopped_after_two(launch, "more", "less")
    launch("less", resume=True)
    assert_same(adapter(launch, "less"), adapter(launch, "single"), 1e-6)


def test_fsdp2(launch, single, sharded):
    for rank in sharded:
        assert rank["losses"] == pytest.approx(single["losses"], abs=1e-5)
        assert rank["sharded"]
        local, whole = rank["phi"]
        assert 2 * local == whole
    assert_same(adapter(launch, "fsdp2"), adapter(launch, "single"), 1e-6)


def test_the_adapter_of_every_checkpoint_loads(launch, sharded):
    folder = launch.folder / "fsdp2"
    for name in ("checkpoint-2", f"checkpoint-{STEPS}", "final"):
        base = transformers.AutoModelForCausalLM.from_pretrained(launch.folder / "base")
        assert isinstance(PeftModel.from_pretrained(base, folder / name), PeftModel)
    # Integers of the base are not in it.
    assert not any("base_layer" in name for name in adapter(launch, "fsdp2"))


def test_fsdp2_resumes_exactly(launch, sharded):
    stopped_after_two(launch, "fsdp2", "resumed")
    launch("resumed", "fsdp2", 2, resume=True)
    assert_same(adapter(launch, "resumed"), adapter(launch, "fsdp2"), 0)


def test_fsdp2_resumes_with_more_processes(launch, sharded):
    stopped_after_two(launch, "fsdp2", "four")
    launch("four", "fsdp2", 4, resume=True)
    assert_same(adapter(launch, "four"), adapter(launch, "fsdp2"), 1e-6)


def test_checkpoints_of_another_kind_are_refused(launch, single, sharded):
    stopped_after_two(launch, "single", "to-fsdp2")
    with pytest.raises(RuntimeError, match="checkpoint-2 was written without FSDP, whose state"):
        launch("to-fsdp2", "fsdp2", 2, resume=True)
    stopped_after_two(launch, "fsdp2", "to-single")
    with pytest.raises(RuntimeError, match="is only supported when using PyTorch FSDP"):
        launch("to-single", resume=True)


if __name__ == "__main__":
    script(sys.argv[1], sys.argv[2], len(sys.argv) > 3)
