"""What the user sees while it runs: one line for each decision, and a progress bar with counts for each loop over text."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns: the first to the left, the others to the right."""
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
    """Show this package's decisions on standard error, and keep the libraries' chatter away."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def silence_libraries() -> None:
    """Turn off progress bars and advice of transformers and datasets, loaded or yet to load: ours say what matters."""
    os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", DATASETS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


def progress(
    items: Iterable[T], description: str, unit: str, total: int | None = None, note: Callable[[], str] | None = None
) -> Iterator[T]:
    """Iterate with a bar on a terminal; where output goes to a file, a line every 20 seconds.

    Args:
        items: what to iterate over.
        description: what is being done.
        unit: what the items are.
        total: their number, where they don't know it.
        note: says, behind each item, what the bar shows behind its counts.
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
