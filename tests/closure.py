"""The first-party files that a stage's script imports, directly or not, read off the syntax trees."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("replaceme", "stages")


def import_closure(script: Path) -> set[str]:
    """Return paths (relative to the repository) of every file of ours that running ``script`` as a module loads."""
    found: set[str] = set()
    waiting = [script, *_packages_of(script)]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if name not in found:
            found.add(name)
            waiting += _imported_by(path)
    return found


def _imported_by(path: Path) -> list[Path]:
    files: list[Path] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                files += _files_of(name)
    return files


def _files_of(module: str) -> list[Path]:
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return [path.with_suffix(".py"), *_packages_of(path)]
    if (path / "__init__.py").is_file():
        return [path / "__init__.py", *_packages_of(path)]
    return []


def _packages_of(path: Path) -> list[Path]:
    return [parent / "__init__.py" for parent in path.parents if ROOT in parent.parents and (parent / "__init__.py").is_file()]
