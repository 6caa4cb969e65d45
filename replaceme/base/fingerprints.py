"""SHA-256 sums of local files. Those of large files are remembered, so that a large folder is read only once.

They are remembered in the user's cache folder by path, size, times (in nanoseconds) and inode. The sum of a file that changed
less than two seconds ago is not: it could change again within one tick of the file system's clock.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from replaceme.base.files import cache_folder, read_remembered, write_json

PACKAGE = Path(__file__).parents[1]
# A smaller file is read as fast as its sum is looked up.
LARGE_BYTES, SETTLED_SECONDS = 1 << 20, 2.0


def sha256_of(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Return ``{path relative to root: sha256 of the content}``."""
    return {path.relative_to(root).as_posix(): _sha256(path) for path in sorted(paths)}


def sha256_below(path: Path) -> dict[str, str]:
    """Return the sum of a file, or the sums of all files below a folder, as ``sha256_of`` does."""
    if path.is_dir():
        return sha256_of((entry for entry in path.rglob("*") if entry.is_file()), path)
    return sha256_of([path], path.parent)


@cache
def code_digest(package: Path = PACKAGE) -> str:
    """Return one digest of the library's code, which is read once a process."""
    sums = sha256_of((path for path in package.rglob("*") if path.suffix in (".py", ".html")), package)
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _sha256(path: Path) -> str:
    if path.stat().st_size < LARGE_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    memory = cache_folder() / "sha256.json"
    known, key, state = _remembered(memory), str(path.resolve()), _state(path)
    if key in known and known[key][:-1] == state:
        return str(known[key][-1])
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    # A file that changed while it was read is read again next time.
    if _state(path) == state and time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > SETTLED_SECONDS:
        known[key] = [*state, digest]
        with suppress(OSError):  # nothing but time is lost
            write_json(memory, {file: entry for file, entry in known.items() if Path(file).exists()})
    return digest


@cache
def _remembered(memory: Path) -> dict[str, list[int | str]]:
    """Return the remembered sums, which are read once a process: path → size, times, inode and sum."""
    return read_remembered(memory)


def _state(path: Path) -> list[int | str]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
