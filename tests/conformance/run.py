"""Runs PEFT's own test-suite on LR-QAT: ``python tests/conformance/run.py [--storage
lossless|int|fixed8] [pytest options]``.

The tests are those of the installed PEFT. Its source distribution is fetched with pip into
`.cache/conformance`, once; nothing of it is part of this repository. `plugin.py` puts LR-QAT in the
place of PEFT's types.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "conformance"


def fetch_tests(version: str) -> Path:
    """The unpacked source distribution of PEFT ``version``, whose `tests` is a package."""
    source = CACHE / f"peft-{version}"
    if not source.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")  # ruff reads it, too
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [
                "download",
                "--no-deps",
                "--no-binary",
                ":all:",
                "--no-build-isolation",
                "--dest",
                folder,
            ]
            subprocess.run([sys.executable, "-m", "pip", *command, f"peft=={version}"], check=True)
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            (unpacked,) = (path for path in Path(folder).iterdir() if path.is_dir())
            # The tests import one another relatively.
            (unpacked / "tests" / "__init__.py").touch()
            unpacked.rename(source)
    return source


def run(storage: str, source: Path, pytest_options: list[str]) -> int:
    """One pytest run; its exit code."""
    options = f"-p plugin --storage {storage} -o addopts= -o testpaths=tests -q".split()
    options.append("--disable-warnings")
    if importlib.util.find_spec("xdist"):
        options += ["-n", "2"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)]),
    }
    print(f"\nPEFT's tests on LR-QAT, storage {storage}", flush=True)
    command = [sys.executable, "-m", "pytest", *options, *pytest_options]
    return subprocess.run(command, cwd=source, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--storage",
        choices=["lossless", "int", "fixed8"],
        help="lossless: no rounding anywhere, so that a failure is an error of plumbing and not an "
        "effect of quantisation. Default: lossless, then int.",
    )
    arguments, pytest_options = parser.parse_known_args()
    source = fetch_tests(importlib.metadata.version("peft"))
    storages = [arguments.storage] if arguments.storage else ["lossless", "int"]
    failed = [storage for storage in storages if run(storage, source, pytest_options)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
