"""What each training of `quality.py` costs: trained parameters, bytes shipped, memory and time.

    python benchmarks/costs.py run
    python benchmarks/costs.py table

Parameters and bytes are those of the demo's model. It is too small for the rest: the peak and the
time of a step are those of a random Llama in bfloat16, by the same trainings, each in a process of
its own, at 4 bits: the frozen weight takes one byte, and a step does nearly the same, at any bits.
The peak is that of the resident set above the imports, after the first step (Linux); the time is
the processor time of a step, as a ratio to LoRA's in the same run. Of several processes of a row,
the least peak counts, since what else a process holds varies, and the median time. Each row writes
one JSON file; rows that have theirs are passed over.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablations import base_options
from datasets import Dataset
from memory import random_llama
from process import MB, forget_peak, in_own_process, resident
from quality import (
    TRAININGS,
    UNQUANTISED,
    Place,
    Run,
    find_bases,
    find_place,
    started,
)
from records import read_results, write_result
from torch import nn
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from peft_lrqat import deployed_weight_bytes
from peft_lrqat.demo.run import linear_bytes


SETTINGS = ("W4", "W3", "W2")
MEASURED = ("scales", "lrqat", "predictions", "full")
LORA = (UNQUANTISED, "lora")
ON_A_LLAMA = (UNQUANTISED, "W4")
ROWS = (LORA, *((setting, training) for setting in SETTINGS for training in MEASURED))


class Watch(TrainerCallback):
    """Counts trained parameters, and the memory and processor time of the steps after the first."""

    def __init__(self) -> None:
        self.trained = 0
        self.peak = 0
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:  # the first one makes the optimizer's state and workspaces
            forget_peak()
        self._begin = time.process_time()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if state.global_step > 1:
            self.seconds.append(time.process_time() - self._begin)
            self.peak = resident("VmHWM")


def make_run(setting: str, training: str, model: str, text: str) -> Run:
    start = "none" if setting == UNQUANTISED else "nearest"
    return Run(model=model, text=text, setting=setting, start=start, training=training, seed=0)


def train(place: Place, run: Run) -> Watch:
    """Some steps of a training, watched."""
    watch = Watch()
    place = replace(place, callbacks=(watch,))
    model = place.plain(run) if run.setting == UNQUANTISED else started(place, run)[0]
    TRAININGS[run.training](place, run, model)
    return watch


def on_the_demo(place: Place, run: Run) -> dict[str, int]:
    """Trained parameters and bytes of the linear weights that ship, LoRA's merged in 16 bits."""
    if run.setting == UNQUANTISED:
        model = place.plain(run)
        shipped = linear_bytes(model) * 2 // model.dtype.itemsize
    else:
        shipped = deployed_weight_bytes(started(place, run)[0])
    return {"trained": train(place, run).trained, "shipped": shipped}


def on_a_llama(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Peak and processor time of a step, in this process."""
    start, place = resident(), llama_place(args)
    with tempfile.TemporaryDirectory() as folder:
        place.args.work = folder  # for a teacher's cache that is made in each process
        watch = train(place, run)
    return {"peak": watch.peak - start, "seconds": watch.seconds}


def llama_place(args: argparse.Namespace) -> Place:
    """The random Llama and random tokens in the place of model and text."""
    options = base_options("--work", args.work)
    vars(options).update(dtype="bfloat16", batch_size=1, window=args.tokens, steps=args.steps)
    options.model = str(Path(args.work) / f"llama-{args.hidden}-{args.layers}")
    if not (folder := Path(options.model)).exists():
        random_llama(args.hidden, args.layers).save_pretrained(folder)
    tokens = torch.randint(0, 4096, (args.steps, args.tokens), generator=torch.Generator())
    blocks = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    return Place(
        model=folder,
        text="random",
        train_blocks=blocks,
        heldout=torch.empty(0, dtype=torch.long),
        chosen_by=torch.empty(0, dtype=torch.long),
        tokenizer=None,
        args=options,
        bases=find_bases(options, "random"),
    )


def run_all(args: argparse.Namespace) -> None:
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    options = base_options("--work", args.work)
    options.steps = 1
    demo, llama = find_place(options), llama_place(args)
    lora: dict[str, Any] | None = None
    for setting, training in ROWS:
        file = results / f"{setting}-{training}.json"
        if file.exists() or setting not in (UNQUANTISED, *args.settings):
            continue
        there = None
        if setting in ON_A_LLAMA:
            if setting != UNQUANTISED:  # not in the process that is measured
                started(llama, make_run(setting, training, "llama", "random"))
            lora = lora or _in_own_process(args, *LORA)  # of this run
            of_lora = (setting, training) == LORA
            there = lora if of_lora else _in_own_process(args, setting, training)
        written = {
            "setting": setting,
            "training": training,
            "seed": 0,
            "demo": on_the_demo(demo, make_run(setting, training, "tiny", "topics")),
            "llama": there,
            "lora": there and lora,
            "hidden": args.hidden,
            "layers": args.layers,
            "tokens": args.tokens,
            "steps": args.steps,
            "repeats": args.repeats,
            "rank": options.rank,
            "threads": torch.get_num_threads(),
        }
        write_result(file, written)


def _in_own_process(args: argparse.Namespace, setting: str, training: str) -> dict[str, Any]:
    """Bytes and processor seconds of a step."""
    found = [
        in_own_process(__file__, *sys.argv[1:], "--child", setting, training)
        for _ in range(args.repeats)
    ]
    return {
        "peak": min(one["peak"] for one in found),
        "seconds": statistics.median(s for one in found for s in one["seconds"]),
    }


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table in Markdown."""
    lines = [
        "| setting | training | trained parameters | bytes shipped | peak of a step, MB "
        "| time of a step, LoRA = 1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: ROWS.index((row["setting"], row["training"]))):
        cells = [row["setting"], row["training"]]
        cells += [f"{row['demo'][name]:,}" for name in ("trained", "shipped")]
        if row["llama"] is None:
            cells += ["-", "-"]
        else:
            ratio = row["llama"]["seconds"] / row["lora"]["seconds"]
            cells += [f"{row['llama']['peak'] / MB:,.0f}", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--hidden", type=int, default=1024, help="of the Llama")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2, help="processes of a row")
    parser.add_argument("--tokens", type=int, default=256, help="in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", default="quality-benchmark", help="for bases")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results" / "costs"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    if args.child:
        setting, training = args.child
        print(json.dumps(on_a_llama(args, make_run(setting, training, "llama", "random"))))
    elif args.action == "run":
        run_all(args)
    else:
        print("\n".join(table_lines(read_results(Path(args.results)))))


if __name__ == "__main__":
    main()
