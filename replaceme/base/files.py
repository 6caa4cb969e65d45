"""Atomic writes: a file is either complete or absent. JSON has the same bytes for the same content.

A stage that is interrupted, or finds the disk full, must leave nothing that a later stage would take for complete. So output is
written under a temporary name in the same folder, and renamed at the end. The temporary name, ``NAME.PROCESS.partial``, has the
number of the process that writes: what an ended process left is deleted by the next one.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

from replaceme.base.errors import ResourceError

PARTIAL = ".partial"
_UNFINISHED = re.compile(rf".+\.(\d+){re.escape(PARTIAL)}")
_UMASK = os.umask(0)
os.umask(_UMASK)


def cache_folder() -> Path:
    """Return the user's cache folder for this program (``REPLACEME_CACHE`` overrides it)."""
    return Path(os.environ.get("REPLACEME_CACHE") or platformdirs.user_cache_dir("replaceme"))


def local_path(name: str) -> Path:
    """Return a path with the user's home for ``~``; unlike ``Path.expanduser``, keep ``~name`` if there is no such user."""
    return Path(os.path.expanduser(name))


def without_folder(name: str) -> str:
    """Return the last part of a local path, which tells nothing of this machine, and any other name unchanged."""
    path = local_path(name)
    return os.path.basename(os.path.abspath(path)) if path.is_absolute() or path.exists() else name


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder; it replaces ``path`` when the block succeeds and is deleted otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(f"{path.name}.", path.parent) as partial:
        # It has its final name already: transformers copies a model's code to a module named like its folder.
        new, old = partial / path.name, partial / f"{path.name}.old"
        new.mkdir()
        yield new
        _make_readable(new)
        try:
            # Moved, not deleted: the old folder is never visible half deleted.
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)


def _make_readable(folder: Path) -> None:
    """Give files the usual permissions: some libraries write files that only the owner can read."""
    for path in folder.rglob("*"):
        mode = (0o777 if path.is_dir() else 0o666) & ~_UMASK
        if path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


@contextmanager
def temporary_folder(prefix: str, folder: Path | None = None) -> Iterator[Path]:
    """Yield a new folder, which is deleted after the block; those that ended processes left under this prefix go before.

    Args:
        prefix: of its name.
        folder: where; None is the system's temporary folder.
    """
    where = folder or Path(tempfile.gettempdir())
    clear_partials(path for path in where.iterdir() if path.name.startswith(prefix))
    suffix = f".{os.getpid()}{PARTIAL}"
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=suffix, dir=where, ignore_cleanup_errors=True) as name:
        yield Path(name)


def clear_partials(paths: Iterable[Path], *, own: bool = False) -> None:
    """Delete what ended processes have left unfinished, and restore the folders that they were about to replace.

    No other machine, and no other container, may write there: whether a process has ended is known on its own machine alone.

    Args:
        paths: files and folders, finished ones among them.
        own: whether to delete those with this process's number too, as a run that begins does. (In a container, an earlier
            process often had the same number.)
    """
    for path in [*paths]:
        match = _UNFINISHED.fullmatch(path.name)
        if match and (own if int(match[1]) == os.getpid() else not _is_running(int(match[1]))):
            with suppress(OSError):  # it belongs to another user
                for old in path.glob("*.old"):
                    if not (replaced := path.with_name(old.stem)).exists():
                        os.replace(old, replaced)
                remove(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def copy_tree(source: Path, folder: Path) -> None:
    """Copy the files below ``source`` into ``folder``, with new modes: DVC's outputs are links that can't be written to."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically: ``path`` holds either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
        raise missing_output(path) from None


def read_remembered(path: Path) -> dict[str, Any]:
    """Return what a JSON file remembers, without which a run is only slower; nothing if it is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def missing_output(path: Path) -> ResourceError:
    """Return the error for a file that an earlier stage writes and that isn't there."""
    return ResourceError(f"{path} does not exist: run the stage that writes it first (`dvc repro`).")


def remove(path: Path) -> None:
    """Delete a file, link or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]], digits: int = 6) -> None:
    """Write a table as CSV, its floats with so many significant digits."""
    lines = [head, *([round_floats(cell, digits) for cell in row] for row in rows)]
    write_text(path, "".join(",".join(map(str, line)) + "\n" for line in lines))


def round_floats(value: Any, digits: int = 6) -> Any:
    """Round every float in nested dicts to ``digits`` significant digits."""
    if isinstance(value, dict):
        return {key: round_floats(entry, digits) for key, entry in value.items()}
    if isinstance(value, float) and value and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value
