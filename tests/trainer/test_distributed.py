"""Two processes on CPU (gloo): DDP and FSDP2's `fully_shard` train as one process does.

Integers stay where they are. Under torchrun this file is the script: `LRQATTrainer` writes its
checkpoints and resumes exactly, and what stops one process stops both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from peft import get_peft_model
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peft_lrqat import LRQATConfig, LRQATLinear
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments
from peft_lrqat.trainer.checkpoint import why_incomplete


WORLD_SIZE = 2
STEPS = 2


def build(**sizes):
    """The same model in every process; random factors keep each gradient far from zero."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **sizes,
    )
    model = transformers.LlamaForCausalLM(config)
    fields = {
        "target_modules": "all-linear",
        "r": 4,
        "downcast": "int",
        "group_size": 8,
        "init_weights": False,
    }
    return get_peft_model(model, LRQATConfig(task_type="CAUSAL_LM", **fields))


def batch(rank=None):
    """Four rows, or the share of one rank."""
    ids = torch.randint(0, 96, (4, 10), generator=torch.Generator().manual_seed(1))
    ids = ids if rank is None else ids[2 * rank : 2 * rank + 2]
    return {"input_ids": ids, "labels": ids}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, inputs, gather=lambda value: value):
    """A few steps; losses and first gradients, whatever shards they lie in."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, grads = [], {}
    for step in range(STEPS):
        loss = model(**inputs).loss
        loss.backward()
        losses.append(gather(loss.detach()))
        if step == 0:
            grads = {
                n.removeprefix("module."): whole(p.grad).clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), "grads": grads}


def frozen(model):
    """The tensors that the integers are made from, without the adapter."""
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
    return {n: whole(p.detach()).clone() for n, p in named if "base_layer" in n}


def codes(model):
    return {
        name.removeprefix("module."): module.quantized_codes()
        for name, module in model.named_modules()
        if isinstance(module, LRQATLinear)
    }


def mean(loss):
    dist.all_reduce(loss)
    return loss / WORLD_SIZE


def worker(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    try:
        model = DistributedDataParallel(build())
        ddp = train(model, batch(rank), mean)
        ddp["broadcast"] = {
            name: buffer.clone() for name, buffer in zip(*_broadcast(model), strict=True)
        }
        ddp["frozen"], ddp["codes"] = frozen(model), codes(model)

        model = build()
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
        sharded = {
            n: (p.dtype, p.to_local().shape, p.shape)
            for n, p in model.named_parameters()
            if isinstance(p, DTensor)
        }
        fsdp = train(model, batch(rank), mean)
        fsdp["sharded"], fsdp["frozen"] = sharded, frozen(model)
        torch.save({"ddp": ddp, "fsdp": fsdp}, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def _broadcast(model):
    """What DDP sends at every forward pass."""
    buffers = dict(model.module.named_buffers())
    sent = {id(buffer) for buffer in model.modules_buffers}
    names = [name for name, buffer in buffers.items() if id(buffer) in sent]
    assert len(names) == len(sent)
    return names, [buffers[name] for name in names]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo, the only backend for CPUs")
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def single():
    model = build()
    results = train(model, batch())
    return {**results, "frozen": frozen(model), "codes": codes(model)}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_losses_and_gradients_are_those_of_one_process(kind, ranks, single):
    for rank in ranks:
        torch.testing.assert_close(rank[kind]["losses"], single["losses"], rtol=1e-5, atol=1e-5)
        assert rank[kind]["grads"].keys() == single["grads"].keys()
        for name, grad in single["grads"].items():
            assert grad.norm() > 0
            # The two halves of the batch are summed in another order.
            torch.testing.assert_close(rank[kind]["grads"][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_frozen_weights_are_bit_equal_on_every_rank(kind, ranks, single):
    for rank in ranks:
        assert rank[kind]["frozen"].keys() == single["frozen"].keys()
        assert all(
            torch.equal(rank[kind]["frozen"][name], tensor)
            for name, tensor in single["frozen"].items()
        )


def test_trained_integers_are_bit_equal_on_both_ranks(ranks):
    one, two = (rank["ddp"]["codes"] for rank in ranks)
    assert len(one) == 14
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ddp_sends_no_integers(ranks):
    """They are parameters without gradient; only fingerprints, 8 bytes a layer, are buffers."""
    sent = ranks[0]["ddp"]["broadcast"]
    lrqat = {name: buffer for name, buffer in sent.items() if "layers." in name}
    assert all(".lrqat_fingerprint." in name for name in lrqat)
    assert sum(buffer.nbytes for buffer in lrqat.values()) == 8 * len(ranks[0]["ddp"]["codes"])


def test_fully_shard_shards_the_integers(ranks):
    packed = {
        name: value
        for name, value in ranks[0]["fsdp"]["sharded"].items()
        if name.endswith("base_layer.phi")
    }
    assert len(packed) == 14
    for dtype, local, shape in packed.values():
        assert dtype == torch.uint8
        assert local.numel() * WORLD_SIZE == shape.numel()


class Stop(transformers.TrainerCallback):
    """Stops after ``step`` steps, or lets a module put out NaN on rank 1 from then on."""

    def __init__(self, step, nan=False):
        self.step, self.nan = step, nan

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step and not self.nan:
            control.should_training_stop = True
        elif state.global_step == self.step and dist.get_rank() == 1:
            # Not in place: accelerate keeps the forward pass of the wrapped model.
            mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
            mlp.register_forward_hook(lambda module, inputs, output: output * float("nan"))


def make_trainer(folder, *callbacks):
    """With dropout, and four steps in an epoch."""
    ids = torch.randint(0, 96, (16, 10), generator=torch.Generator().manual_seed(1))
    steps = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return LRQATTrainer(
        model=build(attention_dropout=0.2),
        args=LRQATTrainingArguments(str(folder), **steps, **quiet),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=list(callbacks),
    )


def script(folder):
    """What each process of torchrun does."""
    found = {}
    for name, step in {"whole": None, "mid-epoch": 3, "epoch": 4}.items():
        trainer = make_trainer(folder / name, Stop(step))
        trainer.train()
        if step is not None:
            trainer = make_trainer(folder / name)
            torch.rand(3)
            trainer.train(resume_from_checkpoint=True)
        tensors = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        for index, values in trainer.optimizer.state_dict()["state"].items():
            tensors.update({f"{index}.{n}": value for n, value in values.items()})
        found[name] = tensors
    try:
        make_trainer(folder / "nan", Stop(2, nan=True)).train()
    except FloatingPointError as error:
        found["error"] = str(error)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """What each process found, and the folder of their runs."""
    if not dist.is_gloo_available():
        pytest.skip("this torch was built without gloo, the only backend for CPUs")
    folder = tmp_path_factory.mktemp("torchrun")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={WORLD_SIZE}",
        __file__,
        str(folder),
    ]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)], folder


def test_checkpoints_of_both_processes_are_whole(torchrun):
    _, folder = torchrun
    for run, last in {"whole": 6, "mid-epoch": 6, "epoch": 6, "nan": 2}.items():
        names = [f"checkpoint-{step}" for step in (last - 1, last)]
        assert sorted(path.name for path in (folder / run).iterdir()) == names
        for name in names:
            assert why_incomplete(folder / run / name) is None
            states = sorted(path.name for path in (folder / run / name).glob("rng_state*"))
            assert states == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.parametrize("name", ["mid-epoch", "epoch"])
def test_run_resumed_under_torchrun_is_uninterrupted(name, torchrun):
    found, _ = torchrun
    whole = found[0]["whole"]
    assert len(whole) == 4 * 3 * 14
    for rank in found:
        for run in (rank["whole"], rank[name]):
            assert run.keys() == whole.keys()
            assert [n for n, tensor in run.items() if not torch.equal(tensor, whole[n])] == []


def test_what_is_not_finite_in_one_process_stops_both(torchrun):
    found, folder = torchrun
    one, two = (rank["error"] for rank in found)
    assert one.startswith(
        "the gradient norm is nan at step 3; gradients that are not finite: `base_model."
    )
    assert two.startswith(
        "the loss is nan at step 3; the first module with an output that is not finite: "
    )
    assert ": `base_model.model.model.layers.0.mlp`. " in two
    assert all(
        f"the last checkpoint, {folder / 'nan' / 'checkpoint-2'}, is unchanged" in text
        for text in (one, two)
    )


if __name__ == "__main__":
    script(Path(sys.argv[1]))
