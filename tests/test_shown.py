"""The figures on the README's first screen are those of a run of the demo."""

import importlib.util
import json
import re
import sys
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


@pytest.mark.parametrize("folder", ["quality_demo", "quality_small_batches"])
def test_the_tables_of_quality_are_the_runs(folder):
    results = ROOT / "benchmarks" / "results" / folder
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    quality = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = quality  # its dataclasses look for their module
    spec.loader.exec_module(quality)
    lines = quality.table_lines(quality.read_results(results))
    assert "\n".join(lines) in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("name", ["loraquant", "loraquant_error"])
def test_the_tables_of_packed_adapters_are_the_runs(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module(name)
    lines = benchmark.table_lines(benchmark.read_results(ROOT / "benchmarks" / "results" / name))
    block = "\n".join([f"<!-- figures: {name} -->", "", *lines, "", "<!-- end of figures -->"])
    assert block in (ROOT / "docs" / "results-adapters.md").read_text()


# Errors of the public code of LoRAQuant, refined, on the same spectra.
PUBLIC = {
    ("0.6^k", "published 2@0.8"): 0.62,
    ("0.8^k", "published 2@0.9"): 0.53,
    ("0.8^k", "published 3@0.8"): 0.45,
    ("0.9^k", "published 2@0.9"): 0.54,
}


def test_the_published_method_is_as_strong_as_its_public_code():
    results = ROOT / "benchmarks" / "results" / "loraquant_error"
    found = {
        (one["spectrum"], row["row"]): row["error"]
        for one in map(json.loads, (file.read_text() for file in results.glob("geometric-*.json")))
        for row in one["rows"]
    }
    assert all(found[case] <= error for case, error in PUBLIC.items())
