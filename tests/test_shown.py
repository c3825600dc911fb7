"""The figures on the README's first screen are those of a run of the demo."""

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
