"""Files of runs: one JSON file each, for `report.py` and for runs that go on where they stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def write_result(file: Path, found: dict[str, Any]) -> None:
    """Writes a run's file, whole or not at all, and prints what is in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    temporary.replace(file)
    print(json.dumps(found), flush=True)


def print_results(
    args: argparse.Namespace,
    table_lines: Callable[[list[dict[str, Any]]], list[str]],
    plot: Callable[[list[dict[str, Any]], str], None],
) -> None:
    """The table of all runs in ``args.results``, and their plot where ``args.plot`` asks."""
    found = read_results(Path(args.results))
    if not found:
        raise SystemExit(f"there are no results in {args.results}")
    print("\n".join(table_lines(found)))
    if args.plot:
        plot(found, args.plot)
