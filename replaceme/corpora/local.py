"""Text in the user's own file: a .txt is one running text; each row of a .jsonl, .csv or .parquet is a document."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replaceme.base.documents import seeded_order
from replaceme.base.errors import DatasetError, resource_failure
from replaceme.base.files import temporary_folder
from replaceme.corpora.corpus import Corpus, Row, as_row, pick_column

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SUFFIXES = (".txt", *BUILDERS)


def check_file(path: Path, key: str = "dataset", suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raise DatasetError unless ``path`` is a non-empty file of a known kind; ``key`` is the parameter to name."""
    if path.is_dir():
        raise DatasetError(f"{key}: {path} is a folder; give one {', '.join(suffixes)} file.")
    if not path.is_file():
        raise DatasetError(f"{key}: there is no file {path}; give a {', '.join(suffixes)} file.")
    if path.suffix not in suffixes:
        raise DatasetError(f"{key}: {path} ends in '{path.suffix}'; give a {', '.join(suffixes)} file.")
    if path.stat().st_size == 0:
        raise DatasetError(f"{key}: {path} is empty.")


def read_text(path: Path, key: str = "dataset") -> str:
    """Return the text of a .txt file. Raises DatasetError when it isn't UTF-8 or has only white space."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise DatasetError(f"{key}: {path} isn't UTF-8 text (byte {problem.start}).") from None
    if not text.strip():
        raise DatasetError(f"{key}: {path} holds only white space.")
    return text


def read_rows(path: Path, column: str | None, seed: int | None, key: str = "dataset") -> Iterator[Row]:
    """Yield the rows of a .jsonl, .csv or .parquet file, in the order of a seeded permutation (None: the file's order).

    The rows are read from an Arrow file in a temporary folder, not from memory; a permanent cache could go stale.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    with temporary_folder("replaceme-") as scratch:
        try:
            table = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", cache_dir=str(scratch))
        except (DatasetGenerationError, ValueError, OSError) as failure:
            if known := resource_failure(failure.__cause__ or failure):
                raise known from failure
            reason = " ".join(str(failure.__cause__ or failure).split())[:200]
            raise DatasetError(f"{key}: {path} can't be read as {path.suffix[1:]} ({reason}).") from failure
        if len(table) == 0:
            raise DatasetError(f"{key}: {path} has no rows.")
        chosen = pick_column(table.column_names, _sample(table), column, str(path))
        order = range(len(table)) if seed is None else seeded_order(len(table), seed).tolist()
        for index in order:
            yield as_row(table[index][chosen], chosen, str(path))


def _sample(table: Any) -> dict[str, Any]:
    """Return the first value of each column that isn't missing, among the first 100 rows; None if there is none."""
    rows = [table[index] for index in range(min(len(table), 100))]
    return {name: next((row[name] for row in rows if row[name] is not None), None) for name in table.column_names}


def open_file(path: Path, column: str | None, seed: int) -> Corpus:
    """Return the corpus of a local file."""
    if path.suffix == ".txt":
        return Corpus([read_text(path)], running=True)
    return Corpus(read_rows(path, column, seed))
