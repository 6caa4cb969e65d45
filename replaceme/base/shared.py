"""What runs share in the user's cache: one process makes it, the others wait for it, and its sums are checked before use.

The sums lie beside it, in ``NAME.sums.json``, which is written last: what has none is incomplete.
"""

from collections.abc import Callable
from pathlib import Path

from replaceme.base.errors import ResourceError
from replaceme.base.files import read_json, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.locks import held
from replaceme.base.progress import logger


def make_once(path: Path, what: str, make: Callable[[], None], apart: tuple[str, ...] = ()) -> bool:
    """Make a shared file or folder unless it is there, whole and unchanged.

    Args:
        path: the file or folder.
        what: its name in messages.
        make: writes it.
        apart: files in the folder that have no sums.

    Returns:
        Whether this call has made it.
    """
    lock = path.with_name(f"{path.name}.lock")
    if not lock.exists() and _is_whole(path, apart):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(lock, lambda holder: logger.info("%s: waiting for %s", what, holder)):
        if _is_whole(path, apart):
            return False
        if path.exists():
            logger.warning("%s: %s is incomplete or was changed; it is made anew", what, path)
        sums = _sums_file(path)
        sums.unlink(missing_ok=True)
        make()
        write_json(sums, _sums(path, apart))
    return True


def _is_whole(path: Path, apart: tuple[str, ...]) -> bool:
    try:
        return path.exists() and bool(read_json(_sums_file(path)) == _sums(path, apart))
    except (ResourceError, ValueError, OSError):
        return False


def _sums(path: Path, apart: tuple[str, ...]) -> dict[str, str]:
    return {name: digest for name, digest in sha256_below(path).items() if name not in apart}


def _sums_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sums.json")
