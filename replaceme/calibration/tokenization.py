"""Convert texts and chats to token ids, without the start-of-text token, which ``draw`` adds once per document.

Some chat templates write today's date into the system turn (Llama 3, Granite). Here it is always ``TODAY``, so that the same
chats give the same documents on every day.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from datetime import date, datetime, tzinfo
from typing import TYPE_CHECKING, Self
from unittest import mock

from replaceme.base.errors import DatasetError, excerpt
from replaceme.base.progress import logger
from replaceme.calibration.corpus import Chat, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_CHARACTERS = 1 << 20
# The date that Llama 3's template itself falls back on.
TODAY = date(2024, 7, 26)


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text: usually one BOS, or none."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    marked = tokenizer.encode("a")
    for start in range(len(marked)):
        if marked[start : start + len(plain)] == plain:
            return list(marked[:start])
    return []


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, prefix: list[int], *, reply: bool = False) -> list[int]:
    """Return a row's token ids, without the start-of-text ids ``prefix``.

    Args:
        row: a text or a chat.
        tokenizer: the tokenizer.
        prefix: its start-of-text ids, which a chat template may write too.
        reply: whether the beginning of the assistant's next turn follows a chat.

    Raises:
        DatasetError: the row is a chat and the tokenizer has no usable chat template.
    """
    text = render_chat(row, tokenizer, reply=reply) if not isinstance(row, str) else row if row.strip() else ""
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    while prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    return ids


def encode_in_chunks(text: str, tokenizer: PreTrainedTokenizerBase, prefix: list[int]) -> Iterator[list[int]]:
    """Yield the ids of a long text in chunks of at most ``CHUNK_CHARACTERS``, to bound the tokenizer's memory.

    A chunk ends after a line, else before a space, else anywhere.
    """
    start = 0
    while start < len(text):
        end = start + CHUNK_CHARACTERS
        if end < len(text):
            line, word = text.rfind("\n", start, end) + 1, text.rfind(" ", start, end)
            end = line or max(word, 0) or end
        yield encode(text[start:end], tokenizer, prefix)
        start = end


def render_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, reply: bool = False) -> str:
    """Return a chat as the text of the tokenizer's chat template, and with ``reply`` the beginning of the next turn.

    Raises:
        DatasetError: there is no chat template, or it refuses the chat.
    """
    if not tokenizer.chat_template:
        raise DatasetError("dataset_column: holds chats, but the model's tokenizer has no chat template; choose a text column.")
    try:
        # The templates' strftime_now asks this clock; transformers has no option for it.
        with mock.patch("transformers.utils.chat_template_utils.datetime", _FixedClock):
            return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=reply))
    except Exception as refusal:  # templates raise their own errors, for example on a system turn
        reason = excerpt(refusal, 150)
        raise DatasetError(f"dataset_column: the model's chat template refuses a chat ({reason}).") from refusal


class _FixedClock(datetime):
    """The clock of a chat template, in which each day is ``TODAY``."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        _log_today()
        return cls(TODAY.year, TODAY.month, TODAY.day, tzinfo=tz)


@functools.cache
def _log_today() -> None:
    logger.info("dataset: the chat template asks for today's date and always gets %s, so documents don't change by day", TODAY)
