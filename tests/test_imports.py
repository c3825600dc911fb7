"""The floors of the house: a file imports from its own room or a lower floor, and no private name.

A room is a folder of the package, or a file in its root. Imports inside functions and under
``TYPE_CHECKING`` count like all others.
"""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
# From the ground up; rooms of one floor know nothing of each other.
FLOORS = [
    {"_version", "_moved", "quant"},
    {"shared"},
    {"formats", "activations", "calibration"},
    {"base"},
    {"registration", "lrqat"},
    {"hub", "loraquant", "export"},
    {"trainer", "serving"},
    {"demo"},
    {"cli", "__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The face of the package shows all of it, and is on no floor.
FACE = "peft_lrqat/__init__.py"


def sources():
    """Every file of the package with the name it is imported by, the link to trainer/ left out."""
    for top, prefix in (("peft_lrqat", ()), ("trainer", ("peft_lrqat",))):
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if top == "peft_lrqat" and relative.parts[1] == "trainer":
                continue
            name = (*prefix, *relative.with_suffix("").parts)
            yield relative.as_posix(), name[:-1] if name[-1] == "__init__" else name


SOURCES = dict(sources())
MODULES = {".".join(name) for name in SOURCES.values()}


def imports(file):
    """(module, name or None, line) of everything that ``file`` imports from this package."""
    name = SOURCES[file]
    package = name if file.endswith("__init__.py") else name[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "peft_lrqat":
                    yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module.split(".") if node.module else ())))
            if module.split(".")[0] != "peft_lrqat":
                continue
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (
                    (inner, None, node.lineno)
                    if inner in MODULES
                    else (
                        module,
                        alias.name,
                        node.lineno,
                    )
                )


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


FILES = [file for file in SOURCES if file != FACE]


def test_every_room_is_on_a_floor():
    assert {room_of(".".join(SOURCES[file])) for file in FILES} == set(FLOOR_OF)


def test_the_package_root_has_at_most_six_files():
    assert len(list((ROOT / "peft_lrqat").glob("*.py"))) <= 6


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file):
    own = room_of(".".join(SOURCES[file]))
    for module, name, line in imports(file):
        if module == "peft_lrqat":
            assert name == "__version__", f"{file}:{line} imports {name} from the package's face"
            continue
        room = room_of(module)
        assert room == own or FLOOR_OF[room] < FLOOR_OF[own], (
            f"{file}:{line} imports {module}, which is not on a lower floor"
        )


@pytest.mark.parametrize("file", FILES)
def test_no_private_name_of_another_module_is_imported(file):
    for module, name, line in imports(file):
        private = name is not None and name.startswith("_") and name != "__version__"
        assert not private, f"{file}:{line} imports {name} from {module}"


def test_no_circle():
    graph = {}
    for file in FILES:
        graph[".".join(SOURCES[file])] = {m for m, _, _ in imports(file)} - {"peft_lrqat"}
    done, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail("circle: " + " -> ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        path.append(module)
        for other in graph.get(module, ()):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)
