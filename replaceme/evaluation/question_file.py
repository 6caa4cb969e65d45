"""A user's .jsonl file as a task: questions with choices, or text.

    {"question": "Water freezes at", "choices": ["0 °C", "10 °C"], "answer": 0}

Every row is checked before a model is loaded; an error names its line.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replaceme.base.entries import Task
from replaceme.base.errors import DatasetError, excerpt, shown
from replaceme.corpora.local import json_lines, short

# Columns that hold the text that several items can share; the first one that a row has counts.
PASSAGES = ("article", "passage", "paragraph", "story", "context")


def is_question_file(path: Path, task: Task) -> bool:
    """Tell whether a file holds questions, by the task's column options or else by the columns of the first row."""
    if path.suffix != ".jsonl" or task.text:
        return False
    if task.question or task.choices or task.answer:
        return True
    _, row = next(_rows(path))
    if "question" in row and "choices" in row:
        return True
    if "text" in row:
        return False
    raise DatasetError(
        f"tasks: the rows of {short(path)} have neither question, choices and answer nor text; their columns are "
        f"{excerpt(', '.join(row)) or 'none'}, which options can name: {{{path.name}: {{question: …, choices: …, answer: …}}}}."
    )


def read_questions(path: Path, task: Task) -> list[dict[str, Any]]:
    """Return the rows of a file as items ``{query, choices, gold}``, with the passage that a row belongs to, if it has one.

    Raises:
        DatasetError: a row is wrong; the message names the line.
    """
    question, answer, columns = task.question or "question", task.answer or "answer", task.choices or "choices"
    items = []
    for place, row in _rows(path):
        query = _column(row, question, place)
        if not isinstance(query, str) or not query.strip():
            raise DatasetError(f"tasks: {place}: '{question}' must be a text, not {shown(query)}.")
        choices = _column(row, columns, place) if isinstance(columns, str) else [_column(row, name, place) for name in columns]
        texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
        if not texts or len(choices) < 2:
            named = columns if isinstance(columns, str) else ", ".join(columns)
            raise DatasetError(f"tasks: {place}: '{named}' must give at least two texts, not {shown(choices)}.")
        gold = _column(row, answer, place)
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            wanted = f"the right choice's position, 0 to {len(choices) - 1}"
            raise DatasetError(f"tasks: {place}: '{answer}' must be {wanted}, not {shown(gold)}.")
        passage = {name: row[name] for name in PASSAGES if isinstance(row.get(name), str)}
        items.append({**passage, "query": query, "choices": choices, "gold": gold})
    return items


def read_texts(path: Path, column: str) -> list[str]:
    """Return the texts of a column; rows without text are left out."""
    texts = []
    for place, row in _rows(path):
        text = _column(row, column, place)
        if text is not None and not isinstance(text, str):
            raise DatasetError(f"tasks: {place}: '{column}' must be a text, not {shown(text)}.")
        if text and text.strip():
            texts.append(text)
    if not texts:
        raise DatasetError(f"tasks: {short(path)} has no text in column '{column}'.")
    return texts


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place in the file, for messages."""
    found = False
    for found_row in json_lines(path, "tasks"):
        found = True
        yield found_row
    if not found:
        raise DatasetError(f"tasks: {short(path)} has no rows.")


def _column(row: dict[str, Any], name: str, place: str) -> Any:
    if name not in row:
        raise DatasetError(
            f"tasks: {place} has no column '{excerpt(name)}'; its columns are {excerpt(', '.join(row)) or 'none'}."
        )
    return row[name]
