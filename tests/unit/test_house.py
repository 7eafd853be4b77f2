"""The house keeps its shape: rooms import downward only, files without circles, attributes born in `__init__`."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = [
    {"tinyflux.util"},
    {"tinyflux.model", "tinyflux.shards"},
    {"tinyflux.precache", "tinyflux.run"},
    {"tinyflux.trainer"},
    {"sharding", "launch", "tinyflux.test_training"},
]
"""Rooms of one floor do not import each other."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("tinyflux", "sharding", "launch")
    for path in sorted((ROOT / room).rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str) -> Iterator[str]:
    """The modules of this repo that one imports, anywhere in it: for types and within functions too."""
    for node in ast.walk(tree(module)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name not in ("", "tinyflux"):
                yield name


def floor(module: str) -> tuple[int, str]:
    room = ".".join(module.split(".")[:2]) if module.startswith("tinyflux.") else module.partition(".")[0]
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms), room


@pytest.mark.parametrize("module", [m for m in MODULES if m != "tinyflux"])
def test_imports_go_down(module):
    own, room = floor(module)
    for other in imports(module):
        assert floor(other)[0] < own or floor(other)[1] == room, f"{module} imports {other}"


def test_no_circles():
    TopologicalSorter({module: set(imports(module)) - {module} for module in MODULES}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_attributes_are_born_in_init(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ClassDef):
            declared = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            declared |= {t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            born = {name for method in methods if method.name == "__init__" for name in assigned(method)}
            setters = {m.name for m in methods if any(ast.unparse(d).endswith(".setter") for d in m.decorator_list)}
            for method in methods:
                late = set(assigned(method)) - declared - born - setters
                assert not late or node.bases, f"{module}.{node.name}.{method.name} makes {late}"


def assigned(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
