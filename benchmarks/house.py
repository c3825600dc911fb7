"""Figures of the code itself: rooms, imports that go up, circles, the largest things.

    python benchmarks/house.py

A room is a folder of the package, or a file in its root; an arrow is a room that imports another.
"""

from __future__ import annotations

import ast
import json
import statistics
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_imports import FLOOR_OF, SOURCES, imports, room_of  # noqa: E402


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> None:
    files = {file: (ROOT / file).read_text() for file in SOURCES}
    trees = {file: ast.parse(text) for file, text in files.items()}
    inner = [file for file in files if file != "peft_lrqat/__init__.py"]
    arrows = {
        (room_of(".".join(SOURCES[file])), room_of(module))
        for file in inner
        for module, _, _ in imports(file)
        if module != "peft_lrqat"
    }
    arrows = {(a, b) for a, b in arrows if a != b}
    functions = [
        (length(node), f"{file}:{node.name}")
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    classes = [
        (length(node), f"{file}:{node.name}")
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    sizes = {file: len(text.splitlines()) for file, text in files.items()}
    lines = [line for text in files.values() for line in text.splitlines()]
    tests = sum(
        len(path.read_text().splitlines())
        for path in (ROOT / "tests").rglob("*.py")
        if "golden" not in path.parts
    )
    print(
        json.dumps(
            {
                "rooms": len({room for arrow in arrows for room in arrow}),
                "floors": len(set(FLOOR_OF.values())),
                "arrows": len(arrows),
                "upward arrows": sorted(
                    f"{a} -> {b}" for a, b in arrows if FLOOR_OF[b] >= FLOOR_OF[a]
                ),
                "files in the package root": len(list((ROOT / "peft_lrqat").glob("*.py"))),
                "files": len(files),
                "lines": len(lines),
                "median file": statistics.median(sizes.values()),
                "largest files": sorted(((n, f) for f, n in sizes.items()), reverse=True)[:3],
                "longest functions": sorted(functions, reverse=True)[:3],
                "functions over 50 lines": sum(n > 50 for n, _ in functions),
                "functions": len(functions),
                "largest classes": sorted(classes, reverse=True)[:3],
                "lines over 100 columns": sum(len(line) > 100 for line in lines),
                "longest line": max(map(len, lines)),
                "lines of README.md": len((ROOT / "README.md").read_text().splitlines()),
                "test lines per line of code": round(tests / len(lines), 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
