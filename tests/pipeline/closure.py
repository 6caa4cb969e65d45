"""The first-party files that a file imports, and those that a stage's script loads, from the syntax trees."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("replaceme", "stages")


def import_closure(script: Path, everything: bool = False) -> set[str]:
    """Return the paths, relative to the repository, of all first-party files that a stage's script loads when it runs.

    Imports within functions count in the stage's own file; in other files only with ``everything``, because the stage need not
    call these functions.
    """
    found: set[str] = set()
    own = ROOT / "replaceme" / "pipeline" / script.name
    waiting = [script, *_packages_of(script)]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if name not in found:
            found.add(name)
            modules = imported_modules(path, everything or path == own)
            waiting += [file for module in modules for file in (module, *_packages_of(module))]
    return found


def imported_modules(path: Path, everything: bool = True) -> list[Path]:
    """Return the first-party files that a file imports; for a name defined in a package itself, its ``__init__.py``.

    Args:
        path: the file.
        everything: whether to count imports within functions, and those for the type checker only.
    """
    files: list[Path] = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everything else tree.body:
        if isinstance(node, ast.Import):
            files += [file for alias in node.names for file in _file_of(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                files += _file_of(f"{node.module}.{alias.name}") or _file_of(str(node.module))
    return files


def _file_of(module: str) -> list[Path]:
    if module.split(".")[0] not in PACKAGES:
        return []
    path = ROOT.joinpath(*module.split("."))
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()][:1]


def _packages_of(path: Path) -> list[Path]:
    return [parent / "__init__.py" for parent in path.parents if ROOT in parent.parents and (parent / "__init__.py").is_file()]
