"""LR-QAT adapters with packed factors: the stored adapter runs, and nothing else changes.

Changed integers are counted.
"""

import json
import shutil

import pytest
import torch
from hub_server import StandInHub, run_client
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from peft_lrqat import LRQATConfig, LRQATLayer, push_folder_to_hub
from peft_lrqat.loraquant import LoRAQuantConfig, dequantize_adapter, quantize_adapter
from peft_lrqat.quant.factors.storage import PackedFormat, expand


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RECIPES = {
    "residual": LoRAQuantConfig(average_bits=3.0, group_size=7),
    "paper": LoRAQuantConfig(method="paper", bits_high=3, ratio=0.8, group_size=7),
    "hardly-anything": LoRAQuantConfig(average_bits=0.1, group_size=7),
}


@pytest.fixture
def model(make_peft, disturb):
    model = make_peft("llama")
    disturb(model)
    return model.eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def quantize(source, target, recipe=RECIPES["residual"], **options):
    return quantize_adapter(source, target, recipe, progress=False, **options)


def codes_of(model, name="default"):
    layers = model.named_modules()
    return {n: layer.quantized_codes(name) for n, layer in layers if isinstance(layer, LRQATLayer)}


def share_of_different(first, second):
    different = sum(int((first[name] != second[name]).sum()) for name in first)
    return different / sum(codes.numel() for codes in first.values())


def edited(folder, target, change):
    """Copies an adapter's folder and applies ``change(state, config)``."""
    shutil.copytree(folder, target)
    state, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    change(state, config)
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_factors_that_run_are_those_that_are_stored(recipe, folder, make_base, tmp_path):
    made = quantize(folder, tmp_path / "packed", RECIPES[recipe])
    state, plain = load_file(tmp_path / "packed" / WEIGHTS), load_file(folder / WEIGHTS)
    model = PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "packed"))
    fields = made.packed_factors
    assert set(fields["component_bits"]) == {key[17:-8] for key in plain if key.endswith("lrqat_A")}
    for name, bits in fields["component_bits"].items():
        key, layer = f"base_model.model.{name}", model.get_submodule(f"base_model.model.{name}")
        rows, columns = layer.out_features, layer.in_features
        format = PackedFormat(
            bits=bits,
            rows=rows,
            columns=columns,
            group_size=7,
            scale_dtype=torch.bfloat16,
            zero_points=recipe == "paper",
        )
        kinds = ("codes", "scales", "zero_points")
        stored = {kind: state[k] for kind in kinds if (k := f"{key}.loraquant_{kind}") in state}
        B, A = expand(format, stored, torch.float32)
        assert torch.equal(layer.lrqat_A["default"][: len(A)], A)
        assert torch.equal(layer.lrqat_B["default"][:, : len(A)], B)
        assert not layer.lrqat_A["default"][len(A) :].any()
        assert layer.lrqat_A["default"].dtype == torch.float32
        # All tensors that are not factors are unchanged, down to the last bit.
        assert torch.equal(layer.lrqat_scale["default"], plain[f"{key}.lrqat_scale"])
        assert torch.equal(layer.lrqat_fingerprint["default"], plain[f"{key}.lrqat_fingerprint"])
    assert not any("lrqat_A" in key or "lrqat_B" in key for key in state)


def test_flipped_integers_are_counted_as_they_are_loaded(model, make_base, tmp_path):
    made = quantize(model, tmp_path / "packed")
    packed = PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "packed"))
    flipped = share_of_different(codes_of(model), codes_of(packed))
    assert 0 < flipped < 1
    assert made.packed_factors["report"]["flipped_integers"] == pytest.approx(flipped, abs=1e-6)


def test_more_bits_flip_fewer_integers(model, tmp_path):
    flipped = [
        quantize(
            model, tmp_path / f"{bits}", LoRAQuantConfig(average_bits=bits, group_size=16)
        ).packed_factors["report"]["flipped_integers"]
        for bits in (1.5, 3.0, 6.0)
    ]
    assert flipped[0] > flipped[1] > flipped[2] > 0


def test_saved_again_it_is_a_plain_adapter(folder, make_base, logits_of, tmp_path):
    quantize(folder, tmp_path / "packed")
    model = PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "packed"))
    assert model.peft_config["default"].packed_factors is None
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "again"))
    assert torch.equal(logits_of(again), logits_of(model))


def test_it_can_be_trained_further(folder, make_base, tmp_path, batch_for):
    quantize(folder, tmp_path / "packed")
    model = PeftModel.from_pretrained(
        make_base("llama"), str(tmp_path / "packed"), is_trainable=True
    )
    batch = batch_for()
    model(**batch).loss.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all()
        for p in model.parameters()
        if p.requires_grad
    )
    assert any("lrqat_B" in name for name, p in model.named_parameters() if p.requires_grad)


def test_dequantised_it_has_the_same_integers(folder, make_base, tmp_path):
    quantize(folder, tmp_path / "packed")
    config = dequantize_adapter(tmp_path / "packed", tmp_path / "plain-again")
    assert isinstance(config, LRQATConfig)
    assert config.packed_factors is None
    models = [
        PeftModel.from_pretrained(make_base("llama"), str(tmp_path / n))
        for n in ("packed", "plain-again")
    ]
    assert share_of_different(*map(codes_of, models)) == 0
    with pytest.raises(
        ValueError, match=r"must be float32 .*its integers change, but is torch\.float16"
    ):
        dequantize_adapter(tmp_path / "packed", tmp_path / "half", dtype=torch.float16)


