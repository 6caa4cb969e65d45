"""Files that are whole or absent, and JSON that is the same bytes for the same content.

A stage that is interrupted, or meets a full disk, must leave nothing that a later stage would take for finished: what is
written goes into a sibling with a temporary name and is renamed at the end.
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


PARTIAL = ".partial"
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes ``path``'s place when the block ends well, and vanishes when it doesn't."""
    partial, aside = path.with_name(path.name + PARTIAL), path.with_name(path.name + ".old" + PARTIAL)
    _settle(path, aside)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            # Some libraries write files that nobody else may read.
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_UMASK)
        # An old folder goes aside first: it is never seen half deleted.
        if path.exists():
            os.replace(path, aside)
        os.replace(partial, path)
    finally:
        remove(partial)
        _settle(path, aside)


def _settle(path: Path, aside: Path) -> None:
    """Bring an old folder back that was put aside for one that never came, or delete it."""
    if aside.exists() and not path.exists():
        os.replace(aside, path)
    remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` holds either the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may write the same file of the user's cache.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` with sorted keys. Raises ValueError for NaN and infinity, which break the readers of metrics."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON that an earlier stage wrote. Raises ResourceError, naming the file, when it isn't there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResourceError(f"{path} does not exist: run the stage that writes it first (`dvc repro`).") from None


def remove(path: Path) -> None:
    """Delete a file, link or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rounded(value: Any, digits: int = 6) -> Any:
    """Round every float in nested dicts to ``digits`` significant digits, for metrics that people read."""
    if isinstance(value, dict):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, float) and value and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value
