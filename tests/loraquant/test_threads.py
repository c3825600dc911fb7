"""Requests in threads, each with adapters of its own, while others are added and deleted."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_lrqat.loraquant import LoRAQuantConfig, quantize_adapter
from peft_lrqat.loraquant.layer import LoRAQuantLayer


# The load test of a server: 10,000 requests take some minutes.
REQUESTS = int(os.environ.get("THREAD_REQUESTS", "300"))
ADAPTERS, THREADS = 6, 8


@pytest.fixture(scope="module")
def folders(make_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        lora = LoraConfig(
            task_type="SEQ_CLS",
            target_modules=["q_proj", "down_proj"],
            r=4,
            init_lora_weights=False,
        )
        model = get_peft_model(make_base("classifier"), lora)
        torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
        model.save_pretrained(path / f"lora-{number}")
        config = LoRAQuantConfig(group_size=16)
        quantize_adapter(path / f"lora-{number}", path / str(number), config, progress=False)
    return [path / str(number) for number in range(ADAPTERS)]


def test_every_answer_is_the_one_computed_alone(folders, make_base):
    model = PeftModel.from_pretrained(make_base("classifier"), folders[0], "0").eval()
    for number in range(1, ADAPTERS):
        model.load_adapter(folders[number], str(number))
    # A cache that cannot hold all adapters, so that factors come and go.
    model.base_model.set_cache_limit(40_000)
    cache = next(m for m in model.modules() if isinstance(m, LoRAQuantLayer))._cache
    generator = torch.Generator().manual_seed(0)
    requests = []
    for _ in range(REQUESTS):
        ids = torch.randint(3, 96, (3, 6), generator=generator)
        names = [str(int(n)) for n in torch.randint(ADAPTERS, (3,), generator=generator)]
        names[0] = "__base__" if names[0] == "0" else names[0]
        requests.append((ids, names))

    def answer(request):
        ids, names = request
        with torch.no_grad():
            return model(input_ids=ids, adapter_names=names).logits

    wanted = [answer(request) for request in requests]
    done = threading.Event()
    failures = []

    def come_and_go():
        number = 0
        while not done.is_set():
            try:
                model.load_adapter(folders[number % ADAPTERS], "guest")
                model.delete_adapter("guest")
            except Exception as error:
                failures.append(error)
                return
            number += 1

    guest = threading.Thread(target=come_and_go)
    guest.start()
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(answer, requests))
    finally:
        done.set()
        guest.join()
    assert not failures
    # Nothing that depends on chance: the same operations on the same numbers.
    assert all(map(torch.equal, found, wanted))
    assert cache.bytes <= 40_000
