"""Kinds of tasks (embedded, the user's own file, lm-eval's), their checks before any work, and their texts and items.

- An embedded task (``replaceme.evaluation.embedded_tasks``) is made from the held-out part of an embedded text, or by code.
- A .txt file, or a .jsonl file with a column ``text``, is a perplexity task, named after the file without its suffix.
- A .jsonl file with the columns ``question``, ``choices`` (a list) and ``answer`` (index of the right choice, from 0) is a
  multiple-choice task. The task's options can name other columns.
- Any other name is a task, group or tag of lm-eval (``replaceme.evaluation.catalogue``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from replaceme.base.entries import COLUMNS, Task
from replaceme.base.errors import DatasetError, ParameterError, excerpt
from replaceme.base.files import local_path
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params, nearest
from replaceme.calibration import embedded, local
from replaceme.calibration.corpus import Row
from replaceme.evaluation import catalogue
from replaceme.evaluation.embedded_tasks import EMBEDDED, RETRIEVAL_VERSION, Items
from replaceme.evaluation.question_file import QUESTION, is_question_file, read_questions, read_texts

Kind = Literal["perplexity", "items", "lm-eval"]
HELD_OUT = "held-out"
FILE_SUFFIXES = (".txt", ".jsonl")


def task_fingerprints(params: Params) -> dict[str, Any]:
    """Check every task, and return what identifies its content (text, file or datasets) by the task's name.

    Raises:
        ParameterError: a task is unknown, has an option that it can't use, or shares its name with another.
        DatasetError: a file is missing or malformed, or a task's dataset can't be reached.
    """
    fingerprints: dict[str, Any] = {}
    entries: dict[str, str] = {}  # single task → the entry of params.yaml that it belongs to
    for task in params.tasks:
        name = task_name(task)
        if name in fingerprints:
            raise ParameterError(f"tasks: two tasks are named '{name}'; keep one, or rename a file.")
        for single in _single_tasks(task):
            if entries.setdefault(single, task.name) != task.name:
                both = f"in '{entries[single]}' and in '{task.name}'"
                raise ParameterError(f"tasks: {single} is {both}; keep one, or rename a file.")
        fingerprints[name] = _fingerprint(task)
        _check_options(task)
        if is_file(task):
            # Reading the whole file reports a wrong row before any work.
            task_texts(task) if task_kind(task) == "perplexity" else task_items(task)
    return fingerprints


def _single_tasks(task: Task) -> list[str]:
    from_lm_eval = task.name not in EMBEDDED and not is_file(task) and task.name in catalogue.task_index()
    return catalogue.list_single_tasks(task.name) if from_lm_eval else [task_name(task)]


def _fingerprint(task: Task) -> Any:
    if task.name in EMBEDDED:
        text = EMBEDDED[task.name].text
        return embedded.fingerprint_text(text) if text else f"{task.name}-v{RETRIEVAL_VERSION}"
    if is_file(task):
        local.check_file(_path(task), "tasks", FILE_SUFFIXES)
        return _hash_file(task)
    if task.name in catalogue.task_index():
        return catalogue.fingerprint_task(task.name)
    hint = nearest(task.name, [*EMBEDDED, *catalogue.task_index()], count=3)
    raise ParameterError(
        f"tasks: '{excerpt(task.name)}' is no task{hint}; use {', '.join(EMBEDDED)}, a task or group of lm-eval, "
        f"or a {' or '.join(FILE_SUFFIXES)} file."
    )


def check_unchanged(task: Task, fingerprint: Any) -> None:
    """Raise DatasetError if the task's file has changed since ``task_fingerprints`` read it."""
    if is_file(task) and _hash_file(task) != fingerprint:
        raise DatasetError(f"tasks: {_path(task)} changed while it was in use; run again.")


def is_file(task: Task) -> bool:
    """Return whether a task is the user's own file."""
    return task.name not in EMBEDDED and Path(task.name).suffix in FILE_SUFFIXES


def task_kind(task: Task) -> Kind:
    """Return a task's kind: lm-eval's, or its texts' perplexity, or items of its own."""
    if task.name in EMBEDDED:
        return "items" if EMBEDDED[task.name].make_items else "perplexity"
    if not is_file(task):
        return "lm-eval"
    return "items" if is_question_file(_path(task), task) else "perplexity"


def task_name(task: Task) -> str:
    """Return the task's name in metrics: its own, or the file's without suffix; dots and commas become underscores."""
    return Path(task.name).stem.replace(".", "_").replace(",", "_") if is_file(task) else task.name


def task_texts(task: Task) -> Sequence[Row]:
    """Return the documents of a perplexity task: texts or chats."""
    if task.name in EMBEDDED:
        return _load_articles(task)
    path = _path(task)
    return [local.read_text(path, "tasks")] if path.suffix == ".txt" else read_texts(path, task.text or "text")


def task_items(task: Task) -> Items:
    """Return the items of an embedded task or of a file of questions."""
    if (embedded_task := EMBEDDED.get(task.name)) and embedded_task.make_items:
        return embedded_task.make_items(text for text in _load_articles(task) if isinstance(text, str))
    return read_questions(_path(task), task)


def task_form(task: Task) -> Mapping[str, Any]:
    """Return lm-eval's configuration of a task's items."""
    return EMBEDDED[task.name].form or {} if task.name in EMBEDDED else QUESTION


def _load_articles(task: Task) -> list[Row]:
    text = EMBEDDED[task.name].text
    return embedded.load_articles(text, HELD_OUT) if text else []


def _path(task: Task) -> Path:
    return local_path(task.name)


def _hash_file(task: Task) -> str:
    path = _path(task)
    return sha256_below(path)[path.name]


def _check_options(task: Task) -> None:
    """Raise ParameterError for an option that would have no effect."""
    kind = task_kind(task)
    usable: tuple[str, ...] = () if kind == "perplexity" else ("fewshots", "limit")
    if is_file(task):
        usable += tuple(column for column in COLUMNS if (column == "text") == (kind == "perplexity"))
    for option in task.options():
        if option not in usable and not (option == "fewshots" and not task.fewshots):
            what = "is for the columns of a file" if option in COLUMNS else "counts items"
            hint = "; eval_tokens bounds a perplexity task" if option == "limit" else ""
            raise ParameterError(f"tasks: {option} {what}, of which {task_name(task)} has none{hint}; leave it out.")
    if is_file(task) and _path(task).suffix == ".txt" and task.text:
        raise DatasetError(f"tasks: {task_name(task)} is a .txt file and has no column '{task.text}'; leave text out.")
