"""Code structure: packages import only downward, no import cycles, and attributes are created in `__init__`."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = [
    {"tinyflux.util"},
    {"tinyflux.model", "tinyflux.shards"},
    {"tinyflux.precache", "tinyflux.run"},
    {"tinyflux.trainer"},
    {"sharding", "launch", "tinyflux.test_training"},
]
"""Packages of one floor do not import each other."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ("tinyflux", "sharding", "launch")
    for path in sorted((ROOT / room).rglob("*.py"))
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str) -> Iterator[str]:
    """The modules of this repo that a module imports anywhere, also for types and within functions."""
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


def test_imports_go_down():
    for module in MODULES.keys() - {"tinyflux"}:
        own, room = floor(module)
        wrong = [other for other in imports(module) if floor(other)[0] >= own and floor(other)[1] != room]
        assert not wrong, f"{module} imports {wrong}"


def test_no_circles():
    TopologicalSorter({module: set(imports(module)) - {module} for module in MODULES}).prepare()


def test_attributes_are_born_in_their_class():
    """In `__init__`, or as a field; no private attribute is set on another object."""
    classes = {
        node.name: node for module in MODULES for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef)
    }
    for name, node in classes.items():
        born, bases = fields(node), [node]
        while bases:  # those of the bases too
            names = [ast.unparse(base).partition("[")[0] for base in bases.pop().bases]
            bases += [classes[base] for base in names if base in classes]
            born |= {field for base in names if base in classes for field in fields(classes[base])}
        late = {attribute for method in node.body for own, attribute in stored(method) if own == "self"} - born
        assert not late, f"{name} makes {late} outside __init__"
    for module in MODULES:
        injected = {
            f"{own}.{name}" for own, name in stored(tree(module)) if own not in ("self", "cls") and name[0] == "_"
        }
        assert not injected, f"{module} gives {injected}"


def fields(node: ast.ClassDef) -> set[str]:
    """The names that a class declares, has setters of, or assigns in `__init__`."""
    targets = [t for n in node.body for t in getattr(n, "targets", [getattr(n, "target", None)])]
    found = {target.id for target in targets if isinstance(target, ast.Name)}
    for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
        if method.name == "__init__":
            found |= {name for own, name in stored(method) if own == "self"}
        elif any(ast.unparse(decorator).endswith(".setter") for decorator in method.decorator_list):
            found.add(method.name)
    return found


def stored(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(object, attribute) of each assignment to an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield ast.unparse(node.value), node.attr
