"""Reading every kind of local file, and refusing bad ones in a sentence."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from replaceme.base.documents import seeded_order
from replaceme.base.entries import Source
from replaceme.base.errors import DatasetError
from replaceme.calibration.corpus import Row
from replaceme.calibration.find import find_dataset
from replaceme.calibration.local import read_rows
from tests.conftest import made_text

CHAT = [{"from": "human", "value": "a river"}, {"from": "gpt", "value": "runs"}]
TURNS = [{"role": "user", "content": "a river"}, {"role": "assistant", "content": "runs"}]
EMPTY_TURNS = [{"role": "user", "content": None}]


def read(path: Path, column: str | None = None) -> list[Row]:
    return list(find_dataset(Source(str(path), column=column)).open(42).rows)


def rows_file(folder: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


def in_order(path: Path, wanted: str | None = None) -> list[Row]:
    """Return the rows in the order of the file."""
    rows = [*read_rows(path, wanted, 0)]
    return [rows[place] for place in seeded_order(len(rows), 0).argsort().tolist()]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_order_of_rows_is_the_seeded_permutation(tmp_path: Path, suffix: str) -> None:
    texts = [made_text(2, seed) for seed in range(300)]
    path = rows_file(tmp_path, [{"text": text, "n": 1} for text in texts], suffix)
    assert list(read_rows(path, None, 7)) == [texts[index] for index in seeded_order(300, 7).tolist()]


@pytest.mark.parametrize("name", ["a[1]*.csv", "a::b.jsonl", "zip::c?.parquet", "{x}.json"])
def test_a_file_name_is_taken_literally(tmp_path: Path, name: str) -> None:
    suffix = Path(name).suffix
    path = rows_file(tmp_path, [{"text": "the river"}], ".jsonl" if suffix == ".json" else suffix)
    assert read(path.rename(tmp_path / name)) == ["the river"]


def test_a_csv_field_is_a_text_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('\ufeffn,body\n1,NA\n2,"two\nlines, ""quoted"""\n\n3,nan\n4,\n', encoding="utf-8")
    assert in_order(tmp_path / "rows.csv") == ["NA", 'two\nlines, "quoted"', "nan", ""]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b", "n": 1}]',
        '{"text": "a"}\n{"text": "b"}\n',
        '\ufeff{"text": "a"}\n{"text": "b"}',
    ],
)
def test_a_json_file_is_a_list_of_rows_or_one_a_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content, encoding="utf-8")
    assert in_order(tmp_path / "rows.json") == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "wanted", "texts"),
    [
        ([{"conversations": CHAT, "id": 1}], "text", [TURNS]),
        ([{"body": "the river", "n": 1}], None, ["the river"]),
        # The first value is missing.
        ([{"body": None}, {"body": "the river"}], None, ["", "the river"]),
        ([{"messages": []}, {"messages": EMPTY_TURNS}], "messages", ["", [{"role": "user", "content": ""}]]),
    ],
)
def test_the_column_with_the_text_or_the_chats_is_found(
    rows: list[dict[str, Any]], wanted: str | None, texts: list[Row], tmp_path: Path
) -> None:
    assert in_order(rows_file(tmp_path, rows), wanted) == texts


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "", "empty.txt is empty"),
        ("blank.txt", " \n", "holds only white space"),
        ("latin.txt", "déjà vu".encode("latin-1"), "isn't UTF-8 text (byte 1)"),
        ("binary.txt", "PAR1\0\0", "{path} isn't text: it has a zero byte"),
        ("data.xml", "<a/>", "ends in '.xml'"),
        ("bad.jsonl", "{no json\n", "bad.jsonl isn't JSON text"),
        ("emoji.jsonl", '{"text": "\\ud83d"}', "line 1 of {path} isn't JSON text"),
        ("empty.jsonl", "\n", "{path} has no rows"),
        ("columns.jsonl", '{"a": "x", "b": "y"}\n', "its columns are a, b"),
        ("parts.jsonl", json.dumps({"messages": PARTS}), "a chat turn holds list, not text"),
        ("wrong.jsonl", '{"text": 3}\n', "neither text nor a list of chat turns"),
        ("latin.jsonl", b'{"text": "\xff"}\n', "line 1 of {path} isn't UTF-8 text (byte 10)"),
        ("latin.csv", "text\ndéjà vu\n".encode("latin-1"), "{path} isn't UTF-8 text"),
        ("list.jsonl", '{"text": "a"}\n["b"]\n', "line 2 of {path} must be an object with columns, not list"),
        ("list.json", '[{"text": "a"}, 3]', "row 2 of {path} must be an object with columns, not int"),
        ("mixed.jsonl", '{"text": "a"}\n{"text": true}\n', "'text' of line 2 of {path} holds bool, neither text nor a list"),
        ("mixed.csv", "text\nhello\n12\n", "'text' of line 3 of {path} holds float, neither text nor a list"),
        ("semicolons.csv", "id;text\n1;hello, you\n2;b\n", "{path} separates its columns by ';'; write it with commas"),
        ("fields.csv", "text\na,b\n", "line 2 of {path} has 2 fields, not the header's 1; quote a text that holds a comma"),
        ("short.csv", "id,text\n1,a\n2\n", "line 3 of {path} has 1 fields, not the header's 2"),
        ("twins.csv", "text,text\na,b\n", "{path} has two columns of one name; its header is text, text"),
        ("quotes.csv", 'text\n"a\n', "{path} can't be read as CSV (unexpected end of data)"),
        ("header.csv", "text\n", "{path} has no rows"),
        ("zip.parquet", b"PK\x03\x04" * 9, "{path} can't be read as Parquet (after row 0: Parquet magic bytes not found"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as caught:
        read(path)
    assert said.replace("{path}", str(path)) in str(caught.value)


def test_a_missing_file_a_folder_and_a_missing_column_are_named(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "nowhere.txt", "there is no file"), (tmp_path / "rows.jsonl", "is a folder")):
        (tmp_path / "rows.jsonl").mkdir(exist_ok=True)
        with pytest.raises(DatasetError, match=rf"dataset: .*{said}.*; give a \.txt, \.jsonl, \.json, \.csv, \.parquet file"):
            read(path)
    (tmp_path / "rows.jsonl").rmdir()
    with pytest.raises(DatasetError, match="no column 'body'; its columns are text"):
        read(rows_file(tmp_path, [{"text": "a"}]), "body")
