"""Models run a block at a time give what they give as a whole."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat.calibration.replay import Replay


def batches_for(architecture):
    ids = torch.randint(3, 90, (2, 2, 9))
    made = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]
    made[1]["attention_mask"][0, 6:] = 0
    if architecture == "t5":
        for batch in made:
            batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    return made


def linears(model):
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def in_blocks(model):
    return [name for name in linears(model) if any(part.isdigit() for part in name.split("."))]


def check(model, batches):
    replay = Replay(model, batches, in_blocks(model))
    expected = {block.name: [] for block in replay.blocks}

    def record(name):
        def hook(module, args, output):
            expected[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [block.module.register_forward_hook(record(block.name)) for block in replay.blocks]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        for hook in hooks:
            hook.remove()
        stream = replay.stream()
        for number, block in enumerate(replay.blocks):
            outputs = [replay.run(number, i, stream) for i in range(len(batches))]
            for (hidden, _), whole in zip(outputs, expected[block.name], strict=True):
                assert torch.equal(hidden, whole), block.name
            replay.advance(number, stream, outputs)
    assert all("forward" not in vars(block.module) for block in replay.blocks)
    return replay


def test_every_architecture(architecture, make_base):
    replay = check(make_base(architecture), batches_for(architecture))
    assert len(replay.blocks) == (4 if architecture == "t5" else 2)


BIDIRECTIONAL = {
    "bert": transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=48, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mixtral": transformers.MixtralConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, num_local_experts=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_masks_of_each_layer_are_the_models_own(name):
    model = transformers.AutoModel.from_config(BIDIRECTIONAL[name]).eval()
    check(model, batches_for(name))


def test_an_encoder_for_images():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    check(model, [{"pixel_values": torch.randn(2, 3, 16, 16)}])


class Stack(nn.Module):
    """A model of two linear blocks; ``between`` comes after each."""

    def __init__(self, between=lambda x: x, order=(0, 1)):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.between, self.order = between, order

    def forward(self, x):
        for number in self.order:
            x = self.between(self.layers[number](x))
        return x


BATCHES = [{"x": torch.randn(2, 3, 8)}]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Stack(between=torch.relu), "changes the hidden states between two blocks"),
        (Stack(order=(0, 0, 1)), "runs twice"),
        (Stack(order=(1,)), r"`layers.0` does not run"),
        (nn.Sequential(nn.Linear(8, 8)), "no `nn.ModuleList` of blocks"),
    ],
    ids=["between", "twice", "never", "no blocks"],
)
def test_what_cannot_run_a_block_at_a_time_is_refused(model, message):
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    batches = BATCHES if isinstance(model, Stack) else [{"input": BATCHES[0]["x"]}]
    with pytest.raises(ValueError, match=message):
        Replay(model, batches, targets)
