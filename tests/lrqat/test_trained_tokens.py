"""`trainable_token_indices`: rows of an embedding are trained, saved, merged and exported."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_lrqat import LowBitConfig, LRQATConfig
from peft_lrqat.trainer import parameter_groups


TOKENS = [3, 5, 90]
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"


def train(model, batch):
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, scale_lr=1e-3))
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained(make_peft, batch_for):
    """``trained(architecture, dtype)``: a model whose trained tokens have moved."""

    def make(architecture="llama", dtype=torch.float32):
        model = make_peft(architecture, dtype, trainable_token_indices=TOKENS)
        train(model, batch_for())
        return model

    return make


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt2", "opt"])
def test_trained_saved_and_merged(
    architecture, dtype, trained, make_base, batch_for, logits_of, tmp_path
):
    model = trained(architecture, dtype)
    embedding = model.get_base_model().get_input_embeddings()
    (delta,) = embedding.token_adapter.trainable_tokens_delta.values()
    assert delta.dtype == torch.float32
    seen = [token for token in TOKENS if (batch_for()["input_ids"] == token).any()]
    moved = (delta - embedding.original_module.weight[TOKENS]).abs().amax(1) > 1e-4
    assert all(moved[TOKENS.index(token)] for token in seen)
    assert seen
    before = logits_of(model)
    model.save_pretrained(tmp_path)
    base = make_base(architecture, dtype)
    plain = base.get_input_embeddings().weight.clone()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits_of(loaded), before)
    merged = loaded.merge_and_unload()
    assert torch.equal(logits_of(merged), before)
    rows = merged.get_input_embeddings().weight
    assert torch.equal(rows[TOKENS], delta.to(dtype))
    others = [row for row in range(len(rows)) if row not in TOKENS]
    assert torch.equal(rows[others], plain[others])
    if merged.config.tie_word_embeddings:
        assert merged.get_output_embeddings().weight is rows


def test_on_a_low_bit_base(make_base, make_config, batch_for, logits_of, tmp_path):
    make_base().save_pretrained(tmp_path / "plain")
    low = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=LowBitConfig(bits=4)
    )
    low.save_pretrained(tmp_path / "low")
    model = get_peft_model(low, make_config(trainable_token_indices=TOKENS))
    train(model, batch_for())
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (rows,) = (value for name, value in saved.items() if name.endswith(DELTA))
    assert not torch.equal(rows, make_base().model.embed_tokens.weight[TOKENS])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "low")
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded), logits_of(model.eval()))


def test_taken_over_from_lora():
    lora = LoraConfig(trainable_token_indices={"embed_tokens": [1]}, target_modules=["q_proj"])
    assert LRQATConfig.from_lora(lora).trainable_token_indices == {"embed_tokens": [1]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": []}, "must be a list of token ids"),
        ({"trainable_token_indices": 3}, "must be a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "must be a list of token ids"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ({"trainable_token_indices": [True]}, "trainable_token_indices"),
        ({"trainable_token_indices": [3, 3]}, "names a token twice"),
        ({"trainable_token_indices": [3], "embedding_bits": 8}, "set `train_embeddings=True`"),
        (
            {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]},
            "which `modules_to_save` trains in full",
        ),
        ({"trainable_token_indices": [96]}, "has 96, but `model.embed_tokens` has 96 rows; call"),
        ({"trainable_token_indices": {"layers.0.mlp.up_proj": [3]}}, "holds low-bit integers, or"),
    ],
)
def test_refused_before_anything_is_replaced(fields, message, make_base, make_config, logits_of):
    base = make_base()
    before = logits_of(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, make_config(**fields))
    assert torch.equal(logits_of(base), before)


@pytest.mark.parametrize(
    ("tokens", "refused"),
    [
        ({"lm_head": [3]}, True),
        ({"lm_head": [3], "embed_tokens": [4]}, True),
        ({"lm_head": [3], "embed_tokens": [3]}, False),
        ({"embed_tokens": [3]}, False),
    ],
)
def test_tied_ends_train_the_same_tokens(tokens, refused, make_base, make_config):
    """PEFT would merge the tokens of both into the one weight."""
    config = make_config("qwen2", trainable_token_indices=tokens)
    if refused:
        with pytest.raises(ValueError, match=r"shares its weight .* give a list of tokens"):
            get_peft_model(make_base("qwen2"), config)
    else:
        get_peft_model(make_base("qwen2"), config)
    get_peft_model(make_base("llama"), make_config(trainable_token_indices=tokens))  # not tied


def test_a_second_adapter_has_tokens_of_its_own(trained, make_config, logits_of):
    model = trained()
    before = logits_of(model)
    model.add_adapter("second", make_config(trainable_token_indices=[7]))
    assert torch.equal(logits_of(model), before)
    model.set_adapter("second")
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits_of(model), before)


def test_rows_that_are_not_finite_are_refused(trained, make_base, tmp_path):
    trained().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith(DELTA))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"`.*{DELTA}.*` has NaN or infinite entries"):
        PeftModel.from_pretrained(make_base(), tmp_path)
