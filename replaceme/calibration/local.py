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
from replaceme.calibration.corpus import Row, convert_value, pick_column

# A row, after where it stands in its file, for messages.
Record = tuple[str, dict[str, Any]]
ROWS_TO_PICK_A_COLUMN = 100
PATH_CHARACTERS = 120


def shorten_path(path: Path) -> str:
    """Return a path as messages name it."""
    return excerpt(path, PATH_CHARACTERS)


def check_file(path: Path, key: str = "dataset", suffixes: tuple[str, ...] | None = None) -> None:
    """Raise DatasetError unless ``path`` is a non-empty file of a known kind; ``key`` is the parameter to name."""
    suffixes, name = suffixes or SUFFIXES, shorten_path(path)
    problem = None
    if path.is_dir():
        problem = f"{name} is a folder"
    elif not path.is_file():
        problem = f"there is no file {name}"
    elif path.suffix not in suffixes:
        problem = f"{name} ends in '{excerpt(path.suffix)}'"
    if problem:
        raise DatasetError(f"{key}: {problem}; give a {', '.join(suffixes)} file.")
    if path.stat().st_size == 0:
        raise DatasetError(f"{key}: {name} is empty.")


def read_text(path: Path, key: str = "dataset") -> str:
    """Return the text of a .txt file. Raises DatasetError when it isn't UTF-8, has a zero byte or only white space."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise DatasetError(f"{key}: {shorten_path(path)} isn't UTF-8 text (byte {problem.start}).") from None
    if "\0" in text:
        raise DatasetError(f"{key}: {shorten_path(path)} isn't text: it has a zero byte.")
    if not text.strip():
        raise DatasetError(f"{key}: {shorten_path(path)} holds only white space.")
    return text


def choose_column(path: Path, column: str | None) -> str:
    """Return the column of a file to read, by its first rows: the requested one, or the one that is obvious.

    Raises:
        DatasetError: the file is damaged, has no rows or no such column.
    """
    sample = [row for _, row in islice(READERS[path.suffix](path, None), ROWS_TO_PICK_A_COLUMN)]
    if not sample:
        raise DatasetError(f"dataset: {shorten_path(path)} has no rows.")
    columns = list(dict.fromkeys(name for row in sample for name in row))
    first = {name: next((row[name] for row in sample if row.get(name) is not None), None) for name in columns}
    return pick_column(columns, first, column, shorten_path(path))


def read_rows(path: Path, column: str | None, seed: int) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json, .csv or .parquet file, in the order of a seeded permutation.

    The text column goes through a temporary file, from which the rows are read in that order; memory holds their offsets alone.

    Raises:
        DatasetError: the file is damaged, has no rows, or a value of the column is neither text nor a chat.
    """
    chosen = choose_column(path, column)
    offsets = array("q")
    with tempfile.TemporaryFile(prefix="replaceme-") as scratch:
        for location, row in READERS[path.suffix](path, chosen):
            offsets.append(scratch.tell())
            scratch.write(json.dumps(convert_value(row.get(chosen), chosen, location)).encode() + b"\n")
        for index in seeded_order(len(offsets), seed).tolist():
            scratch.seek(offsets[index])
            yield json.loads(scratch.readline())


def read_json_lines(path: Path, _column: str | None = None, key: str = "dataset") -> Iterator[Record]:
    """Yield each row of a .jsonl file; empty lines are skipped. ``key`` is the parameter to name.

    Raises:
        DatasetError: it isn't UTF-8 text, a line is no JSON object, or there is no row.
    """
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            location = f"line {number} of {shorten_path(path)}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                raise DatasetError(f"{key}: {location} isn't UTF-8 text (byte {problem.start}).") from None
            if text.strip():
                empty = False
                yield location, _parse_row(text, location, key)
    if empty:
        raise DatasetError(f"{key}: {shorten_path(path)} has no rows.")


def _parse_row(text: str, location: str, key: str = "dataset") -> dict[str, Any]:
    """Return the object that a line of JSON holds."""
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # fails on half a surrogate pair, as of an emoji that was cut
    except (ValueError, RecursionError):
        raise DatasetError(f"{key}: {location} isn't JSON text.") from None
    if not isinstance(row, dict):
        raise DatasetError(f"{key}: {location} must be an object with columns, not {type(row).__name__}.")
    return row


def _read_json(path: Path, _column: str | None) -> Iterator[Record]:
    """Yield the rows of a .json file: one list of them, or one a line."""
    try:
        whole = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        yield from read_json_lines(path)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        location = f"row {number} of {shorten_path(path)}"
        yield location, _parse_row(json.dumps(row), location)


def _read_csv(path: Path, _column: str | None) -> Iterator[Record]:
    """Yield the rows of a .csv file: commas, a header, and in each row as many fields. A field that is a number is one."""
    name = shorten_path(path)
    csv.field_size_limit(max(path.stat().st_size, csv.field_size_limit()))
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            rows = (fields for fields in reader if fields)
            header = next(rows, [])
            if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise DatasetError(f"dataset: {name} separates its columns by {mark!r}; write it with commas.")
            if len(set(header)) < len(header):
                raise DatasetError(f"dataset: {name} has two columns of one name; its header is {excerpt(', '.join(header))}.")
            for fields in rows:
                location = f"line {reader.line_num} of {name}"
                if len(fields) != len(header):
                    counts = f"{len(fields)} fields, not the header's {len(header)}"
                    raise DatasetError(f"dataset: {location} has {counts}; quote a text that holds a comma.")
                yield location, dict(zip(header, map(_number_or_text, fields), strict=True))
    except UnicodeDecodeError as problem:
        raise DatasetError(f"dataset: {name} isn't UTF-8 text ({problem.reason}).") from None
    except csv.Error as problem:
        raise DatasetError(f"dataset: line {reader.line_num} of {name} can't be read as CSV ({problem}).") from None


def _number_or_text(field: str) -> float | str:
    """Return a field of a CSV file, where a number and a text look alike."""
    try:
        return number if math.isfinite(number := float(field)) else field
    except ValueError:
        return field


def _read_parquet(path: Path, column: str | None) -> Iterator[Record]:
    """Yield the rows of a .parquet file, of which only ``column`` is read (None: all)."""
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        # Pages are compared with their checksums, where the file has some.
        with ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=1000, columns=None if column is None else [column]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {shorten_path(path)}", row
    except Exception as failure:  # a damaged file shows in exceptions of many kinds
        if known := resource_failure(failure):
            raise known from failure
        reason = f"after row {number}: {excerpt(failure, 100)}"
        raise DatasetError(f"dataset: {shorten_path(path)} can't be read as Parquet ({reason}).") from failure


READERS: Mapping[str, Callable[[Path, str | None], Iterator[Record]]] = {
    ".jsonl": read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet,
}  # fmt: skip
SUFFIXES = (".txt", *READERS)
