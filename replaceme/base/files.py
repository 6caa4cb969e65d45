"""Atomic writes: a file is either complete or absent. JSON has the same bytes for the same content.

A stage that is interrupted, or finds the disk full, must leave nothing that a later stage would take for complete. So output is
written to a sibling with a temporary name, which is renamed at the end.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from replaceme.base.errors import ResourceError


def cache_folder() -> Path:
    """Return the user's cache folder for this program (``REPLACEME_CACHE`` overrides it)."""
    return Path(os.environ.get("REPLACEME_CACHE") or platformdirs.user_cache_dir("replaceme"))


def local_path(name: str) -> Path:
    """Return a path with the user's home for ``~``; unlike ``Path.expanduser``, keep ``~name`` if there is no such user."""
    return Path(os.path.expanduser(name))


PARTIAL = ".partial"
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder; it replaces ``path`` when the block succeeds and is deleted otherwise."""
    partial, aside = path.with_name(path.name + PARTIAL), path.with_name(path.name + ".old" + PARTIAL)
    _settle(path, aside)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            # Some libraries write files that only the owner can read.
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_UMASK)
        # An old folder is moved aside first, so that it is never visible half deleted.
        if path.exists():
            os.replace(path, aside)
        os.replace(partial, path)
    finally:
        remove(partial)
        _settle(path, aside)


def _settle(path: Path, aside: Path) -> None:
    """Restore an old folder that was moved aside if no new one replaced it; otherwise delete it."""
    if aside.exists() and not path.exists():
        os.replace(aside, path)
    remove(aside)


def copy_content(source: Path, folder: Path) -> None:
    """Copy the files below ``source`` into ``folder``, with new modes: DVC's outputs are links that can't be written to."""
    for path in source.rglob("*"):
        if not path.is_dir():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically: ``path`` holds either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write the same file in the user's cache.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` with sorted keys. Raises ValueError for NaN and infinity, which many JSON readers reject."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON that an earlier stage wrote. Raises ResourceError if the file doesn't exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResourceError(f"{path} does not exist: run the stage that writes it first (`dvc repro`).") from None


def remove(path: Path) -> None:
    """Delete a file, link or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rounded(value: Any, digits: int = 6) -> Any:
    """Round every float in nested dicts to ``digits`` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, float) and value and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value
