"""Runs notebooks from top to bottom, and stores them with their outputs.

    python benchmarks/run_notebooks.py notebooks/*.ipynb

What libraries say on stderr (progress bars, warnings that name directories) is left out.
"""

import argparse
import os
from typing import Any

import nbclient
import nbformat


def without_stderr(notebook: Any) -> Any:
    """The notebook without what went to stderr, and without the times of its cells."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for path in parser.parse_args().notebooks:
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()
        nbformat.write(without_stderr(notebook), path)
        print(path)


if __name__ == "__main__":
    main()
