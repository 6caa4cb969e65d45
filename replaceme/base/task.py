"""Evaluation tasks: a name with options, as given in params.yaml or on the command line.

    tasks: [wikipedia, {winogrande: {fewshots: 5, limit: 200}}, my-questions.jsonl]

The published program's form, one mapping ``{piqa: {fewshots: 0}}``, and its task ``default`` are accepted too.
"""

import difflib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from replaceme.base.errors import excerpt, shown

# The published table's tasks (ReplaceMe, arXiv 2505.02819, table 1); they need the hub.
PUBLISHED = ("boolq", "hellaswag", "piqa", "mmlu")
DEFAULT = "default"
MAX_CHARACTERS, MAX_NAME_BYTES = 1000, 255


@dataclass(frozen=True)
class Task:
    """A task to evaluate.

    Attributes:
        name: an embedded task, a task or group of lm-eval, or a .jsonl or .txt file.
        fewshots: solved examples before each item; None is the task's own number.
        limit: score only the first items, this many (in a group: of each task); None scores all.
        text: column of a file that holds the text; None is ``text``.
        question: column of a file that holds the question; None is ``question``.
        choices: column of a file that holds the list of choices, or the columns that hold one each; None is ``choices``.
        answer: column of a file that holds the right choice's position, from 0; None is ``answer``.
    """

    name: str
    fewshots: int | None = None
    limit: int | None = None
    text: str | None = None
    question: str | None = None
    choices: str | tuple[str, ...] | None = None
    answer: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that are set."""
        return {
            field.name: value
            for field in fields(self)
            if field.name != "name" and (value := getattr(self, field.name)) is not None
        }

    def plain(self) -> str | dict[str, dict[str, Any]]:
        """Return the task as written in params.yaml."""
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in self.options().items()}
        return {self.name: options} if options else self.name


OPTIONS = tuple(field.name for field in fields(Task) if field.name != "name")
COLUMNS = ("text", "question", "choices", "answer")


def parse_tasks(raw: Any, problems: list[str]) -> tuple[Task, ...]:
    """Return the tasks in a value of ``tasks``, and append a sentence to ``problems`` for each mistake."""
    if raw is None:
        return ()
    if isinstance(raw, str):
        raw = [raw]
    if isinstance(raw, Mapping):
        raw = [{name: options} for name, options in raw.items()]
    # ``default`` stands for the published tasks, each with its options.
    if not isinstance(raw, list | tuple):
        problems.append(f"tasks: must be a list of task names, not {shown(raw)}.")
        return ()
    tasks = [_parse_one(entry, problems) for given in raw for entry in _expanded(given)]
    return tuple(task for task in tasks if task)


def _expanded(entry: Any) -> list[Any]:
    if entry == DEFAULT:
        return list(PUBLISHED)
    if isinstance(entry, Mapping) and set(entry) == {DEFAULT}:
        return [{name: entry[DEFAULT]} for name in PUBLISHED]
    return [entry]


def _parse_one(entry: Any, problems: list[str]) -> Task | None:
    if isinstance(entry, Task):
        return entry
    if isinstance(entry, str) and entry:
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(name := next(iter(entry)), str):
        problems.append(f"tasks: an entry must be a name or one {{name: {{fewshots: 5}}}}, not {shown(entry)}.")
        return None
    if wanted := unusable_text(name):
        problems.append(f"tasks: a name must be {wanted}, not {shown(name)}.")
        return None
    options = {} if entry[name] is None else entry[name]
    if not isinstance(options, Mapping):
        problems.append(f"tasks: {excerpt(name)} must have options like {{fewshots: 0}}, not {shown(options)}.")
        return None
    wrong = [sentence for key, value in options.items() if (sentence := _wrong_option(name, key, value))]
    problems += wrong
    if wrong:
        return None
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return Task(name, **values)


def _wrong_option(name: str, key: Any, value: Any) -> str | None:
    name = excerpt(name)
    if key not in OPTIONS:
        close = difflib.get_close_matches(str(key)[:200], OPTIONS, n=1, cutoff=0.5)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        return f"tasks: {name} has no option '{excerpt(key)}'{hint}; there are {', '.join(OPTIONS)}."
    if value is None:
        return None
    if key in ("fewshots", "limit"):
        least = 1 if key == "limit" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            return f"tasks: {key} of {name} must be a whole number of at least {least}, not {shown(value)}."
        return None
    several = key == "choices" and isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(x, str) for x in value)
    if not (isinstance(value, str) or several):
        lists = " or a list of such names" if key == "choices" else ""
        return f"tasks: {key} of {name} must be the name of a column{lists}, not {shown(value)}."
    return None


def unusable_text(text: str) -> str | None:
    """Return what a text (a name, a path) should be, if it is longer than any or has characters that none has; else None."""
    if len(text) > MAX_CHARACTERS:
        return f"a text of at most {MAX_CHARACTERS} characters"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        return "a text without control characters"
    if any(len(part.encode()) > MAX_NAME_BYTES for part in text.split("/")):
        return f"a text of which no name of a file or folder is longer than {MAX_NAME_BYTES} bytes"
    return None
