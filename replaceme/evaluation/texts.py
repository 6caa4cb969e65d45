"""The tasks by name, and the text that each is made from.

A task is an embedded one, or the user's own file: a .txt or .jsonl (column ``text``) is a perplexity task under the
file's name without its ending.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from replaceme import embedded
from replaceme.corpora import local
from replaceme.errors import DatasetError, ParameterError
from replaceme.fingerprints import sha256_below
from replaceme.params import Params, nearest

Kind = Literal["perplexity", "continuation"]
HELD_OUT = "held-out"
# Name of the task → what it measures, and the embedded text whose held-out part it is made from.
EMBEDDED: Mapping[str, tuple[Kind, str]] = {
    "wikipedia": ("perplexity", "wikipedia-sample"),
    "wikipedia_continuation": ("continuation", "wikipedia-sample"),
}
FILE_SUFFIXES = (".txt", ".jsonl")


def task_fingerprints(params: Params) -> dict[str, str]:
    """Check every task, and return the identity of its text.

    Raises:
        ParameterError: a task is unknown, or two have the same name.
        DatasetError: a file is missing or empty.
    """
    fingerprints: dict[str, str] = {}
    for task in params.tasks:
        name = task_name(task)
        if name in fingerprints:
            raise ParameterError(f"tasks: two tasks are named '{name}'; rename one file.")
        if task in EMBEDDED:
            fingerprints[name] = embedded.text_fingerprint(EMBEDDED[task][1])
        elif Path(task).suffix in FILE_SUFFIXES:
            path = Path(task).expanduser()
            _check_task_file(path)
            fingerprints[name] = sha256_below(path)[path.name]
        else:
            known = ", ".join(EMBEDDED)
            raise ParameterError(
                f"tasks: '{task}' is not available{nearest(task, EMBEDDED)}; "
                f"use {known}, or a {' or '.join(FILE_SUFFIXES)} file of text."
            )
    return fingerprints


def task_kind(task: str) -> Kind:
    """Return what a task measures."""
    return EMBEDDED[task][0] if task in EMBEDDED else "perplexity"


def task_name(task: str) -> str:
    """Return the task's name in metrics: its own, or the file's without its ending, with nothing that a key can't hold."""
    return task if task in EMBEDDED else Path(task).stem.replace(".", "_").replace(",", "_")


def task_texts(task: str) -> list[str]:
    """Return the documents of a task's text."""
    if task in EMBEDDED:
        return embedded.text_articles(EMBEDDED[task][1], HELD_OUT)
    path = Path(task).expanduser()
    if path.suffix == ".txt":
        return [local.read_text(path, "tasks")]
    return [row for row in local.read_rows(path, "text", None, "tasks") if isinstance(row, str) and row.strip()]


def _check_task_file(path: Path) -> None:
    """Raise DatasetError unless the file is there and, for .jsonl, its first row has a text."""
    local.check_file(path, "tasks", FILE_SUFFIXES)
    if path.suffix == ".txt":
        return
    with path.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        raise DatasetError(f"tasks: the first row of {path} isn't JSON.") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        keys = ", ".join(row) if isinstance(row, dict) else "none"
        raise DatasetError(f"tasks: the rows of {path} have no column 'text' with text; the first one's columns are {keys}.")
