"""Does distillation from the unquantised model lower perplexity at equal tokens?

    python benchmarks/distillation.py                           # demo model, 2 and 3 bits
    python benchmarks/distillation.py --model smollm2 --bits 3  # SmolLM2-135M

The first takes about 6 minutes on 2 idle cores, the second about 6 minutes per row. Every row
trains from the same adapter on the same batches; only the loss differs. Perplexity is that of
held-out help topics.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat.demo.run import SETUPS, DemoArguments, prepare
from peft_lrqat.trainer import LRQATTrainingArguments
from peft_lrqat.trainer.pipeline import load_base, make_trainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SETUPS), default="tiny")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="distillation_weight"
    )
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[1.0], help="distillation_temperature"
    )
    parser.add_argument("--steps", type=int, help="default: as in the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs=2,
        help="of the factors and of the scales; default: as in the demo",
    )
    parser.add_argument(
        "--factor_max_grad_norm", type=float, default=0.01, help="as in LRQATTrainingArguments"
    )
    parser.add_argument(
        "--output",
        default="distillation-benchmark",
        help="directory for the base model and the results",
    )
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()

    for seed in args.seeds:
        demo = prepare(
            DemoArguments(model=args.model, steps=args.steps, output=args.output, seed=seed)
        )
        rates = args.learning_rates or (demo.setup.learning_rate, demo.setup.scale_learning_rate)
        base, _ = load_base(str(demo.base), demo.setup.dtype)
        print(
            f"{args.model}, seed {seed}, unquantised: perplexity {demo.perplexity(base):.3f}",
            flush=True,
        )
        for bits in args.bits:
            for weight in args.weights:
                for temperature in args.temperatures if weight else args.temperatures[:1]:
                    row = one_run(
                        demo, bits, weight, temperature, rates, seed, args.factor_max_grad_norm
                    )
                    print(json.dumps(row), flush=True)
                    with open(Path(args.output) / "results.jsonl", "a") as file:
                        file.write(json.dumps({"model": args.model, **row}) + "\n")


def one_run(demo, bits, weight, temperature, rates, seed, factor_max_grad_norm) -> dict[str, float]:
    model = demo.adapted(bits, group_size=-1, balanced=False)
    options = LRQATTrainingArguments(
        output_dir=str(demo.output),
        max_steps=demo.steps,
        per_device_train_batch_size=demo.setup.batch_size,
        learning_rate=rates[0],
        scale_learning_rate=rates[1],
        factor_max_grad_norm=factor_max_grad_norm,
        distillation_weight=weight,
        distillation_temperature=temperature,
        seed=seed,
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        report_to=[],
    )
    trainer = make_trainer(model, demo.tokenizer, options, demo.train_set)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return {
        "bits": bits,
        "weight": weight,
        "temperature": temperature,
        "learning_rates": rates,
        "factor_max_grad_norm": factor_max_grad_norm,
        "seed": seed,
        "steps": demo.steps,
        "tokens": demo.steps * demo.setup.batch_size * demo.setup.window,
        "perplexity": round(demo.perplexity(model), 4),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
