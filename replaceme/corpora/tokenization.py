"""Convert texts and chats to token ids, without the start-of-text token, which ``draw`` adds once per document.

Some chat templates write today's date into the system turn (Llama 3, Granite). Here it is always ``TODAY``, so that the same
chats give the same documents on every day.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, tzinfo
from typing import TYPE_CHECKING, NoReturn, Self
from unittest import mock

from replaceme.base.errors import DatasetError, excerpt
from replaceme.base.progress import logger
from replaceme.corpora.corpus import Chat, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_CHARACTERS = 1 << 20
# The date that Llama 3's template itself falls back on.
TODAY = date(2024, 7, 26)
# Of processor time, for one chat. Templates take milliseconds; the library's sandbox bounds one loop, but not nested ones.
TEMPLATE_SECONDS = 10.0


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text: usually one BOS, or none."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    marked = tokenizer.encode("a")
    for start in range(len(marked)):
        if marked[start : start + len(plain)] == plain:
            return list(marked[:start])
    return []


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


def rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase, *, reply: bool = False) -> str:
    """Return a chat as the text of the tokenizer's chat template, in which today is ``TODAY``.

    Args:
        chat: the turns.
        tokenizer: the tokenizer.
        reply: whether the assistant's next turn is begun.

    Raises:
        DatasetError: there is no chat template, it refuses the chat, or takes longer than ``TEMPLATE_SECONDS``.
    """
    if not tokenizer.chat_template:
        raise DatasetError("dataset_column: holds chats, but the model's tokenizer has no chat template; choose a text column.")
    try:
        # The templates' strftime_now asks this clock; transformers has no option for it.
        with _at_most(TEMPLATE_SECONDS), mock.patch("transformers.utils.chat_template_utils.datetime", _Calendar):
            return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=reply))
    except _TooLongError:
        slow = f"takes more than {TEMPLATE_SECONDS:g} s for a chat"
        raise DatasetError(f"dataset_column: the model's chat template {slow}; choose a text column.") from None
    except Exception as refusal:  # templates raise their own errors, for example on a system turn
        reason = excerpt(refusal, 150)
        raise DatasetError(f"dataset_column: the model's chat template refuses a chat ({reason}).") from refusal


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, prefix: list[int], *, reply: bool = False) -> list[int]:
    """Return a row's token ids, without the start-of-text ids; after a chat, with the beginning of a ``reply`` if wanted.

    Raises:
        DatasetError: the row is a chat and the tokenizer has no usable chat template.
    """
    text = rendered(row, tokenizer, reply=reply) if not isinstance(row, str) else row if row.strip() else ""
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    while prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    return ids


class _Calendar(datetime):
    """The clock of a chat template, in which each day is ``TODAY``."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        _say_date()
        return cls(TODAY.year, TODAY.month, TODAY.day, tzinfo=tz)


@functools.cache
def _say_date() -> None:
    logger.info("dataset: the chat template asks for today's date and always gets %s, so documents don't change by day", TODAY)


class _TooLongError(Exception):
    pass


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooLongError in the block when this process has computed for so long.

    It needs the main thread of a Unix system; elsewhere there is no limit. One long operation, as a huge power, goes on.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise _TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
