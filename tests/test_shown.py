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


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", ["quality_demo", "quality_small_batches"])
def test_the_tables_of_quality_are_the_runs(folder):
    quality = benchmark("quality")
    lines = quality.table_lines(quality.read_results(ROOT / "benchmarks" / "results" / folder))
    assert "\n".join(lines) in (ROOT / "docs" / "results.md").read_text()


def test_the_tables_of_other_tools_are_the_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    rivals = benchmark("rivals")
    lines = rivals.table_lines(rivals.read_results(ROOT / "benchmarks" / "results" / "rivals"))
    assert "\n".join(lines) in (ROOT / "docs" / "other-tools.md").read_text()
