"""What `import peft_lrqat` offers, and what it leaves for later."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_lrqat


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peft_lrqat" / "__init__.py"


@pytest.mark.parametrize("name", peft_lrqat.__all__)
def test_every_name_is_there(name):
    assert getattr(peft_lrqat, name) is not None
    assert name in dir(peft_lrqat)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'LRQATTrianer'"):
        _ = peft_lrqat.LRQATTrianer


def test_type_checkers_see_the_same_names():
    (block,) = [node for node in ast.parse(PACKAGE.read_text()).body if isinstance(node, ast.If)]
    imported = {
        alias.name: "." + node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported.keys() == peft_lrqat._LAZY.keys()


def test_the_import_leaves_training_export_and_data_for_later():
    later = [
        "datasets",
        "evaluate",
        "compressed_tensors",
        "gguf",
        "peft_lrqat.cli",
        "peft_lrqat.demo",
        "peft_lrqat.export",
        "peft_lrqat.formats",
        "peft_lrqat.trainer",
        "peft_lrqat.activations.cache",
        "peft_lrqat.loraquant.convert",
    ]
    code = (
        "import sys, peft, transformers\n"
        "before = set(sys.modules)\n"
        "import peft_lrqat\n"
        f"loaded = (set(sys.modules) - before) & set({later})\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
