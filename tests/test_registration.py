"""The type LRQAT in PEFT's enum and tables, and what loaders say with and without the import."""

import copy
import json
import os
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_lrqat
from peft_lrqat import LRQATConfig, LRQATModel
from peft_lrqat.lrqat.card import describe_adapter
from peft_lrqat.registration import OWN_TYPES, register


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_base, make_config, disturb, batch_for):
    """A base model, an adapter that was trained on it, and the logits that both give together."""
    folder = tmp_path_factory.mktemp("saved")
    base = make_base("llama")
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = disturb(get_peft_model(base, make_config("llama")).eval())
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        torch.save(model(**batch_for("llama")).logits, folder / "logits.pt")
    torch.save(batch_for("llama"), folder / "batch.pt")
    (folder / "member.pkl").write_bytes(pickle.dumps(PeftType.LRQAT))
    (folder / "config.pkl").write_bytes(pickle.dumps(LRQATConfig(bits=3)))
    return folder


LOADERS = {
    "PeftConfig": "peft.PeftConfig.from_pretrained('adapter')",
    "PeftModel": "peft.PeftModel.from_pretrained("
    "transformers.AutoModelForCausalLM.from_pretrained('base'), 'adapter')",
    "AutoPeftModel": "peft.AutoPeftModelForCausalLM.from_pretrained('adapter')",
    "transformers": "transformers.AutoModelForCausalLM.from_pretrained('adapter')",
    "unpickled member": "pickle.load(open('member.pkl', 'rb'))",
}


def run_python(code, folder):
    """Runs ``code`` in a fresh interpreter, with ``folder`` as the working directory; what it
    prints last, as JSON.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(peft_lrqat.__file__)))
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without_import(saved):
    """The error of every loader in a process that never imports the plug-in."""
    return run_python(
        f"""
import json, pickle, peft, transformers
errors = {{}}
for name, call in {LOADERS!r}.items():
    try:
        eval(call)
    except Exception as error:
        errors[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(errors))
""",
        saved,
    )


@pytest.fixture(scope="module")
def with_import(saved):
    """What every loader gives where the plug-in was imported: the type, and whether the logits are
    those that were saved.
    """
    return run_python(
        f"""
import json, pickle, sys, peft, torch, transformers
# The class reference in the pickle imports the package.
config = pickle.load(open("config.pkl", "rb"))
results = {{"unpickled config": [config.bits, config.peft_type is peft.PeftType.LRQAT]}}
import peft_lrqat
for name, call in {LOADERS!r}.items():
    loaded = eval(call)
    equal = None
    if isinstance(loaded, torch.nn.Module):
        with torch.no_grad():
            logits = loaded.eval()(**torch.load("batch.pt")).logits
            equal = torch.equal(logits, torch.load("logits.pt"))
    results[name] = [type(loaded).__name__, equal]
members = list(peft.PeftType)
push_to_hub = peft.PeftModel.push_to_hub
for name in [n for n in sys.modules if n.split(".")[0] == "peft_lrqat"]:
    del sys.modules[name]
