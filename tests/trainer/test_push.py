"""The trainer and the command line publish to a stand-in hub, and their adapters load from it."""

import json

import pytest
from hub_server import StandInHub, run_client


PREPARE = """
import json, torch, transformers
from peft import PeftModel, get_peft_model
from peft_lrqat import LRQATConfig
from peft_lrqat.trainer import LRQATTrainer, LRQATTrainingArguments

def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = transformers.LlamaConfig(vocab_size=96, **sizes, **special)
    return transformers.LlamaForCausalLM(config)

def digest(model):
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model.eval()(ids).logits.double().sum().item().hex()

def trainer(**options):
    config = LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, bits=3)
    model = get_peft_model(base(), config)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 96, (8, 10))]
    args = LRQATTrainingArguments(
        "out", per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        push_to_hub=True, **options
    )
    return LRQATTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4])
"""
LOAD = """
model = PeftModel.from_pretrained(base(), "user/NAME")
print(digest(model))
"""


@pytest.fixture(scope="module")
def hub():
    with StandInHub() as hub:
        yield hub


def test_trainer_pushes_at_the_end(hub, tmp_path):
    code = """
options = dict(hub_model_id="user/end", hub_strategy="end", eval_strategy="steps", eval_steps=3)
t = trainer(max_steps=3, save_steps=2, **options)
t.train()
metrics = t.evaluate()
t.push_to_hub()
print(json.dumps({"digest": digest(t.model), "eval_loss": metrics["eval_loss"]}))
"""
    done = json.loads(run_client(hub, PREPARE + code, tmp_path).splitlines()[-1])
    files = hub.repos["user/end"].files
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "training_args.bin",
    } <= files.keys()
    assert not any("checkpoint" in name or "_incomplete" in name for name in files)
    card = files["README.md"].decode()
    # Ours, over the Trainer's own: import line, bits, recipe and metrics.
    assert "library_name: peft" in card
    assert "import peft_lrqat  # registers" in card
    assert "- weights: 3 bits" in card
    assert "Trained for 3 steps." in card
    assert "| scale_learning_rate | 0.0001 |" in card
    assert f"| eval_loss | {done['eval_loss']} |" in card
    assert "base_model:" not in card
    loaded = run_client(hub, PREPARE + LOAD.replace("NAME", "end"), tmp_path).splitlines()[-1]
    assert loaded == done["digest"]
    assert hub.unknown == []


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_trainer_pushes_while_training(strategy, hub, tmp_path):
    """Uploads run in the background while checkpoints take their places and older ones go."""
    options = (
        f'hub_model_id="user/{strategy}", hub_strategy="{strategy}", hub_always_push=True, '
        "save_steps=2, max_steps=4"
    )
    code = f"""
t = trainer({options})
t.train()
print(digest(t.model))
"""
    digest = run_client(hub, PREPARE + code, tmp_path).splitlines()[-1]
    files = hub.repos[f"user/{strategy}"].files
    assert "import peft_lrqat  # registers" in files["README.md"].decode()
    folders = {
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-2", "checkpoint-4"},
    }
    assert {name.split("/")[0] for name in files if "checkpoint" in name} == folders[strategy]
    for folder in folders[strategy]:
        names = {name.removeprefix(f"{folder}/") for name in files if name.startswith(f"{folder}/")}
        assert {
            "adapter_model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
        } <= names
    assert (
        run_client(hub, PREPARE + LOAD.replace("NAME", strategy), tmp_path).splitlines()[-1]
        == digest
    )


def test_command_line_pushes(hub, tmp_path):
    code = """
from peft_lrqat.cli import main
from peft_lrqat.demo import model_path
open("text.txt", "w").write("The quick brown fox jumps over the lazy dog. " * 60)
code = main(
    f"train --model {model_path()} --dataset text.txt --eval_dataset text.txt --block_size 32 "
    "--bits 3 --max_steps 2 --output_dir out --report_to none --push_to_hub "
    "--hub_model_id user/cli --disable_tqdm true".split()
)
assert code == 0
from safetensors.torch import load_file
from huggingface_hub import hf_hub_download
ours = load_file("out/adapter_model.safetensors")
theirs = load_file(hf_hub_download("user/cli", "adapter_model.safetensors"))
assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
base = transformers.AutoModelForCausalLM.from_pretrained(model_path())
PeftModel.from_pretrained(base, "user/cli")
"""
    run_client(hub, PREPARE + code, tmp_path)
    card = hub.repos["user/cli"].files["README.md"].decode()
    assert "| eval_perplexity | " in card
    assert "tokenizer.json" in hub.repos["user/cli"].files
    assert hub.unknown == []
