"""What `import peft_lrqat` offers, and what it leaves for later."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import peft_lrqat
from peft_lrqat import trainer


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peft_lrqat" / "__init__.py"


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package in (peft_lrqat, trainer) for name in package.__all__],
)
def test_every_name_is_there(package, name):
    assert getattr(package, name) is not None
    assert name in dir(package)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'LRQATTrianer'"):
        _ = peft_lrqat.LRQATTrianer


@pytest.mark.parametrize("package", [peft_lrqat, trainer], ids=["peft_lrqat", "trainer"])
def test_type_checkers_see_the_same_names(package):
    source = Path(package.__file__).read_text()
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imported = {
        alias.name: "." + node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported.keys() == package._LAZY.keys()


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
        # A plan takes as long as it takes to import PEFT.
        "import peft_lrqat.cli.plan\n"
        "loaded = (set(sys.modules) - before) & {'datasets', 'evaluate', 'transformers.trainer'}\n"
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