import peft_lrqat
results["pushes"] = [
    peft.PeftModel.push_to_hub is push_to_hub,
    peft.PeftType.LRQAT in peft_lrqat.registration.OWN_TYPES,
]
results["imported again"] = [
    list(peft.PeftType) == members,
    peft_lrqat.LRQATConfig().peft_type is peft.PeftType.LRQAT,
]
print(json.dumps(results))
""",
        saved,
    )


def test_member_is_a_full_member():
    member = PeftType.LRQAT
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert PeftType("LRQAT") is PeftType["LRQAT"] is PeftType.__members__["LRQAT"] is member
    assert member in list(PeftType)
    assert list(PeftType).count("LRQAT") == 1
    assert len(PeftType) == len(PeftType.__members__) == len(list(PeftType))
    assert (member.name, member.value) == ("LRQAT", "LRQAT")
    assert member == "LRQAT"
    assert hash(member) == hash("LRQAT")
    assert {"LRQAT": 1}[member] == 1
    assert "LRQAT" in PeftType._value2member_map_
    assert "LRQAT" in dir(PeftType)
    if sys.version_info >= (3, 12):
        assert "LRQAT" in PeftType  # earlier enums refuse the question


def test_member_looks_like_those_of_peft():
    lrqat, lora = PeftType.LRQAT, PeftType.LORA
    assert str(lrqat) == str(lora).replace("LORA", "LRQAT")
    assert repr(lrqat) == repr(lora).replace("LORA", "LRQAT")
    assert f"{lrqat}" == f"{lora}".replace("LORA", "LRQAT")
    assert set(vars(lrqat)) == set(vars(lora))
    assert list(PeftType)[lrqat._sort_order_] is lrqat


def test_other_names_are_still_refused():
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("LRQ")
    with pytest.raises(KeyError):
        PeftType["LRQ"]
    with pytest.raises(AttributeError):
        PeftType.LRQAT = "other"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_gives_the_same_member(protocol):
    assert pickle.loads(pickle.dumps(PeftType.LRQAT, protocol)) is PeftType.LRQAT
    config = LRQATConfig(bits=3)
    assert pickle.loads(pickle.dumps(config, protocol)) == config


def test_copies_and_json():
    assert copy.copy(PeftType.LRQAT) is copy.deepcopy(PeftType.LRQAT) is PeftType.LRQAT
    assert json.loads(json.dumps({"peft_type": PeftType.LRQAT})) == {"peft_type": "LRQAT"}


def test_registering_again_changes_nothing():
    def state():
        tables = dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
        return list(PeftType), *tables, set(OWN_TYPES), peft.PeftModel.push_to_hub

    before = state()
    register("lrqat", LRQATConfig, LRQATModel, describe_adapter)
    assert state() == before
    assert PeftType.LRQAT in OWN_TYPES


def test_importing_the_package_again_changes_nothing(with_import):
    assert with_import["imported again"] == [True, True]
    assert with_import["pushes"] == [True, True]


def test_tables_of_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LRQAT] is LRQATConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LRQAT"] is LRQATModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LRQAT] == LRQATModel.prefix == "lrqat_"
    assert isinstance(peft.get_peft_config({"peft_type": "LRQAT", "bits": 3}), LRQATConfig)
    assert isinstance(PeftConfig.from_peft_type(peft_type="LRQAT", r=2), LRQATConfig)


def test_types_of_peft_still_work(make_base, batch_for, tmp_path):
    assert all(PeftType(t.value) is t for t in PeftType)
    model = get_peft_model(
        make_base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    model(**batch_for()).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_base(), tmp_path)
    assert loaded.peft_config["default"].peft_type is PeftType.LORA
    assert "lrqat" not in (tmp_path / "README.md").read_text().lower()


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "unpickled member"])
def test_loading_needs_the_import(loader, without_import, with_import):
    """PEFT has no discovery of plug-ins: without the import every loader ends in a bare KeyError,
    with it each works.
    """
    assert without_import[loader] == "KeyError: 'LRQAT'"
    kind, logits_are_equal = with_import[loader]
    if loader == "PeftConfig":
        assert kind == "LRQATConfig"
    else:
        assert kind == ("LlamaForCausalLM" if loader == "transformers" else "PeftModelForCausalLM")
        assert logits_are_equal


def test_card_of_a_saved_adapter_names_the_import(saved):
    card = (saved / "adapter" / "README.md").read_text()
    assert "pip install peft-lrqat" in card
    assert "import peft_lrqat" in card
    assert "KeyError: 'LRQAT'" in card


def test_pickled_config_brings_the_type_with_it(without_import, with_import):
    """A bare member means nothing to a process without the plug-in; a config imports its package
    first.
    """
    assert without_import["unpickled member"] == "ValueError: 'LRQAT' is not a valid PeftType"
    assert with_import["unpickled member"] == ["PeftType", None]
    assert with_import["unpickled config"] == [3, True]
