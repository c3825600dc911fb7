"""Digests of saved adapters: they are checked by every loader, and show damage and edits."""

import json
import shutil

import pytest
import torch
from damage import CASES, damaged
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_lrqat import __version__, sign_adapter
from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, quantize_adapter
from peft_lrqat.shared import integrity


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(make_base, make_config, disturb, tmp_path_factory):
    """A saved adapter of each type, packed factors included."""
    path = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model = disturb(get_peft_model(make_base(), make_config(target_modules=["q_proj"], bits=3)))
    model.save_pretrained(path / "lrqat")
    recipe = LoRAQuantConfig(average_bits=4, group_size=16)
    quantize_adapter(path / "lrqat", path / "packed", recipe, progress=False)
    lora = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    get_peft_model(make_base(), lora).save_pretrained(path / "lora")
    quantize_adapter(path / "lora", path / "loraquant", recipe, progress=False)
    return path


@pytest.fixture(params=["lrqat", "packed", "loraquant"])
def saved(request, folders, tmp_path):
    return shutil.copytree(folders / request.param, tmp_path / "adapter")


def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def rewrite(folder, change):
    """Other tensors under the digests of before."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def signature(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()[integrity.ENTRY])


def test_what_is_saved_is_signed_and_names_the_release(saved, make_base):
    written = signature(saved)
    assert written["library"] == __version__
    assert len(written["tensors"]) == 8 * len(load_file(saved / WEIGHTS))
    PeftModel.from_pretrained(make_base(), saved)


def swap(tensors):
    """Two tensors of one shape change places."""
    by_shape = {}
    for name, tensor in tensors.items():
        by_shape.setdefault((tensor.shape, tensor.dtype), []).append(name)
    groups = [names for names in by_shape.values() if len(names) > 1]
    one, other = max(groups, key=lambda names: tensors[names[0]].numel())[:2]
    tensors[one], tensors[other] = tensors[other], tensors[one]


def flip(tensors):
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1).view(torch.uint8)[3] ^= 1


@pytest.mark.parametrize("change", [swap, flip])
def test_other_tensors_are_refused_until_signed(change, saved, make_base):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"is not what was saved .* the file is damaged"):
        PeftModel.from_pretrained(make_base(), saved)
    sign_adapter(saved)
    PeftModel.from_pretrained(make_base(), saved)


@pytest.mark.parametrize("loader", ["peft", "transformers", "conversion"])
def test_edited_settings_are_refused_by_every_loader_until_signed(
    loader, folders, make_base, tmp_path
):
    source = shutil.copytree(folders / "packed", tmp_path / "adapter")
    edit(source, lora_alpha=7)

    def load():
        if loader == "peft":
            PeftModel.from_pretrained(make_base(), source)
        elif loader == "transformers":
            make_base().load_adapter(str(shutil.copytree(folders / "lrqat", tmp_path / "plain")))
            edit(tmp_path / "plain", lora_alpha=7)
            make_base().load_adapter(str(tmp_path / "plain"))
        else:
            dequantize_adapter(source, tmp_path / "out")

    with pytest.raises(ValueError, match=r"settings beside .*sign_adapter"):
        load()
    sign_adapter(source)
    if loader != "transformers":
        load()


def test_a_base_under_another_name_is_a_word_and_no_refusal(saved, make_base, caplog):
    edit(saved, base_model_name_or_path="someone/else")
    PeftModel.from_pretrained(make_base(), saved)
    assert "were changed after it was saved; they do not decide the result" in caplog.text


def test_an_adapter_that_transformers_saves_is_signed(make_base, make_config, disturb, tmp_path):
    """Over an earlier adapter in the same folder, too, whose digests are of other tensors."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make_base()
        model.add_adapter(make_config(target_modules=["q_proj"]))
        disturb(model)
        model.save_pretrained(tmp_path)
        assert len(signature(tmp_path)["tensors"]) == 8 * len(load_file(tmp_path / WEIGHTS))
        make_base().load_adapter(str(tmp_path))
    rewrite(tmp_path, flip)
    with pytest.raises(ValueError, match="the file is damaged"):
        make_base().load_adapter(str(tmp_path))


def test_files_without_digests_load_with_a_notice(saved, make_base, caplog):
    save_file(load_file(saved / WEIGHTS), saved / WEIGHTS, metadata={"format": "pt"})
    PeftModel.from_pretrained(make_base(), saved)
    assert "has no digests" in caplog.text


def test_saving_a_config_again_keeps_the_digests_of_tensors(saved, make_base):
    """Damage in between is not signed."""
    before = signature(saved)["tensors"]
    rewrite(saved, flip)
    PeftConfig.from_pretrained(saved).save_pretrained(saved)
    assert signature(saved)["tensors"] == before
    with pytest.raises(ValueError, match="the file is damaged"):
        PeftModel.from_pretrained(make_base(), saved)


def test_digests_cover_names_dtypes_and_shapes():
    data = [b"12345678"]
    digests = {
        integrity.tensor_digest(name, dtype, shape, data)
        for name, dtype, shape in [
            ("a", "F32", [2]),
            ("b", "F32", [2]),
            ("a", "I32", [2]),
            ("a", "F32", [1, 2]),
        ]
    }
    assert len(digests) == 4
    assert {len(digest) for digest in digests} == {integrity.SIZE}
    parts = [b"1234", b"5678"]
    assert integrity.tensor_digest("a", "F32", [2], parts) in digests


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("kind", ["lrqat", "packed", "loraquant"])
def test_no_damage_is_silent(kind, name, folders, make_base, logits_of, tmp_path, caplog):
    """Damage by chance is refused with a ValueError, or harmless, or gets a warning."""
    base = make_base()
    wanted = logits_of(PeftModel.from_pretrained(make_base(), folders / kind).eval())
    folder = shutil.copytree(folders / kind, tmp_path / "adapter")
    whole = (folder / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for case in range(CASES):
        (folder / name).write_bytes(damaged(whole, generator))
        caplog.clear()
        before = dict(base.state_dict())
        try:
            model = PeftModel.from_pretrained(base, folder).eval()
        except ValueError as error:
            refused += 1
            message = str(error)
        else:
            message = None
        if message is not None:
            assert str(folder) in message, (case, message)
            assert base.state_dict().keys() == before.keys(), case
            continue
        assert caplog.text or torch.equal(logits_of(model), wanted), case
        base = make_base()
    assert refused > 0.9 * CASES
