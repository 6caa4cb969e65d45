"""Locks between processes: one run works in a folder, and one process makes what all share.

The system frees a lock when its process ends, however it ends. A text beside the lock says who holds it.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from replaceme.base.files import write_text


@contextmanager
def held(path: Path, busy: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a file or folder during the block; its folder must exist.

    Args:
        path: the lock file, which is there only while the lock is held, as is its text (``path.txt``).
        busy: called if another process holds the lock, with that process's command, number, host and begin. If it returns, the
            call waits until the lock is free.
    """
    from filelock import FileLock, Timeout

    lock, text = FileLock(path), path.with_name(f"{path.name}.txt")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy(_read(text))
        lock.acquire()
    try:
        begun = time.strftime("%Y-%m-%d %H:%M")
        with suppress(OSError):  # a full disk: the lock holds without its text
            write_text(text, f"{Path(sys.argv[0]).name}, process {os.getpid()} on {platform.node()}, since {begun}")
        yield
    finally:
        text.unlink(missing_ok=True)
        # Processes that wait notice that the file is gone, and open a new one.
        path.unlink(missing_ok=True)
        lock.release()


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except OSError:
        return "another process"
