"""The common form of text from every source: rows that are texts or chats."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from replaceme.base.errors import DatasetError, excerpt
from replaceme.base.progress import logger

Chat = list[dict[str, str]]
Row = str | Chat

# ShareGPT's names for the roles of a conversation (SlimOrca uses them) → ours.
ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Corpus:
    """Rows of text, in the order of use.

    Attributes:
        rows: texts or chats.
        running: whether rows are long texts to cut into documents; else each row is a document.
        plain: whether chats become plain text where the tokenizer has no chat template; else they are refused.
    """

    rows: Iterable[Row]
    running: bool = False
    plain: bool = False


def plain_text(row: Row) -> str:
    """Return a row as text: a chat with the roles' names before the turns."""
    return row if isinstance(row, str) else "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in row)


def pick_column(columns: Iterable[str], first: Mapping[str, Any], requested: str | None, name: str) -> str:
    """Return the column to read.

    Args:
        columns: the dataset's columns.
        first: its first row; a chat column is recognised by its value.
        requested: the parameter ``dataset_column``.
        name: the dataset's name in messages.

    Raises:
        DatasetError: the column is missing, or none can be chosen; the message lists the columns.
    """
    columns = list(columns)
    if requested in columns:
        return str(requested)
    chosen = [column for column in columns if is_chat(first.get(column))]
    if requested is None:
        texts = [column for column in columns if isinstance(first.get(column), str)]
        chosen = ["text"] if "text" in columns else chosen or (texts if len(texts) == 1 else [])
    elif chosen:
        logger.info("dataset_column: %s has no column '%s'; its chat column '%s' is used", name, requested, chosen[0])
    if chosen:
        return chosen[0]
    problem = f"{name} has no column '{excerpt(requested)}'" if requested else f"the text column of {name} isn't obvious"
    entry = f"; in a list, {{{name}: {{column: {excerpt(columns[0])}}}}} names one" if columns else ""
    raise DatasetError(f"dataset_column: {problem}; its columns are {excerpt(', '.join(columns)) or 'none'}{entry}.")


def is_chat(value: Any) -> bool:
    """Return whether a value is a list of turns, in the role/content or the from/value form."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn)) for turn in value
        )
    )


def convert_value(value: Any, column: str, name: str) -> Row:
    """Return a value of the column as text, or as chat with all its turns; a missing value is an empty text."""
    if value is None or value == []:
        return ""
    if isinstance(value, str):
        return value
    if is_chat(value):
        return [_convert_turn(turn) for turn in value]
    raise DatasetError(
        f"dataset_column: '{excerpt(column)}' of {name} holds {type(value).__name__}, neither text nor a list of chat turns."
    )


def _convert_turn(turn: Mapping[str, Any]) -> dict[str, str]:
    role = str(turn.get("role") or turn.get("from"))
    content = turn.get("content") if "content" in turn else turn.get("value")
    if content is not None and not isinstance(content, str):
        raise DatasetError(f"dataset_column: a chat turn holds {type(content).__name__}, not text; flatten it to text first.")
    return {"role": ROLES.get(role, role), "content": content or ""}
