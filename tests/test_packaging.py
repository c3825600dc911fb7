"""The package list of setup.cfg against the tree, and what an installed copy holds."""

import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {"peft_lrqat", "trainer"}


def modules_of_the_tree() -> set[str]:
    """Every module below the two source folders as it is imported, the link left out."""
    found = set()
    for top in TOP_LEVEL:
        for path in (ROOT / top).rglob("*.py"):
            if top == "peft_lrqat" and path.relative_to(ROOT / top).parts[0] == "trainer":
                continue
            found.add(path.relative_to(ROOT).as_posix())
    return {name if name.startswith("peft_lrqat/") else f"peft_lrqat/{name}" for name in found}


# The console script and the plug-in for vLLM, which import the package only when it is needed.
ALONE = {"lrqat_command.py", "lrqat_vllm.py"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_listed_packages_are_those_of_the_tree():
    listed = set(setup_cfg()["options"]["packages"].split())
    assert listed == {
        Path(module).parent.as_posix().replace("/", ".") for module in modules_of_the_tree()
    }


def test_trainer_is_a_link_and_imports_from_the_top_level():
    link = ROOT / "peft_lrqat" / "trainer"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "trainer"
    import peft_lrqat.trainer

    assert Path(peft_lrqat.trainer.__file__).resolve() == ROOT / "trainer" / "__init__.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A wheel and a source archive, built from a copy of the tracked files."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, tracked):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    for kind in ("wheel", "sdist"):  # a process each, as pip does it
        code = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
        subprocess.run(
            [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, check=True
        )
    return out


def test_the_wheel_holds_every_module_once_and_the_demo_model(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {n for n in names if n.endswith(".py")} == modules_of_the_tree() | ALONE
    assert "peft_lrqat/py.typed" in names
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        Path(n).name for n in names if n.startswith("peft_lrqat/demo/model/")
    }
    assert not any(n.startswith("trainer/") for n in names)


def test_the_wheel_imports_without_the_tree(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import peft_lrqat, peft_lrqat.trainer as t; print(peft_lrqat.__file__, t.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(Path(name).is_relative_to(tmp_path) for name in result.stdout.split())


def test_the_source_archive_builds_the_same_wheel(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    code = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=source, capture_output=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    (original,) = built.glob("*.whl")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(original).namelist())
