"""Two processes on CPU (gloo): DDP and FSDP2's `fully_shard` train as one process does, and integers stay where they are."""

import os

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


WORLD_SIZE = 2
STEPS = 2


def build():
    """The same model in every process, with random factors, so that each gradient is far from zero."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    fields = {"target_modules": "all-linear", "r": 4, "downcast": "int", "group_size": 8, "init_weights": False}
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
                n.removeprefix("module."): whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad
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
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    try:
        model = DistributedDataParallel(build())
        ddp = train(model, batch(rank), mean)
        ddp["broadcast"] = {name: buffer.clone() for name, buffer in zip(*_broadcast(model), strict=True)}
        ddp["frozen"], ddp["codes"] = frozen(model), codes(model)

        model = build()
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
        sharded = {
            n: (p.dtype, p.to_local().shape, p.shape) for n, p in model.named_parameters() if isinstance(p, DTensor)
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
        assert all(torch.equal(rank[kind]["frozen"][name], tensor) for name, tensor in single["frozen"].items())


def test_trained_integers_are_bit_equal_on_both_ranks(ranks):
    one, two = (rank["ddp"]["codes"] for rank in ranks)
    assert len(one) == 14
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ddp_sends_no_integers(ranks):
    """They are parameters that need no gradient; only the fingerprints, 8 bytes a layer, are buffers."""
    sent = ranks[0]["ddp"]["broadcast"]
    lrqat = {name: buffer for name, buffer in sent.items() if "layers." in name}
    assert all(".lrqat_fingerprint." in name for name in lrqat)
    assert sum(buffer.nbytes for buffer in lrqat.values()) == 8 * len(ranks[0]["ddp"]["codes"])


def test_fully_shard_shards_the_integers(ranks):
    packed = {name: value for name, value in ranks[0]["fsdp"]["sharded"].items() if name.endswith("base_layer.phi")}
    assert len(packed) == 14
    for dtype, local, shape in packed.values():
        assert dtype == torch.uint8
        assert local.numel() * WORLD_SIZE == shape.numel()
