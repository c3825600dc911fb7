"""ARC-Easy and PIQA before and after, from local files: what `lrqat eval --tasks` says.

    python benchmarks/zero_shot.py run --data DIR --models plain=MODEL "W3, LR-QAT=my-3bit" ...
    python benchmarks/zero_shot.py table

A model is whatever `lrqat eval` opens: a model, a low-bit base, an adapter, an export. DIR holds
``arc_easy_train.jsonl`` (fields ``instruction`` and ``answer``, as the LLM-Adapters project has it)
and ``piqa_valid.jsonl`` (``goal``, ``sol1``, ``sol2``, ``label``). The questions are asked as
lm-eval's tasks of these names ask them. Each model leaves one JSON file in --results; those that
have theirs are passed over.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from records import read_results, write_result


RESULTS = Path(__file__).parent / "results" / "zero_shot"
QUESTION = re.compile(r"question: (.*?)\n\n(Answer1: .*?)\n\nAnswer format", re.DOTALL)
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def arc(record: dict[str, Any]) -> dict[str, Any]:
    found = QUESTION.search(record["instruction"])
    assert found is not None, record
    choices = re.split(r"\s*Answer\d: ", found[2])[1:]
    answer = int(record["answer"].removeprefix("answer")) - 1
    return {"question": found[1], "choices": choices, "answer": answer}


def piqa(record: dict[str, Any]) -> dict[str, Any]:
    choices = [record["sol1"], record["sol2"]]
    return {"question": record["goal"], "choices": choices, "answer": record["label"]}


SOURCES = {"arc_easy": ("arc_easy_train.jsonl", arc), "piqa": ("piqa_valid.jsonl", piqa)}


def write_tasks(data: Path, folder: Path) -> None:
    """Task files of lm-eval and their questions."""
    for name, (file, convert) in SOURCES.items():
        records = [json.loads(line) for line in (data / file).read_text().splitlines()]
        lines = [json.dumps(convert(record)) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        task = TASK.format(name=name, file=folder / f"{name}.jsonl")
        (folder / f"{name}.yaml").write_text(task)


def run(args: argparse.Namespace) -> None:
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(args.data), Path(folder))
        for model in args.models:
            name, _, path = model.partition("=")
            file = results / f"{re.sub('[^a-zA-Z0-9]+', '-', name)}.json"
            if file.exists():
                continue
            command = [sys.executable, "-m", "peft_lrqat", "eval", path, "--json"]
            command += ["--tasks", *SOURCES, "--task_path", folder, "--limit", str(args.limit)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            given = json.loads(done.stdout)
            kept = {key: given[key] for key in ("kind", "tasks", "num_fewshot", "limit", "dtype")}
            found = {"model": name, "found": kept}
            write_result(file, found)


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy in per cent, with its standard error, by task."""
    lines = ["| | " + " | ".join(SOURCES) + " |", "|---|" + "---|" * len(SOURCES)]

    def place(row: dict[str, Any]) -> tuple[bool, str]:
        return not row["model"].startswith("unquantised"), row["model"]

    for row in sorted(rows, key=place):
        scores = [row["found"]["tasks"][name]["metrics"]["acc"] for name in SOURCES]
        cells = [f"{100 * s['value']:.1f} ± {100 * s['standard_error']:.1f}" for s in scores]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--data")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--results", default=str(RESULTS))
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    else:
        print("\n".join(table_lines(read_results(Path(args.results)))))


if __name__ == "__main__":
    main()
