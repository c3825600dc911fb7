"""Writes the golden folders of this release: adapters and exports with what they must give.

    python tests/golden/make.py tests/golden/VERSION            # all of them
    python tests/golden/make.py tests/golden/VERSION --bases    # low-bit bases alone

Run it once per release, before anything about the files changes, and never again for that
release: later versions must read these folders and give the same integers and logits.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import peft_lrqat
from peft_lrqat import LowBitConfig, LRQATConfig, LRQATLayer, load_low_bit
from peft_lrqat.base.downcast import DowncastLinear
from peft_lrqat.export import export_model
from peft_lrqat.loraquant import LoRAQuantConfig, LoRAQuantLayer, quantize_adapter


LRQAT = {
    "lrqat-fixed8": {"bits": 4},
    "lrqat-fixed8-asymmetric-groups": {"bits": 3, "symmetric": False, "group_size": 8},
    "lrqat-int-groups": {
        "bits": 3,
        "downcast": "int",
        "group_size": 8,
        "range_estimator": "minmax",
    },
    "lrqat-int-asymmetric": {"bits": 2, "downcast": "int", "symmetric": False},
    "lrqat-patterns": {
        "bits": 4,
        "bits_pattern": {"down_proj": 8},
        "group_size_pattern": {"q_proj": 8},
        "scale_dtype": "float16",
    },
}
LORAQUANT = {
    "loraquant-residual": ({}, {"method": "residual", "bits_high": 3}),
    "loraquant-paper": ({}, {"method": "paper", "bits_high": 2}),
    "loraquant-dora": ({"use_dora": True}, {"method": "residual", "average_bits": 2.5}),
}
LOW_BIT = {
    "low-bit": {"bits": 4},
    "low-bit-asymmetric-groups": {"bits": 3, "symmetric": False, "group_size": 8},
    "low-bit-fixed8": {"bits": 2, "downcast": "fixed8", "scale_dtype": "float32"},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
INPUT_IDS = torch.arange(12).reshape(1, 12) * 5 % 32


def make_base() -> PreTrainedModel:
    """A Llama of 6,000 weights whose values do not depend on the machine."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def move_factors(model: PeftModel, spread: float) -> None:
    """Gives every trained tensor values that training might have reached; no rounding is near."""
    for name, parameter in model.named_parameters():
        if ".lrqat_scale." in name:
            parameter.mul_(1 + 0.05 * torch.rand_like(parameter))
        elif "lrqat_B" in name or "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter) * spread)
    for layer in model.modules():
        if isinstance(layer, LRQATLayer):
            w = layer.low_rank_weight("default")
            z = w.format.decode(w.phi).double() + w.gamma * w.B.double() @ w.A.double()
            assert ((z - z.floor() - 0.5).abs() > 1e-5).all(), (
                "another seed: an integer is in doubt"
            )


@torch.no_grad()
def expected(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The logits, and the integers of every layer."""
    found = {"logits": model(INPUT_IDS).logits.contiguous()}
    for name, layer in model.named_modules():
        if isinstance(layer, LRQATLayer):
            found[f"{name}.codes"] = layer.quantized_codes()
        elif isinstance(layer, DowncastLinear) and not name.endswith(".base_layer"):
            found[f"{name}.codes"] = layer.format.decode(layer.phi)
        elif isinstance(layer, LoRAQuantLayer):
            found[f"{name}.codes"] = layer.loraquant_codes["default"].contiguous()
    return found


def finish(folder: Path, model: torch.nn.Module) -> None:
    save_file(expected(model), folder / "expected.safetensors")
    (folder / "README.md").unlink(missing_ok=True)  # the card; it decides nothing


def write_bases(root: Path) -> None:
    """Low-bit bases of the plain one."""
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        make_base().save_pretrained(plain)
        for name, fields in LOW_BIT.items():
            model = load_low_bit(plain, LowBitConfig(target_modules=TARGETS, **fields)).eval()
            model.config.quantization_config.made_from = "base"
            model.save_pretrained(root / name)
            finish(root / name, model)


def main() -> None:
    root = Path(sys.argv[1])
    if root.name not in peft_lrqat.__version__:
        raise SystemExit(f"the library is {peft_lrqat.__version__}, so the folder cannot be {root}")
    write_bases(root)
    if "--bases" in sys.argv:
        return
    base = make_base()
    base.save_pretrained(root / "base")
    for name, fields in LRQAT.items():
        torch.manual_seed(1)
        config = LRQATConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=2, **fields)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        move_factors(model, 0.4)
        model.peft_config["default"].base_model_name_or_path = "base"
        model.save_pretrained(root / name)
        finish(root / name, model)
        if name == "lrqat-int-groups":
            quantize_adapter(
                root / name, root / "lrqat-packed-factors", LoRAQuantConfig(bits_high=3)
            )
            packed = PeftModel.from_pretrained(copy.deepcopy(base), root / "lrqat-packed-factors")
            finish(root / "lrqat-packed-factors", packed.eval())
        if name == "lrqat-int-asymmetric":
            export_model(model, root / "export-packed", format="packed")
            finish(root / "export-packed", model)
    for name, (lora, recipe) in LORAQUANT.items():
        torch.manual_seed(2)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, **lora)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        move_factors(model, 0.2)
        model.peft_config["default"].base_model_name_or_path = "base"
        quantize_adapter(model, root / name, LoRAQuantConfig(group_size=8, **recipe))
        finish(root / name, PeftModel.from_pretrained(copy.deepcopy(base), root / name).eval())


if __name__ == "__main__":
    main()
