"""Speed of greedy generation: an LR-QAT model as it was trained, merged and unloaded, against the
model it was made from.

    python benchmarks/generation.py          # SmolLM2-135M, one request of 16 tokens, then 32 new
    ones: about 3 minutes on 2 cores

All models are in one process and answer in turn; medians, and ratios to the plain model. The
adapter's factors are random. "No weights held": ``model.base_model.set_cache_limit(0)``, so that
every token makes every weight anew.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from peft import get_peft_model
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import LRQATConfig
from peft_lrqat.demo.smollm2 import load_smollm2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    torch.manual_seed(0)
    plain, _ = load_smollm2(torch.bfloat16)
    config = LRQATConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", bits=4, init_weights=False
    )
    held = get_peft_model(copy.deepcopy(plain), config).eval()
    anew = copy.deepcopy(held)
    anew.base_model.set_cache_limit(0)
    merged = copy.deepcopy(held)
    merged.merge_adapter()
    unloaded = copy.deepcopy(held).merge_and_unload()
    models = {
        "plain": plain.eval(),
        "weights held": held,
        "no weights held": anew,
        "merged": merged,
        "unloaded": unloaded,
    }
    ids = torch.arange(100, 116)[None]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    texts = {}
    for round_ in range(args.rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            texts[name] = model.generate(
                input_ids=ids,
                do_sample=False,
                max_new_tokens=args.tokens,
                min_new_tokens=args.tokens,
            )
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    low_bit = [text for name, text in texts.items() if name != "plain"]
    if not all(torch.equal(text, low_bit[0]) for text in low_bit):
        raise SystemExit("the low-bit models disagree")
    print(f"{torch.get_num_threads()} threads, {args.tokens} tokens, median of {args.rounds}")
    reference = statistics.median(seconds["plain"])
    for name, found in seconds.items():
        median = statistics.median(found)
        print(
            f"{name:16} {args.tokens / median:6.1f} tokens/s, {median / reference:5.2f} times the "
            "plain model's time"
        )
    print(f"held: {held.base_model._cache.bytes / 2**20:.0f} MiB of weights")


if __name__ == "__main__":
    main()
