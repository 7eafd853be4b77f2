"""The pipeline's code as one file, to load a saved pipeline with `trust_remote_code` and without this package."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

HEADER = '"""TinyFlux for diffusers in one file, generated from the package tinyflux-deep (MIT)."""'
ROOT = "tinyflux.trainer.pipeline"
SHARED = ("log",)  # names that several modules may define


def single_file() -> str:
    """The source of the pipeline's module and of all modules of this package that it needs, in import order.

    Imports between them are removed, and equal private names get a suffix. Raises ValueError if two modules define the
    same public name.
    """
    modules = _closure(ROOT, [])
    imports: dict[str, None] = {"import sys": None}
    parts, owners = [], {}
    for module in modules:
        source = _source(module)
        lines, cut = source.splitlines(), set()
        for node in ast.parse(source).body:
            docstring = isinstance(node, ast.Expr) and node.lineno == 1  # drop it: it describes the original file
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not _own(node):
                    imports[ast.unparse(node)] = None
            elif not docstring and not _is_typing_only(node):
                continue
            cut.update(range(node.lineno - 1, node.end_lineno))
        body = "\n".join(line for i, line in enumerate(lines) if i not in cut).strip()
        for name in _defined(source):
            if owners.setdefault(name, module) != module and name not in SHARED:
                if not name.startswith("_"):
                    raise ValueError(f"{module} and {owners[name]} both define {name}: rename one of them")
                body = re.sub(rf"\b{name}\b", f"{name}_{module.rpartition('.')[2]}", body)
        inner = re.compile(r"^( +)from (tinyflux\S*) import (.*)$", re.MULTILINE)
        body = inner.sub(lambda found: found[1] + _stand_in(found[2], found[3], modules), body)
        parts.append(f"# {module}\n\n{body}\n")
        if module.startswith("tinyflux.util."):  # such modules are used by name, as in rng.normal
            parts.append(f"{module.rpartition('.')[2]} = sys.modules[__name__]\n")
    return "\n".join([HEADER, "", *imports, "", "\n\n".join(parts)])


def _source(module: str) -> str:
    return Path(find_spec(module).origin).read_text(encoding="utf-8")


def _closure(module: str, found: list[str]) -> list[str]:
    """The modules of this package that a module imports at the top, then the module itself."""
    for node in ast.parse(_source(module)).body:
        for other in _own(node):
            if other not in found:
                _closure(other, found)
    return [*found, module] if module == ROOT else found.append(module)


def _own(node: ast.stmt) -> list[str]:
    """The modules of this package that a statement imports."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("tinyflux"):
        return []
    if Path(find_spec(node.module).origin).name == "__init__.py":
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module]


def _stand_in(module: str, names: str, modules: list[str]) -> str:
    """What replaces an import inside a function: nothing, or an error if the module is not in the file."""
    known = module in modules or f"{module}.{names}" in modules
    return "pass" if known else 'raise ImportError("this needs the package tinyflux-deep")'


def _is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _defined(source: str) -> list[str]:
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names
