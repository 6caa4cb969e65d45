"""Text in the user's own file: a .txt is one running text; each row of a .jsonl, .json, .csv or .parquet is a document.

Rows are read one by one, so that a wrong one is named by its line. A path is taken literally, whatever characters it has.
"""

import csv
import json
import math
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from replaceme.base.documents import seeded_order
from replaceme.base.errors import DatasetError, excerpt, resource_failure
from replaceme.corpora.corpus import Corpus, Row, as_row, pick_column

Record = dict[str, Any]
SAMPLE = 100
PATH_CHARACTERS = 120


def short(path: Path) -> str:
    """Return a path as messages name it."""
    return excerpt(path, PATH_CHARACTERS)


def check_file(path: Path, key: str = "dataset", suffixes: tuple[str, ...] | None = None) -> None:
    """Raise DatasetError unless ``path`` is a non-empty file of a known kind; ``key`` is the parameter to name."""
    kinds, name = suffixes or SUFFIXES, short(path)
    wanted = f"give a {', '.join(kinds)} file"
    if path.is_dir():
        raise DatasetError(f"{key}: {name} is a folder; {wanted}.")
    if not path.exists():
        raise DatasetError(f"{key}: there is no file {name}; {wanted}.")
    if not path.is_file():
        raise DatasetError(f"{key}: {name} is no regular file; {wanted}.")
    if path.suffix not in kinds:
        raise DatasetError(f"{key}: {name} ends in '{excerpt(path.suffix)}'; {wanted}.")
    if path.stat().st_size == 0:
        raise DatasetError(f"{key}: {name} is empty.")


def read_text(path: Path, key: str = "dataset") -> str:
    """Return the text of a .txt file. Raises DatasetError when it isn't UTF-8, has a zero byte or only white space."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise DatasetError(f"{key}: {short(path)} isn't UTF-8 text (byte {problem.start}).") from None
    if "\0" in text:
        raise DatasetError(f"{key}: {short(path)} isn't text: it has a zero byte.")
    if not text.strip():
        raise DatasetError(f"{key}: {short(path)} holds only white space.")
    return text


def read_rows(path: Path, column: str | None, seed: int | None, key: str = "dataset") -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json, .csv or .parquet file, in the order of a seeded permutation (None: the file's order).

    The text column goes through a temporary file, from which the rows are read in that order; memory holds their offsets alone.

    Raises:
        DatasetError: the file is damaged, has no rows, or a value of the column is neither text nor a chat.
    """
    read = READERS[path.suffix]
    sample = [row for _, row in islice(read(path, key, None), SAMPLE)]
    if not sample:
        raise DatasetError(f"{key}: {short(path)} has no rows.")
    columns = list(dict.fromkeys(name for row in sample for name in row))
    first = {name: next((row[name] for row in sample if row.get(name) is not None), None) for name in columns}
    chosen = pick_column(columns, first, column, short(path))
    offsets = array("q")
    with tempfile.TemporaryFile(prefix="replaceme-") as scratch:
        for place, row in read(path, key, chosen):
            offsets.append(scratch.tell())
            scratch.write(json.dumps(as_row(row.get(chosen), chosen, place)).encode() + b"\n")
        for index in range(len(offsets)) if seed is None else seeded_order(len(offsets), seed).tolist():
            scratch.seek(offsets[index])
            yield json.loads(scratch.readline())


def json_lines(path: Path, key: str = "dataset", column: str | None = None) -> Iterator[tuple[str, Record]]:
    """Yield each row of a .jsonl file with its place in the file, for messages.

    Args:
        path: the file; empty lines are skipped.
        key: the parameter to name in messages.
        column: not used here; .parquet reads only this column.

    Raises:
        DatasetError: it isn't UTF-8 text, or a line is no JSON object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"line {number} of {short(path)}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                raise DatasetError(f"{key}: {place} isn't UTF-8 text (byte {problem.start}).") from None
            if text.strip():
                yield place, _record(_parsed(text, place, key), place, key)


def _json_rows(path: Path, key: str, column: str | None) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a .json file: one list of them, or one a line."""
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        yield from json_lines(path, key)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield (place := f"row {number} of {short(path)}"), _record(row, place, key)


def _parsed(text: str, place: str, key: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise DatasetError(f"{key}: {place} nests too many lists and objects in each other; give texts or chats.") from None
    except ValueError:
        raise DatasetError(f"{key}: {place} isn't JSON text.") from None


def _record(row: Any, place: str, key: str) -> Record:
    if not isinstance(row, dict):
        raise DatasetError(f"{key}: {place} must be an object with columns, not {type(row).__name__}.")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{key}: {place} isn't JSON text: it has half a surrogate pair.") from None
    return row


def _csv_rows(path: Path, key: str, column: str | None) -> Iterator[tuple[str, Record]]:
    """Yield the rows of a .csv file: commas, a header, and in each row as many fields. A field that is a number is one."""
    name = short(path)
    csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            lines = (fields for fields in reader if fields)
            header = next(lines, [])
            if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise DatasetError(f"{key}: {name} separates its columns by {mark!r}; write it with commas.")
            if len(set(header)) < len(header):
                raise DatasetError(f"{key}: {name} has two columns of one name; its header is {excerpt(', '.join(header))}.")
            for fields in lines:
                place = f"line {reader.line_num} of {name}"
                if len(fields) != len(header):
                    counts = f"{len(fields)} fields, not the header's {len(header)}"
                    raise DatasetError(f"{key}: {place} has {counts}; quote a text that holds a comma.")
                yield place, dict(zip(header, map(_number_or_text, fields), strict=True))
    except UnicodeDecodeError as problem:
        raise DatasetError(f"{key}: {name} isn't UTF-8 text ({problem.reason}).") from None
    except csv.Error as problem:
        raise DatasetError(f"{key}: line {reader.line_num} of {name} can't be read as CSV ({problem}).") from None


def _number_or_text(field: str) -> float | str:
    """Return a field of a CSV file, where a number and a text look alike."""
    try:
        return number if math.isfinite(number := float(field)) else field
    except ValueError:
        return field


def _parquet_rows(path: Path, key: str, column: str | None) -> Iterator[tuple[str, Record]]:
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        # A damaged file shows in exceptions of many kinds; pages are compared with their checksums where the file has some.
        with ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1000, columns=None if column is None else [column]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {short(path)}", row
    except Exception as failure:
        if known := resource_failure(failure):
            raise known from failure
        reason = f"after row {number}: {excerpt(failure, 100)}"
        raise DatasetError(f"{key}: {short(path)} can't be read as Parquet ({reason}).") from failure


Reader = Callable[[Path, str, str | None], Iterator[tuple[str, Record]]]
READERS: Mapping[str, Reader] = {
    ".jsonl": json_lines, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows,
}  # fmt: skip
SUFFIXES = (".txt", *READERS)


def open_file(path: Path, column: str | None, seed: int) -> Corpus:
    """Return the corpus of a local file."""
    if path.suffix == ".txt":
        return Corpus([read_text(path)], running=True)
    return Corpus(read_rows(path, column, seed))
