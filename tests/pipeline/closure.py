"""The first-party files that a file imports, and those that a stage's script loads, from the syntax trees."""

import ast
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("replaceme", "stages")


# Functions of methods and criteria that only some stages call; what these import is loaded there alone. All others solve.
ASKED = {
    "select": {"choose", "merge_schedule"},
    "inputs": {"check", "check_merges"},
    "repair": {"train_layer", "batches", "plan", "shuffled_batches", "record_entry_and_exit"},
}
METHODS, CRITERIA = ROOT / "replaceme" / "methods", ROOT / "replaceme" / "selection" / "criteria.py"


@cache
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
    return [file for functions, file in _imports_by_function(path) if all(map(calls, functions))]


@cache
def _imports_by_function(path: Path) -> list[tuple[tuple[str, ...], Path]]:
    """Return each first-party file that a file imports, with the names of the functions around the import."""
    imports: list[tuple[tuple[str, ...], Path]] = []
    waiting: list[tuple[tuple[str, ...], ast.AST]] = [((), parse(path))]
    while waiting:
        functions, node = waiting.pop()
        files: list[Path] = []
        if isinstance(node, ast.Import):
            files = [file for alias in node.names for file in _file_of(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            files = [
                file for alias in node.names for file in _file_of(f"{node.module}.{alias.name}") or _file_of(str(node.module))
            ]
        imports += [(functions, file) for file in files]
        typing_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not typing_only:
            inner = (*functions, node.name) if isinstance(node, ast.FunctionDef) else functions
            waiting += [(inner, child) for child in ast.iter_child_nodes(node)]
    return imports


@cache
def imported_packages(path: Path) -> frozenset[str]:
    """Return the packages that a file imports, by their first names."""
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        names |= {module.split(".")[0] for module in modules}
    return frozenset(names)


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file, which is read once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _file_of(module: str) -> list[Path]:
    if module.split(".")[0] not in PACKAGES:
        return []
    path = ROOT.joinpath(*module.split("."))
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()][:1]


@cache
def _packages_of(path: Path) -> list[Path]:
    return [parent / "__init__.py" for parent in path.parents if ROOT in parent.parents and (parent / "__init__.py").is_file()]
