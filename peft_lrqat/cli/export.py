"""`lrqat export`: a trained model in the format of a runtime."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftModel
from transformers import PreTrainedModel

from peft_lrqat.export import export_model, verify_export
from peft_lrqat.formats.table import FORMATS
from peft_lrqat.lrqat.low_bit import is_low_bit
from peft_lrqat.shared.staging import check_target, directory_bytes
from peft_lrqat.trainer.pipeline import load_adapter, load_model
from peft_lrqat.trainer.tokenizers import (
    has_tokenizer,
    load_generation_config,
    load_tokenizer,
)

from .options import JsonOptions, ModelOptions
from .parser import Parser, print_table


@dataclass(kw_only=True)
class ExportArguments(ModelOptions, JsonOptions):
    """Which model is exported, and how."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "LR-QAT adapter: a directory or a name on the Hub. Without it, --model is a "
            "low-bit base, whose own integers are exported"
        },
    )
    output: str = field(
        metadata={"help": "new directory for the model; one with files in it is refused"}
    )
    format: str = field(
        default="compressed-tensors",
        metadata={
            "choices": list(FORMATS),
            "help": "compressed-tensors: for vLLM and transformers. gguf: for llama.cpp. gptq: for "
            "servers that read GPTQ. gemma: for transformers, packed in memory. packed: for "
            "`peft_lrqat.load_quantized`. dequantized: plain weights. `lrqat recipe` helps to "
            "choose before training",
        },
    )
    max_shard_size: str = field(
        default="5GB", metadata={"help": "largest size of a file with tensors"}
    )
    container_bits: int | None = field(
        default=None,
        metadata={
            "help": "store integers at this width: 3 bits as 4, for a runtime that reads only those"
        },
    )
    activations: Literal["write", "ignore"] = field(
        default="write",
        metadata={
            "help": "for an adapter with activation_bits or kv_cache_bits. write: they are part of "
            "the export, or it is refused; ignore: the export holds the weights alone"
        },
    )
    embeddings: Literal["low-bit", "plain"] = field(
        default="low-bit",
        metadata={
            "help": "for a model with embedding_bits. plain: its embedding and output layer are "
            "written as 16-bit weights of the same values, for formats that hold no low-bit ones"
        },
    )
    verify: bool = field(
        default=False,
        metadata={
            "help": "load the export, compare every tensor, the logits and a rendered chat, and "
            "fail if one differs"
        },
    )


def run_export(argv: Sequence[str]) -> int:
    """`lrqat export`."""
    parser = Parser(
        "export",
        "(--adapter ADAPTER | --model BASE) --output DIRECTORY [options]",
        [ExportArguments],
        "Writes a trained LR-QAT model in a format that a runtime loads: the integers and scales\n"
        "of training, every weight unchanged. Tokenizer, chat template and generation config come\n"
        "from the adapter's folder if they are there, otherwise from the base model.",
        "  lrqat export --adapter lrqat-4bit --output model-ct --verify\n"
        "  lrqat export --adapter lrqat-4bit --output model-gguf --format gguf\n"
        "  lrqat export --model model-4bit --output model-packed --format packed",
    )
    (args,) = parser.parse(argv)
    with parser.user_errors():
        check_target(args.output)
        model: Any = _load(args)
        base = model.get_base_model() if args.adapter else model
        folder = args.adapter or base.config.name_or_path
        tokenizer = None
        places: dict[str, str] = {}
        if has_tokenizer(folder) or has_tokenizer(base.config.name_or_path):
            tokenizer, places = load_tokenizer(folder, base.config.name_or_path)
        if base.can_generate():
            places["generation config"] = base.config.name_or_path
            if (generation := load_generation_config(folder)) is not None:
                base.generation_config = generation
                places["generation config"] = folder
        for what, place in places.items():
            print(f"{what} from {place}", file=sys.stderr)
        export_model(
            model,
            args.output,
            format=args.format,
            tokenizer=tokenizer,
            max_shard_size=args.max_shard_size,
            container_bits=args.container_bits,
            activations=args.activations,
            embeddings=args.embeddings,
        )
    if not args.verify:
        size = directory_bytes(args.output)
        result = vars(args) | {"sources": places, "bytes": size}
        print(json.dumps(result) if args.json else f"{size:,} bytes in {args.output}")
        return 0
    found = verify_export(model, args.output, format=args.format)
    if args.json:
        checked = dataclasses.asdict(found) | {"exact": found.exact}
        print(json.dumps(vars(args) | {"sources": places} | checked))
        return 0 if found.exact else 1
    logits = "not run" if found.logits_difference is None else f"{found.logits_difference:.3g}"
    print_table(
        {
            "loaded by": found.loader,
            "layers whose weights differ": f"{len(found.different_layers)} of {found.layers}",
            "other tensors that differ": f"{len(found.different_tensors)}",
            "tensors missing, unexpected or newly made": f"{len(found.keys)}",
            "largest difference of a logit": logits,
            "bytes": f"{found.bytes:,}",
        }
    )
    for problem in (*found.keys, *found.problems):
        print(problem)
    weights_differ = found.different_layers or found.different_tensors or found.keys
    if weights_differ:
        print("the export is NOT what was trained")
    else:
        print("every weight is what was trained" + ("" if found.exact else ", but see above"))
    return 0 if found.exact else 1


def _load(args: ExportArguments) -> PreTrainedModel | PeftModel:
    """The adapter on its base model, or a low-bit base alone."""
    if args.adapter is not None:
        return load_adapter(args.adapter, args.model, args.dtype)
    if args.model is None:
        raise ValueError("give --adapter, or --model with a low-bit base")
    model = load_model(args.model, args.dtype)
    if not is_low_bit(model):
        raise ValueError(
            f"{args.model} is no low-bit base, so there are no integers to export; give --adapter, "
            "or make a base with `lrqat prepare`"
        )
    return model.eval()
