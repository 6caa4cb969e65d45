"""Atomic writes: a file is either complete or absent. JSON has the same bytes for the same content.

A stage that is interrupted, or finds the disk full, must leave nothing that a later stage would take for complete. So output is
written to a sibling with a temporary name, which is renamed at the end. That name carries the process and the machine: two
processes never write into one partial, and what a killed one left can be told from what a living one still writes.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def without_folder(name: str) -> str:
    """Return the last part of a local path, which tells nothing of this machine, and any other name unchanged."""
    path = local_path(name)
    return os.path.basename(os.path.abspath(path)) if path.is_absolute() or path.exists() else name


PARTIAL, ASIDE = ".partial", ".old"
_UMASK = os.umask(0)
os.umask(_UMASK)


def _machine() -> str:
    """Return 8 hex digits for what process numbers are unique in: the host, and on Linux the container on it."""
    place = [platform.node()]
    with suppress(OSError):
        place.append(os.readlink("/proc/self/ns/pid"))
    # The first namespace of all hosts has the same number.
    with suppress(OSError):
        place.append(Path("/etc/machine-id").read_text(encoding="ascii", errors="replace"))
    return hashlib.sha256(" ".join(place).encode()).hexdigest()[:8]


_MACHINE = _machine()
_LEFT = re.compile(rf"(?P<name>.+)\.(?P<process>\d+)-(?P<machine>[0-9a-f]{{8}})(?P<aside>{re.escape(ASIDE)})?{PARTIAL}")


def partial_suffix(kind: str = "") -> str:
    """Return the end of the name of what this process has not finished; ``kind`` is empty or ``ASIDE``."""
    return f".{os.getpid()}-{_MACHINE}{kind}{PARTIAL}"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder; it replaces ``path`` when the block succeeds and is deleted otherwise."""
    partial, aside = (path.with_name(path.name + partial_suffix(kind)) for kind in ("", ASIDE))
    clear_partials(path.parent, path.name)
    # An earlier process may have had this one's number.
    _settle(path, aside)
    remove(partial)
    # It has its final name already, inside of the partial: transformers copies a model's code to a place named like its folder.
    new = partial / path.name
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.rglob("*"):
            # Some libraries write files that only the owner can read.
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_UMASK)
        # An old folder is moved aside first, so that it is never visible half deleted.
        if path.exists():
            os.replace(path, aside)
        os.replace(new, path)
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


def clear_partials(folder: Path, target: str | None = None, *, alone: bool = False) -> None:
    """Delete what ended processes left unfinished, and restore the old folders that they had moved aside.

    Args:
        folder: where it lies.
        target: the name of the file or folder that was being written; None is any.
        alone: no other process writes in the folder (its lock is held): what other machines left, and processes whose number is
            in use again, is cleared too, and so are all folders below.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        left = _LEFT.fullmatch(path.name)
        # Best effort: another process may clear it at the same time, and it may belong to another user.
        with suppress(OSError):
            if not left:
                if alone and target is None and path.is_dir() and not path.is_symlink():
                    clear_partials(path, alone=True)
            elif target in (None, left["name"]) and (alone or _is_over(left["process"], left["machine"])):
                if left["aside"]:
                    _settle(path.with_name(left["name"]), path)
                remove(path)


def _is_over(process: str, machine: str) -> bool:
    """Return whether a process of this machine has ended; False for one of another machine."""
    if machine != _MACHINE:
        return False
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return False
    except (ProcessLookupError, OverflowError):
        return True
    return False


@contextmanager
def temporary_folder(prefix: str, folder: Path | None = None) -> Iterator[Path]:
    """Yield a new folder, which is deleted after the block; those of ended processes are deleted before.

    Args:
        prefix: of its name.
        folder: where; None is the system's temporary folder.
    """
    where = folder or Path(tempfile.gettempdir())
    clear_partials(where)
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=partial_suffix(), dir=where, ignore_cleanup_errors=True) as name:
        yield Path(name)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically: ``path`` holds either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_partials(path.parent, path.name)
    partial = path.with_name(path.name + partial_suffix())
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
