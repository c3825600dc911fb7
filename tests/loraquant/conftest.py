"""Makes packed adapters from random components, without the conversion, and their LoRA twins."""

import pytest
import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_lrqat.loraquant import LoRAQuantConfig
from peft_lrqat.quant.factors.storage import pack_components
from peft_lrqat.quant.grid import SCALE_DTYPES


def expanded(components, rows, columns):
    """Returns B (m, K) and A (K, n) by the definition of the codes."""
    if not components:
        return torch.zeros(rows, 0), torch.zeros(0, columns)
    b, a = (torch.cat([pair[side].values() for pair in components]) for side in (0, 1))
    return b.T.contiguous(), a


def shape_of(module):
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    return module.out_features, module.in_features


@pytest.fixture(scope="session")
def make_adapter(make_components):
    """Makes the state and config of a packed adapter, and those of its twin in LoRA.

    ``make_adapter(base, bits, targets, **fields)``; ``bits`` is one string for all targets, or a
    list that is used in turn.
    """

    def make(base, bits, targets, **fields):
        config = LoRAQuantConfig(target_modules=targets, group_size=7, **fields)
        recipe = {
            "group_size": 7,
            "scale_dtype": SCALE_DTYPES[config.scale_dtype],
            "zero_points": config.zero_points,
        }
        modules = {n: m for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in targets}
        choices = [bits] if isinstance(bits, str) else bits
        state, twin, ranks, alphas = {}, {}, {}, {}
        for i, (name, module) in enumerate(modules.items()):
            rows, columns = shape_of(module)
            components = make_components(choices[i % len(choices)], rows, columns, **recipe)
            format, tensors = pack_components(components, rows=rows, columns=columns, **recipe)
            config.component_bits[name] = format.bits
            B, A = expanded(components, rows, columns)
            # LoRA has no rank 0.
            ranks[name] = max(1, len(A))
            alphas[name] = config.scaling_of(name) * ranks[name]
            if not components:
                B, A = torch.zeros(rows, 1), torch.zeros(1, columns)
            key = f"base_model.model.{name}"
            state |= {f"{key}.loraquant_{kind}": tensor for kind, tensor in tensors.items()}
            embedding = isinstance(module, nn.Embedding)
            names = (
                ("lora_embedding_B", "lora_embedding_A")
                if embedding
                else ("lora_B.weight", "lora_A.weight")
            )
            twin |= {f"{key}.{n}": t for n, t in zip(names, (B, A))}
            if config.use_dora:
                magnitude = torch.rand(rows) + 0.5
                state[f"{key}.loraquant_magnitude"] = twin[f"{key}.lora_magnitude_vector"] = (
                    magnitude
                )
        shared = {"target_modules": targets, "use_dora": config.use_dora, "bias": config.bias}
        shared |= {"modules_to_save": config.modules_to_save, "task_type": config.task_type}
        shared |= {"trainable_token_indices": config.trainable_token_indices}
        # Full names, so that no pattern matches another module.
        patterns = {"rank_pattern": exactly(ranks), "alpha_pattern": exactly(alphas)}
        lora = LoraConfig(**shared, **patterns, inference_mode=True)
        return config, state, lora, twin

    return make


def exactly(by_name):
    return {f"^{name}": value for name, value in by_name.items()}


@pytest.fixture(scope="session")
def write_adapter(make_adapter):
    """Writes ``folder/packed`` and ``folder/lora``, as PEFT saves adapters.

    ``write_adapter(folder, base, bits, targets, **fields)``
    """

    def write(folder, base, bits, targets=("q_proj", "v_proj", "down_proj"), extra=None, **fields):
        fields = {"task_type": TaskType.CAUSAL_LM, **fields}
        config, state, lora, twin = make_adapter(base, bits, list(targets), **fields)
        for name, kind, tensors in (("packed", config, state), ("lora", lora, twin)):
            (folder / name).mkdir(parents=True)
            tensors = {k: t.contiguous() for k, t in {**tensors, **(extra or {})}.items()}
            save_file(
                tensors, folder / name / "adapter_model.safetensors", metadata={"format": "pt"}
            )
            kind.save_pretrained(str(folder / name))
        return folder / "packed", folder / "lora"

    return write
