"""The pipeline's code as one file: with `trust_remote_code` it loads a saved pipeline without this package."""

import ast
import re
from importlib import import_module
from pathlib import Path

HEADER = '"""TinyFlux for diffusers in one file, generated from the package tinyflux-deep (MIT)."""\n'
MODULES = (  # each after those that it imports
    "util.rng", "model.layers", "model.experts", "model.model", "model.dcp", "model.loader", "model.pretrained",
    "model.teachers", "model.zoo", "trainer.schedules", "trainer.solvers", "trainer.sampling",
    "trainer.pipeline_files", "trainer.pipeline_card", "trainer.pipeline",
)  # fmt: skip


def single_file() -> str:
    """The source of all `MODULES` without their imports of each other. ValueError where two define the same name."""
    imports: dict[str, None] = {}
    parts, owners = [], {}
    for module in MODULES:
        source = Path(import_module(f"tinyflux.{module}").__file__).read_text(encoding="utf-8")
        lines, cut = source.splitlines(), set()
        for node in ast.parse(source).body:
            span = range(node.lineno - 1, node.end_lineno)
            if isinstance(node, ast.Import | ast.ImportFrom):
                cut.update(span)
                if not _is_own(node, module):
                    imports[ast.unparse(node)] = None
            elif _is_typing_only(node) or (isinstance(node, ast.Expr) and node.lineno == 1):
                cut.update(span)  # the docstring names the file that it was in
            for name in _defined(node):
                if owners.setdefault(name, module) != module and name != "log":
                    raise ValueError(f"{module} and {owners[name]} both define {name}: rename one of them")
        body = "\n".join(line for i, line in enumerate(lines) if i not in cut).strip()
        body = re.sub(r"^( +)from tinyflux\.(\S+) import .*$", _inner_import, body, flags=re.MULTILINE)
        parts.append(f"# tinyflux.{module}\n\n{body}\n")
        if module == "util.rng":
            parts.append("rng = sys.modules[__name__]  # what follows calls it by its module's name\n")
    head = "\n".join(["import sys", *(line for line in imports if line != "import sys")])
    return HEADER + "\n" + head + "\n\n" + "\n\n".join(parts)


def _is_own(node: ast.Import | ast.ImportFrom, module: str) -> bool:
    """Is this an import of one of `MODULES`? ValueError for another one of the package: it would be missing."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("tinyflux"):
        return False
    names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    if not any(name == f"tinyflux.{known}" for name in names for known in MODULES):
        raise ValueError(f"{module} imports {node.module}: add it to MODULES of {__name__}")
    return True


def _inner_import(found: re.Match) -> str:
    """What stands for an import of this package inside a function: nothing, or an error for another module's."""
    known = found[2] in MODULES
    return found[1] + ("pass" if known else 'raise ImportError("this needs the package tinyflux-deep")')


def _is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []
