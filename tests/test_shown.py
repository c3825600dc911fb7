"""The figures on the README's first screen are those of a run of the demo."""

import importlib
import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
NAMES = {  # in the table of the README
    "unquantised, float32": "unquantised",
    "training the scales only": "scales only",
    "calibrated, not trained": "calibrated",
    "**LR-QAT** on the calibrated base": "LR-QAT",
    "**LR-QAT**": "LR-QAT",
}


@pytest.fixture
def rows():
    return json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())


def test_the_table_is_the_runs(rows):
    text = (ROOT / "README.md").read_text().partition("| unquantised, float32")
    lines = (text[1] + text[2].partition("\n\n")[0]).splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        method, bits, perplexity, training, deployed = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        assert NAMES.get(method, method) == row["method"]
        assert bits == str(row["bits"] or "")
        assert perplexity.strip("*") == f"{row['perplexity']:.2f}"
        assert training in ("", f"{row['training_bytes'] or 0:,}")
        assert deployed == f"{row['deployed_bytes']:,}"


def test_the_picture_is_the_runs(rows):
    drawn = re.findall(r">([\d.]+)</text>", (ROOT / "docs" / "images" / "demo.svg").read_text())
    assert {f"{row['perplexity']:.2f}" for row in rows} <= set(drawn)


def test_the_table_of_runtimes_is_the_runs():
    found = json.loads((ROOT / "benchmarks" / "results" / "runtimes.json").read_text())
    text = (ROOT / "docs" / "deploy.md").read_text()
    for row in found:
        told = "refused: no kernel for it | |"
        if "refused" not in row:
            told = f"{'the same' if row['same_first'] else 'another'} | {row['furthest']:.3f} |"
        else:
            assert row["refused"].startswith("Failed to find a kernel")
        cells = " | ".join(row[name] for name in ("runtime", "weights", "format"))
        assert f"| {cells} | {told}\n" in text
    assert {row["runtime"] for row in found} == {"vllm", "llama.cpp", "transformers"}


def test_the_figures_of_served_adapters_are_the_runs():
    found = json.loads((ROOT / "benchmarks" / "results" / "vllm_adapters.json").read_text())
    text = (ROOT / "docs" / "serving.md").read_text()
    seconds = {
        name: f"{s['median']:.2f} s" for name, s in found["seconds to the first token"].items()
    }
    plain = found["adapters"] * found["bytes as LoRA in float16"] / 1e9
    packed = found["bytes of the archive"] / 1e9
    for line in (
        f"| the archive on disk | {packed:.2f} GB | {plain:.2f} GB |",
        f"| first token, asked for the first time | {seconds['cold']} | {seconds['LoRA, cold']} |",
        f"| first token, unpacked before, but not in vLLM | {seconds['again']} | |",
        f"| first token, in vLLM | {seconds['warm']} | {seconds['warm']} |",
    ):
        assert line in text
    grown = found["resident after"] - found["resident before"]
    assert f"over 200 adapters | {grown / 1e6:.0f} MB |" in text
    assert found["largest bytes unpacked"] <= found["bound of bytes unpacked"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/, which imports others from there."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def shown(page, name):
    """What stands between the lines that name some figures and end them."""
    text = (ROOT / "docs" / page).read_text()
    _, begin, rest = text.partition(f"<!-- figures: {name} -->\n")
    found, end, _ = rest.partition("<!-- end of figures -->")
    assert begin, f"no figures of {name} in {page}"
    assert end
    return found.strip().splitlines()


def found_in(folder):
    files = sorted((ROOT / "benchmarks" / "results" / folder).glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("folder", ["quality_demo", "quality_small_batches"])
def test_the_tables_of_quality_are_the_runs(script, folder):
    assert shown("results.md", folder) == script("quality").table_lines(found_in(folder))


def test_the_shares_of_the_gap_are_the_runs(script):
    lines = script("quality").gap_lines(found_in("quality_demo"))
    assert shown("results.md", "quality_demo, gap") == lines


def test_the_costs_are_the_runs(script):
    assert shown("results.md", "costs") == script("costs").table_lines(found_in("costs"))


def test_the_tables_of_ablations_are_the_runs(script):
    ablations, rows = script("ablations"), found_in("ablations")
    for name in ablations.ABLATIONS:
        lines = ablations.table_lines([row for row in rows if row["ablation"] == name])
        assert shown("ablations.md", f"ablations, {name}") == lines
