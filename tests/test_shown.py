"""The figures of README and docs are those of the files of the runs."""

import importlib
import json
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def rows():
    return json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report")


def test_the_tables_are_the_runs(report):
    shown = set()
    for page in report.pages():
        text = page.read_text()
        assert report.filled(text) == text, f"run `python benchmarks/report.py`: {page.name}"
        shown |= {place[0] for place in report.PLACE.findall(text)}
        assert text.count("<!-- figures:") == text.count("<!-- end of figures -->")
    assert shown == report.TABLES.keys()


def test_another_figure_is_noticed(report):
    text = (ROOT / "README.md").read_text()
    first = re.search(r"\| (\d+\.\d\d) \|", text)
    other = text.replace(first[1], f"{float(first[1]) + 1:.2f}", 1)
    assert other != text
    assert report.filled(other) == text


def test_the_picture_is_the_runs(rows):
    drawn = re.findall(r">([\d.]+)</text>", (ROOT / "docs" / "images" / "demo.svg").read_text())
    assert {f"{row['perplexity']:.2f}" for row in rows} <= set(drawn)


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
