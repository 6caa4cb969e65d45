"""Output during a run: one log line for each decision, and the progress of each loop over text.

On a terminal, a loop has a progress bar. In a file or a pipe, it has whole lines: after 5 seconds, and the longer it takes, the
fewer.
"""

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TypeVar

from tqdm import tqdm

from replaceme.base.ranks import world_size


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns: the first one left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


T = TypeVar("T")
logger = logging.getLogger("replaceme")
# Seconds between two lines: so many, or this part of the loop's time so far.
LINE_SECONDS, LINE_PART = 5.0, 0.1


def configure_logging() -> None:
    """Log this package's messages to standard error, without the libraries' ones."""
    # A printed table keeps its order among them where both go to one file.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    handler = _AboveBars() if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    # Of several processes, only the first one logs, after it has joined them.
    logger.setLevel(logging.ERROR if world_size() > 1 else logging.INFO)
    logger.propagate = False


class _AboveBars(logging.Handler):
    """Writes messages to a terminal, above the bars that are shown at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as logging's own handlers do
            self.handleError(record)


def silence_libraries(load: bool = False) -> None:
    """Turn off the progress bars and warnings of the libraries, whether they are already loaded or not.

    On a terminal, the hub's client keeps its bars of downloads, and transformers, when it is loaded, takes over that bars are
    on. So a command that will use transformers has it loaded here first (``load``).
    """
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", DATASETS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if load:
        import transformers.utils.logging
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()


def progress(
    items: Iterable[T], description: str, unit: str, total: int | None = None, note: Callable[[], str] | None = None
) -> Iterator[T]:
    """Iterate with a progress bar on a terminal, or with log lines if the output goes to a file.

    Args:
        items: what to iterate over.
        description: what is being done.
        unit: what the items are.
        total: their number, if ``len`` doesn't give it.
        note: returns the text after the counts; called after an item.
    """
    if not logger.isEnabledFor(logging.INFO):
        return iter(items)
    if not sys.stderr.isatty():
        known = len(items) if total is None and isinstance(items, Sized) else total
        return _with_lines(items, description, unit, known, note)
    bar = tqdm(items, desc=description, unit=f" {unit}", total=total, leave=False, mininterval=0.2, dynamic_ncols=True)
    return iter(bar) if note is None else _noted(bar, note)


def _noted(bar: "tqdm[T]", note: Callable[[], str]) -> Iterator[T]:
    for item in bar:
        yield item
        bar.set_postfix_str(note(), refresh=False)


def _with_lines(
    items: Iterable[T], description: str, unit: str, total: int | None, note: Callable[[], str] | None
) -> Iterator[T]:
    """Iterate; after an item, log how far the loop is, unless there was a line not long ago.

    What is left is known from the second item on: the first one can take much longer than the others, or much less.
    """
    began = last = time.monotonic()
    after_first = began
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        after_first = now if count == 1 else after_first
        if now - last < max(LINE_SECONDS, LINE_PART * (now - began)):
            continue
        last = now
        words = [f"{count} of {total} {unit}" if total else f"{count} {unit}", f"{tqdm.format_interval(now - began)} so far"]
        if total and 1 < count < total:
            left = (now - after_first) / (count - 1) * (total - count)
            words.append(f"about {tqdm.format_interval(left)} to go")
        logger.info("%s: %s", description, ", ".join([*words, *([note()] if note else [])]))
