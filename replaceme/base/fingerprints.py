"""SHA-256 sums of local files, cached by path, size and times, so that a large folder is read only once.

They are cached in the user's cache folder. A file is read again if its size, its times (in nanoseconds) or its inode changed.
The sum of a file modified less than two seconds ago is not cached: the file could change again within one tick of the file
system's clock.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from replaceme.base.files import cache_folder, write_json

SETTLED_SECONDS = 2.0
PACKAGE = Path(__file__).parents[1]


def sha256_of(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Return ``{path relative to root: sha256 of the content}``."""
    memory = cache_folder() / "sha256.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    sums, learned = {}, False
    for path in sorted(paths):
        stat = path.stat()
        key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        settled = time.time() - stat.st_mtime > SETTLED_SECONDS
        if settled and key in known and known[key][:-1] == state:
            digest = known[key][-1]
        else:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if settled:
                known[key] = [*state, digest]
                learned = True
        sums[path.relative_to(root).as_posix()] = digest
    if learned:
        write_json(memory, known)
    return sums


def sha256_below(path: Path) -> dict[str, str]:
    """Return the sum of a file, or the sums of all files below a folder, as ``sha256_of`` does."""
    if path.is_dir():
        return sha256_of((entry for entry in path.rglob("*") if entry.is_file()), path)
    return sha256_of([path], path.parent)


def sha256_of_code(path: Path = PACKAGE) -> dict[str, str]:
    """Return the sum of a file of this package, or of each code file below a folder."""
    return {name: digest for name, digest in sha256_below(path).items() if name.endswith((".py", ".html"))}
