"""Locks between processes: one run works in a folder, and one process builds what all of them use.

The system frees a lock when its process ends, however it ends.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from replaceme.base.files import clear_partials, read_json, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.progress import logger


@contextmanager
def holding_lock(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold a lock during the block.

    Args:
        path: the lock file, which stays; its folder must exist.
        busy: called if another process holds the lock. If it returns, the call waits until the lock is free.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def build_once(path: Path, what: str, build: Callable[[], None], unchecked: Collection[str] = ()) -> bool:
    """Build a file or folder that all runs use, unless it is there and unchanged. Other processes wait for the one that builds.

    Its sums lie next to it, in ``NAME.sums.json``, which is written last.

    Args:
        path: the file or folder.
        what: its name in messages.
        build: writes it.
        unchecked: files in the folder that may change.

    Returns:
        Whether this call has built it.
    """
    sums = path.with_name(f"{path.name}.sums.json")
    if _is_unchanged(path, sums, unchecked):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with holding_lock(path.with_name(f"{path.name}.lock"), lambda: logger.info("%s: waiting for another process", what)):
        if _is_unchanged(path, sums, unchecked):
            return False
        if path.exists():
            logger.warning("%s: %s is incomplete or was changed; it is made anew", what, path)
        clear_partials((each for each in path.parent.iterdir() if each.name.startswith(f"{path.name}.")), own=True)
        build()
        write_json(sums, sha256_below(path))
    return True


def _is_unchanged(path: Path, sums: Path, unchecked: Collection[str]) -> bool:
    try:
        changed = read_json(sums).items() ^ sha256_below(path).items()
    except (OSError, ValueError, AttributeError):  # one of the two is missing, or damaged
        return False
    return {name for name, _ in changed} <= {*unchecked}
