"""A user's .jsonl file as a task: questions with choices, or text.

    {"question": "Water freezes at", "choices": ["0 °C", "10 °C"], "answer": 0}

Every row is checked before a model is loaded; an error names its line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from replaceme.base.entries import Task
from replaceme.base.errors import DatasetError, excerpt, quote
from replaceme.calibration.local import read_json_lines, shorten_path
from replaceme.evaluation.embedded_tasks import CHOICE, Items

# lm-eval's configuration of the questions, with the prompt of its task piqa.
QUESTION: Mapping[str, Any] = {**CHOICE, "doc_to_text": "Question: {{query}}\nAnswer:"}
# Columns that hold the text that several items can share; the first one that a row has counts.
PASSAGES = ("article", "passage", "paragraph", "story", "context")


def is_question_file(path: Path, task: Task) -> bool:
    """Return whether a file holds questions, by the task's column options or else by the columns of the first row."""
    if path.suffix != ".jsonl" or task.text:
        return False
    if task.question or task.choices or task.answer:
        return True
    _, row = next(read_json_lines(path, key="tasks"))
    if "question" in row and "choices" in row:
        return True
    if "text" in row:
        return False
    raise DatasetError(
        f"tasks: the rows of {shorten_path(path)} have neither question, choices and answer nor text; their columns are "
        f"{excerpt(', '.join(row)) or 'none'}, which options can name: {{{path.name}: {{question: …, choices: …, answer: …}}}}."
    )


def read_questions(path: Path, task: Task) -> Items:
    """Return the rows of a file as items ``{query, choices, gold}``, with the passage that a row belongs to, if it has one.

    Raises:
        DatasetError: a row is wrong; the message names the line.
    """
    question, answer, columns = task.question or "question", task.answer or "answer", task.choices or "choices"
    items = []
    for location, row in read_json_lines(path, key="tasks"):
        query = _get_value(row, question, location)
        if not isinstance(query, str) or not query.strip():
            raise DatasetError(f"tasks: {location}: '{question}' must be a text, not {quote(query)}.")
        choices = (
            _get_value(row, columns, location)
            if isinstance(columns, str)
            else [_get_value(row, name, location) for name in columns]
        )
        texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
        if not texts or len(choices) < 2:
            named = columns if isinstance(columns, str) else ", ".join(columns)
            raise DatasetError(f"tasks: {location}: '{named}' must give at least two texts, not {quote(choices)}.")
        gold = _get_value(row, answer, location)
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            positions = f"0 to {len(choices) - 1}"
            raise DatasetError(
                f"tasks: {location}: '{answer}' must be the right choice's position, {positions}, not {quote(gold)}."
            )
        passage = {name: row[name] for name in PASSAGES if isinstance(row.get(name), str)}
        items.append({**passage, "query": query, "choices": choices, "gold": gold})
    return items


def read_texts(path: Path, column: str) -> list[str]:
    """Return the texts of a column; rows without text are left out."""
    texts = []
    for location, row in read_json_lines(path, key="tasks"):
        text = _get_value(row, column, location)
        if text is not None and not isinstance(text, str):
            raise DatasetError(f"tasks: {location}: '{column}' must be a text, not {quote(text)}.")
        if text and text.strip():
            texts.append(text)
    if not texts:
        raise DatasetError(f"tasks: {shorten_path(path)} has no text in column '{column}'.")
    return texts


def _get_value(row: Mapping[str, Any], column: str, location: str) -> Any:
    if column not in row:
        raise DatasetError(
            f"tasks: {location} has no column '{excerpt(column)}'; its columns are {excerpt(', '.join(row)) or 'none'}."
        )
    return row[column]
