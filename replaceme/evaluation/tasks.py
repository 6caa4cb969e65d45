"""Kinds of tasks (embedded, the user's own file, lm-eval's), their checks before any work, and their items.

- An embedded task is made from the held-out part of an embedded text, each of one domain, or by seeded code.
- A .txt file, or a .jsonl file with a column ``text``, is a perplexity task, named after the file without its suffix.
- A .jsonl file with the columns ``question``, ``choices`` (a list) and ``answer`` (index of the right choice, from 0) is a
  multiple-choice task. The task's options can name other columns.
- Any other name is a task, group or tag of lm-eval (``replaceme.evaluation.catalogue``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from replaceme.base.entries import COLUMNS, Task
from replaceme.base.errors import DatasetError, ParameterError, excerpt
from replaceme.base.files import local_path
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params, nearest
from replaceme.corpora import embedded, local
from replaceme.corpora.corpus import Row
from replaceme.evaluation import catalogue
from replaceme.evaluation.continuation import continuation_items
from replaceme.evaluation.last_word import last_word_items
from replaceme.evaluation.question_file import is_question_file, read_questions, read_texts
from replaceme.evaluation.retrieval import VERSION, retrieval_items

Kind = Literal["perplexity", "choice", "word", "generation", "lm-eval"]
Items = list[dict[str, Any]]
HELD_OUT = "held-out"
# Kind of each embedded task, and its text; None if its items are made by seeded code.
EMBEDDED: Mapping[str, tuple[Kind, str | None]] = {
    "wikipedia": ("perplexity", "wikipedia-sample"),
    "bbc_news": ("perplexity", "bbc-news"),
    "gutenberg_fiction": ("perplexity", "gutenberg-fiction"),
    "python_code": ("perplexity", "python-code"),
    "finance_answers": ("perplexity", "finance-answers"),
    "medical_abstracts": ("perplexity", "medical-abstracts"),
    "convention_speeches": ("perplexity", "convention-speeches"),
    "wikipedia_last_word": ("word", "wikipedia-sample"),
    "wikipedia_continuation": ("choice", "wikipedia-sample"),
    "retrieval_exact": ("generation", None),
}
MAKERS: Mapping[str, Callable[[Iterable[str]], Items]] = {
    "wikipedia_last_word": last_word_items,
    "wikipedia_continuation": continuation_items,
}
FILE_SUFFIXES = (".txt", ".jsonl")


def task_fingerprints(params: Params) -> dict[str, Any]:
    """Check every task, and return the identity of its source (text, file or datasets) by the task's name.

    Raises:
        ParameterError: a task is unknown, has an option that it can't use, or shares its name with another.
        DatasetError: a file is missing or malformed, or a task's dataset can't be reached.
    """
    fingerprints: dict[str, Any] = {}
    seen: dict[str, str] = {}  # single task → the entry of params.yaml that it belongs to
    for task in params.tasks:
        name = task_name(task)
        if name in fingerprints:
            raise ParameterError(f"tasks: two tasks are named '{name}'; keep one, or rename a file.")
        library = not is_file(task) and task.name not in EMBEDDED and catalogue.has(task.name)
        for single in catalogue.members(task.name) if library else [name]:
            if seen.setdefault(single, task.name) != task.name:
                raise ParameterError(
                    f"tasks: {single} is in '{seen[single]}' and in '{task.name}'; keep one, or rename a file."
                )
        if task.name in EMBEDDED:
            text = EMBEDDED[task.name][1]
            fingerprints[name] = embedded.text_fingerprint(text) if text else f"{task.name}-v{VERSION}"
        elif is_file(task):
            path = _path(task)
            local.check_file(path, "tasks", FILE_SUFFIXES)
            fingerprints[name] = sha256_below(path)[path.name]
        elif library:
            fingerprints[name] = catalogue.identity(task.name)
        else:
            hint = nearest(task.name, [*EMBEDDED, *catalogue.names()], count=3)
            raise ParameterError(
                f"tasks: '{excerpt(task.name)}' is no task{hint}; use {', '.join(EMBEDDED)}, a task or group of lm-eval, "
                f"or a {' or '.join(FILE_SUFFIXES)} file."
            )
        _check_options(task)
        if is_file(task):
            # Reading the whole file reports a wrong row before any work.
            task_texts(task) if task_kind(task) == "perplexity" else task_items(task)
    return fingerprints


def check_unchanged(task: Task, found: Any) -> None:
    """Raise DatasetError if the task's file has changed since ``task_fingerprints`` read it."""
    if is_file(task) and sha256_below(path := _path(task))[path.name] != found:
        raise DatasetError(f"tasks: {path} changed while it was in use; run again.")


def is_file(task: Task) -> bool:
    """Tell whether a task is the user's own file."""
    return task.name not in EMBEDDED and Path(task.name).suffix in FILE_SUFFIXES


def task_kind(task: Task) -> Kind:
    """Return a task's kind."""
    if task.name in EMBEDDED:
        return EMBEDDED[task.name][0]
    if not is_file(task):
        return "lm-eval"
    return "choice" if is_question_file(_path(task), task) else "perplexity"


def task_name(task: Task) -> str:
    """Return the task's name in metrics: its own, or the file's without suffix; dots and commas become underscores."""
    return Path(task.name).stem.replace(".", "_").replace(",", "_") if is_file(task) else task.name


def task_texts(task: Task) -> Sequence[Row]:
    """Return the documents of a perplexity task: texts or chats."""
    if task.name in EMBEDDED:
        return _articles(task)
    path = _path(task)
    return [local.read_text(path, "tasks")] if path.suffix == ".txt" else read_texts(path, task.text or "text")


def task_items(task: Task) -> Items:
    """Return a task's items: choice ``{query, choices, gold}``, word ``{context, word}``, generation ``{query, answer}``."""
    if task.name in MAKERS:
        return MAKERS[task.name](text for text in _articles(task) if isinstance(text, str))
    if task_kind(task) == "generation":
        return retrieval_items()
    return read_questions(_path(task), task)


def _articles(task: Task) -> list[Row]:
    text = EMBEDDED[task.name][1]
    return embedded.text_articles(text, HELD_OUT) if text else []


def _path(task: Task) -> Path:
    return local_path(task.name)


def _check_options(task: Task) -> None:
    """Raise ParameterError for an option that would have no effect."""
    kind = task_kind(task)
    usable: tuple[str, ...] = () if kind == "perplexity" else ("fewshots", "limit")
    if is_file(task):
        usable += tuple(column for column in COLUMNS if (column == "text") == (kind == "perplexity"))
    for option in task.options():
        nothing_asked = option == "fewshots" and not task.fewshots
        if option not in usable and not nothing_asked:
            what = "is for the columns of a file" if option in COLUMNS else "counts items"
            hint = "; eval_tokens bounds a perplexity task" if option == "limit" else ""
            raise ParameterError(f"tasks: {option} {what}, of which {task_name(task)} has none{hint}; leave it out.")
    if is_file(task) and _path(task).suffix == ".txt" and task.text:
        raise DatasetError(f"tasks: {task_name(task)} is a .txt file and has no column '{task.text}'; leave text out.")
