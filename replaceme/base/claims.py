"""Whose a console script's result is: the process that works there, and which files are this program's.

The files' sums are recorded in the work folder, ``result.json``, before the files get their place: whenever a run is killed,
the next one knows them, and it replaces no others. The pipeline's place is DVC's, and needs no record.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

from replaceme.base.errors import ParameterError
from replaceme.base.files import read_json, write_json
from replaceme.base.fingerprints import sha256_below, sha256_of
from replaceme.base.locks import held
from replaceme.base.workspace import Workspace

RECORD = "result.json"


def claim(work: Workspace, sums: Mapping[str, str]) -> None:
    """Add files that are about to get their place in the result: name → sha256."""
    if work.save_path:
        known = _claimed(work)
        more = {name: sorted({*known.get(name, ()), digest}) for name, digest in sums.items()}
        write_json(work.root / RECORD, known | more)


def claim_only_what_is_there(work: Workspace) -> None:
    """Drop all but the result's present files from the record."""
    write_json(work.root / RECORD, {name: [digest] for name, digest in sha256_below(work.model).items()})


def foreign_file(work: Workspace) -> str | None:
    """Return a file in the result's folder that this program did not write, or None."""
    known, there = _claimed(work), []
    for path in work.model.rglob("*"):
        name = path.relative_to(work.model).as_posix()
        # A link, or what is neither file nor folder, is not ours either.
        if path.is_symlink() or not (path.is_dir() or (path.is_file() and name in known)):
            return name
        there += [path] if path.is_file() else []
    sums = sha256_of(there, work.model)
    return next((name for name, digest in sums.items() if digest not in known[name]), None)


def in_use(work: Workspace) -> AbstractContextManager[None]:
    """Return the lock of a result, which has a work folder. Raises ParameterError if another process holds it."""

    def stop(holder: str) -> None:
        raise ParameterError(f"save_path: {work.model} is in use by {holder}; wait for it, or choose another folder.")

    return held(work.root / "in-use.lock", stop)


def _claimed(work: Workspace) -> dict[str, list[str]]:
    """Return the record: name → the sums that the file may have. A damaged record is none."""
    try:
        content = read_json(work.root / RECORD) if (work.root / RECORD).is_file() else {}
        # Earlier versions recorded one sum for each file.
        return {name: [sums] if isinstance(sums, str) else [*sums] for name, sums in content.items()}
    except (ValueError, TypeError, AttributeError):
        return {}