def test_it_lies_beside_others_on_one_base(folder, make_base, logits_of, tmp_path):
    quantize(folder, tmp_path / "packed")
    alone = logits_of(PeftModel.from_pretrained(make_base("llama"), str(tmp_path / "packed")))
    model = PeftModel.from_pretrained(make_base("llama"), str(folder))
    model.load_adapter(str(tmp_path / "packed"), "packed")
    model.set_adapter("packed")
    assert torch.equal(logits_of(model), alone)


def test_another_base_is_refused(folder, make_base, tmp_path):
    quantize(folder, tmp_path / "packed")
    base = make_base("llama")
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(
        ValueError, match="not the base model that the adapter was trained on: 1 of 14 layers"
    ):
        PeftModel.from_pretrained(base, str(tmp_path / "packed"))


def test_a_loader_that_does_not_unpack_leaves_nothing_that_runs(
    folder, make_base, batch_for, tmp_path
):
    quantize(folder, tmp_path / "packed")
    config = PeftConfig.from_pretrained(str(tmp_path / "packed"))
    model = inject_adapter_in_model(config, make_base("llama"))
    with pytest.raises(ValueError, match="trained on another base model"):
        model(**batch_for())


def test_the_card_and_the_config_have_the_report(model, tmp_path):
    made = quantize(model, tmp_path / "packed")
    saved = json.loads((tmp_path / "packed" / CONFIG).read_text())
    assert saved["packed_factors"] == made.packed_factors
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "packed" in card
    assert str(made.packed_factors["report"]["flipped_integers"]) in card


def drop(kind):
    def change(state, config):
        del state[next(key for key in state if key.endswith(kind))]

    return change


def damage(kind, value):
    def change(state, config):
        key = next(key for key in state if key.endswith(kind))
        state[key] = state[key].clone()
        state[key][0] = value

    return change


def field(name, value):
    def change(state, config):
        config["packed_factors"][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("loraquant_codes"), "the codes are missing. Its files are not whole"),
        (drop("loraquant_scales"), "the scales are missing"),
        (drop("loraquant_fingerprint"), "the fingerprint of the base weight is missing"),
        (drop("lrqat_scale"), "has no `lrqat_scale`"),
        (damage("loraquant_scales", torch.nan), "scales must be finite"),
        (field("group_size", 8), "the scales must be"),
        (field("group_size", 0), "does not describe packed factors"),
        (field("shapes", {}), "does not describe packed factors"),
        (field("component_bits", {}), "which adapter_config.json does not name"),
        (field("scale_dtype", "float8"), "does not describe packed factors"),
        (lambda state, config: config.update(packed_factors=None), "has no `lrqat_A`"),
        (
            lambda state, config: config.update(packed_factors="yes"),
            "`packed_factors` must be None or a dict",
        ),
        (lambda state, config: config.update(r=1), "components, but the rank is 1"),
    ],
)
def test_damaged_files_are_refused(change, message, folder, make_base, tmp_path):
    quantize(folder, tmp_path / "packed")
    damaged = edited(tmp_path / "packed", tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(make_base("llama"), str(damaged))


def test_what_cannot_be_quantised(folder, tmp_path):
    quantize(folder, tmp_path / "packed")
    cases = [
        (tmp_path / "packed", "packed already; quantise the original adapter instead"),
        (
            edited(folder, tmp_path / "lacks", drop("lrqat_A")),
            "needs lrqat_A, lrqat_B and lrqat_scale, but not all are there",
        ),
        (
            edited(folder, tmp_path / "nan", damage("lrqat_B", torch.nan)),
            "has NaN or infinite entries; nothing was written",
        ),
        (
            edited(folder, tmp_path / "rank", lambda state, config: config.update(r=3)),
            "which do not form a product of rank 3",
        ),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            quantize(source, tmp_path / "target")
        assert not (tmp_path / "target").exists()


PUSH = """
from huggingface_hub import HfApi
from peft import PeftConfig
from peft_lrqat import push_folder_to_hub

push_folder_to_hub("packed", "user/packed", tags=["mine"])
card = HfApi().hf_hub_download("user/packed", "README.md")
text = open(card).read().replace("## LR-QAT adapter", "## Old section") + "\\n## My evaluation\\n"
HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="user/packed")
push_folder_to_hub("packed", "user/packed", commit_message="second push")
print(sorted(PeftConfig.from_pretrained("user/packed").packed_factors))
"""


def test_a_folder_is_published_and_what_a_person_wrote_stays(folder, tmp_path):
    quantize(folder, tmp_path / "packed")
    before = {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    with StandInHub() as hub:
        out = run_client(hub, PUSH, tmp_path)
        files = hub.repos["user/packed"].files
    assert "component_bits" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == before
    assert all(files[name] == before[name] for name in (WEIGHTS, CONFIG))
    card = files["README.md"].decode()
    assert (
        card.count("## My evaluation")
        == card.count("## LR-QAT adapter")
        == card.count("- mine\n")
        == 1
    )
    assert "Old section" not in card


def test_a_folder_of_another_type_is_not_published(tmp_path):
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    with pytest.raises(
        ValueError, match="holds an adapter of type LORA, which PEFT itself can publish"
    ):
        push_folder_to_hub(tmp_path, "user/lora")
