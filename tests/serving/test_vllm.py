"""The plug-in for vLLM, with stand-ins for what it touches there."""

import asyncio
import json
import logging
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lrqat_vllm
from peft_lrqat import LoRAQuantConfig, quantize_adapter


GROUP = "vllm.general_plugins"


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRAResolver:
    pass


@pytest.fixture
def vllm(monkeypatch, tmp_path):
    """Stand-ins with the names of vLLM 0.32: the worker's module, and the registry."""
    names = ("", ".logger", ".lora", ".lora.request", ".lora.resolver", ".lora.worker_manager")
    made: dict[str, Any] = {name: ModuleType(f"vllm{name}") for name in names}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, f"vllm{name}", module)
    registry = {}
    registered: Any = ModuleType("registry")
    registered.register_resolver = registry.__setitem__
    made[".logger"].init_logger = logging.getLogger
    made[".lora.request"].LoRARequest = LoRARequest
    made[".lora.resolver"].LoRAResolver = LoRAResolver
    made[".lora.resolver"].LoRAResolverRegistry = registered
    worker = made[".lora"].worker_manager = made[".lora.worker_manager"]
    worker.get_adapter_absolute_path = lambda lora_path: lora_path
    monkeypatch.setenv("PEFT_LRQAT_UNPACKED", str(tmp_path / "unpacked"))
    lrqat_vllm.unpacked.cache_clear()
    yield worker, registry
    lrqat_vllm.unpacked.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_base):
    """A directory with a plain adapter and a packed one, trained on ``models/base``."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model = get_peft_model(
        make_base(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = "models/base"
    model.save_pretrained(folder / "team" / "plain")
    config = LoRAQuantConfig()
    quantize_adapter(folder / "team" / "plain", folder / "packed", config, progress=False)
    return folder


def resolve(registry, name, base="elsewhere/base"):
    return asyncio.run(registry["peft_lrqat"].resolve_lora(base, name))


def test_it_is_found_by_vllm():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"][GROUP].items()
    assert EntryPoint(name, value, GROUP).load() is lrqat_vllm.register


def test_workers_load_packed_adapters(vllm, folder, monkeypatch):
    worker, registry = vllm
    monkeypatch.delenv("PEFT_LRQAT_ADAPTERS", raising=False)
    lrqat_vllm.register()
    lrqat_vllm.register()  # once for each process, but a process may do it twice
    assert registry == {}
    plain = str(folder / "team" / "plain")
    assert worker.get_adapter_absolute_path(plain) == plain
    assert worker.get_adapter_absolute_path("/nowhere") == "/nowhere"
    found = worker.get_adapter_absolute_path(str(folder / "packed"))
    assert found.startswith(str(lrqat_vllm.unpacked().directory))
    assert lrqat_vllm.settings_of(lrqat_vllm.Path(found))["peft_type"] == "LORA"


def test_requests_name_adapters(vllm, folder, monkeypatch):
    _, registry = vllm
    monkeypatch.setenv("PEFT_LRQAT_ADAPTERS", str(folder))
    lrqat_vllm.register()
    for name in ("packed", "team/plain"):
        found = resolve(registry, name)
        assert found.lora_name == name
        assert found.lora_path == str(folder / name)
        assert found.lora_int_id > 0
    for name in ("missing", "", ".", "team", "../adapters/packed", str(folder / "packed")):
        assert resolve(registry, name) is None


def test_an_adapter_of_another_model_is_not_loaded(vllm, folder, monkeypatch, caplog):
    _, registry = vllm
    monkeypatch.setenv("PEFT_LRQAT_ADAPTERS", str(folder))
    lrqat_vllm.register()
    assert resolve(registry, "packed", "models/other") is None
    assert "packed was trained on models/base, but models/other is served" in caplog.text


def test_what_is_no_adapter_is_not_found(vllm, tmp_path, monkeypatch):
    _, registry = vllm
    monkeypatch.setenv("PEFT_LRQAT_ADAPTERS", str(tmp_path))
    lrqat_vllm.register()
    for name, text in (("list", "[]"), ("broken", "{"), ("other", '{"peft_type": "IA3"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
        assert resolve(registry, name) is None


def test_repositories_of_the_hub_that_are_allowed(vllm, folder, monkeypatch):
    import huggingface_hub

    _, registry = vllm
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder / "packed")

    monkeypatch.delenv("PEFT_LRQAT_ADAPTERS", raising=False)
    monkeypatch.setenv("PEFT_LRQAT_HUB_REPOS", "team/one,team/two")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    lrqat_vllm.register()
    assert resolve(registry, "team/two").lora_path == str(folder / "packed")
    assert resolve(registry, "team/three") is None
    assert asked == [("team/two", ["adapter_config.json", "adapter_model.safetensors"])]


def test_a_wrong_directory_is_refused(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_LRQAT_ADAPTERS", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="PEFT_LRQAT_ADAPTERS must be a directory, but is"):
        lrqat_vllm.register()


def test_the_package_is_not_imported_before_it_is_needed():
    code = "import sys, lrqat_vllm; print(sorted({'torch', 'peft_lrqat'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
