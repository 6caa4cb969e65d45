"""SHA-256 sums of local files, cached by path, size and times, so that a large folder is read only once.

They are cached in the user's cache folder, with a sum of the cached sums: content that doesn't fit is ignored. A file is read
again if its size, its times (in nanoseconds) or its inode changed. The sum of a file is not cached if it was modified, or its
inode changed, less than two seconds ago or in the future: it could change again within one tick of the file system's clock.
What remains unnoticed: a change that keeps size and all times, as on a damaged disk or after the clock was set back; and one
within a tick of a file server whose clock is more than two seconds late.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from os import stat_result
from pathlib import Path
from typing import Any

from replaceme.base.files import cache_folder, write_json

SETTLED_SECONDS = 2.0
PACKAGE = Path(__file__).parents[1]


def sha256_of(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Return ``{path relative to root: sha256 of the content}``."""
    memory = cache_folder() / "sha256.json"
    known = _read(memory)
    sums, learned = {}, False
    for path in sorted(paths):
        key, stat = str(path.resolve()), path.stat()
        settled = _settled(stat)
        entry = known.get(key, [])
        if settled and entry[:-1] == _state(stat):
            digest = entry[-1]
        else:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            # A file that changed while it was read is read again next time.
            if settled and _state(path.stat()) == _state(stat):
                known[key] = [*_state(stat), digest]
                learned = True
        sums[path.relative_to(root).as_posix()] = digest
    if learned:
        known = {key: entry for key, entry in known.items() if Path(key).exists()}
        write_json(memory, {"files": known, "sha256": _sum(known)})
    return sums


def _read(memory: Path) -> dict[str, Any]:
    """Return the cached sums: path → size, times, inode and digest; none if the file is damaged or of another form."""
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
        files: dict[str, Any] = content["files"]
        return files if isinstance(files, dict) and content["sha256"] == _sum(files) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _sum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _state(stat: stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _settled(stat: stat_result) -> bool:
    return time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS


def sha256_below(path: Path) -> dict[str, str]:
    """Return the sum of a file, or the sums of all files below a folder, as ``sha256_of`` does."""
    if path.is_dir():
        return sha256_of((entry for entry in path.rglob("*") if entry.is_file()), path)
    return sha256_of([path], path.parent)


def sha256_of_code(path: Path = PACKAGE) -> dict[str, str]:
    """Return the sum of a file of this package, or of each code file below a folder."""
    return {name: digest for name, digest in sha256_below(path).items() if name.endswith((".py", ".html"))}
