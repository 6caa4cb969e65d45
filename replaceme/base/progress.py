"""Output during a run: one log line for each decision, and a progress bar for each loop over text."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm


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


def configure_logging() -> None:
    """Log this package's messages to standard error, without the libraries' ones."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def silence_libraries() -> None:
    """Turn off the progress bars and warnings of transformers and datasets, whether they are already loaded or not."""
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", DATASETS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def progress(
    items: Iterable[T], description: str, unit: str, total: int | None = None, note: Callable[[], str] | None = None
) -> Iterator[T]:
    """Iterate with a progress bar on a terminal, or with a line every 20 seconds if the output goes to a file.

    Args:
        items: what to iterate over.
        description: what is being done.
        unit: what the items are.
        total: their number, if ``len`` doesn't give it.
        note: returns the text after the bar's counts; called after each item.
    """
    terminal = sys.stderr.isatty()
    bar = tqdm(
        items,
        desc=description,
        unit=f" {unit}",
        total=total,
        leave=False if terminal else None,
        mininterval=0.2 if terminal else 20,
        dynamic_ncols=terminal,
    )
    return iter(bar) if note is None else _noted(bar, note)


def _noted(bar: "tqdm[T]", note: Callable[[], str]) -> Iterator[T]:
    for item in bar:
        yield item
        bar.set_postfix_str(note(), refresh=False)
