"""The first-party files that a file imports, and those that a stage's script loads, from the syntax trees."""

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("replaceme", "stages")


# Functions of methods and criteria that only some stages call; what these import is loaded there alone. All others solve.
ASKED = {
    "select": {"choose", "merge_schedule"},
    "inputs": {"check", "check_merges"},
    "repair": {"train_layer", "batches"},
}
METHODS, CRITERIA = ROOT / "replaceme" / "methods", ROOT / "replaceme" / "selection" / "criteria.py"


def import_closure(script: Path) -> set[str]:
    """Return the paths, relative to the repository, of all first-party files that a stage's script loads when it runs.

    Imports within functions count, except those of methods and criteria that the stage does not call.
    """
    found: set[str] = set()
    waiting = [script, *_packages_of(script)]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if name not in found:
            found.add(name)
            modules = imported_modules(path, partial(_calls, script.stem, path))
            waiting += [file for module in modules for file in (module, *_packages_of(module))]
    return found


def _calls(stage: str, path: Path, function: str) -> bool:
    """Return whether a stage calls a function of a file that it loads."""
    if path == CRITERIA:
        return stage == "select"
    if path.parent != METHODS:
        return True
    callers = [caller for caller, functions in ASKED.items() if function in functions] or ["solve", "repair"]
    return stage in callers


def imported_modules(path: Path, calls: Callable[[str], bool] = lambda function: True) -> list[Path]:
    """Return the first-party files that a file imports; for a name defined in a package itself, its ``__init__.py``.

    Args:
        path: the file.
        calls: whether to count the imports within a function, or a method of a class, of this name.
    """
    files: list[Path] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            files += [file for alias in node.names for file in _file_of(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                files += _file_of(f"{node.module}.{alias.name}") or _file_of(str(node.module))
        typing_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not typing_only and not (isinstance(node, ast.FunctionDef) and not calls(node.name)):
            waiting += ast.iter_child_nodes(node)
    return files


def _file_of(module: str) -> list[Path]:
    if module.split(".")[0] not in PACKAGES:
        return []
    path = ROOT.joinpath(*module.split("."))
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()][:1]


def _packages_of(path: Path) -> list[Path]:
    return [parent / "__init__.py" for parent in path.parents if ROOT in parent.parents and (parent / "__init__.py").is_file()]
