"""Text of hub datasets, streamed: rows are downloaded as needed, never the whole dataset."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from replaceme.base.entries import Source
from replaceme.base.errors import DatasetError, excerpt, resource_failure
from replaceme.calibration.corpus import Corpus, Row, convert_value, pick_column
from replaceme.models import hub

# The published program's dataset names, and the configuration that it reads of each.
ALIASES: dict[str, tuple[str, ...]] = {
    "slimorca": ("Open-Orca/SlimOrca",),
    "fineweb": ("HuggingFaceFW/fineweb",),
    "c4": ("allenai/c4",),
    "wikitext": ("Salesforce/wikitext",),
    "fineweb_and_orca": ("HuggingFaceFW/fineweb", "Open-Orca/SlimOrca"),
}
CONFIGS = {"HuggingFaceFW/fineweb": "sample-10BT", "allenai/c4": "en", "Salesforce/wikitext": "wikitext-2-raw-v1"}
# The domains of those that have one (``replaceme.calibration.embedded.Text``).
DOMAINS = {"Salesforce/wikitext": "encyclopedia", "Open-Orca/SlimOrca": "answers"}
SHUFFLE_ROWS = 10_000


def list_repositories(dataset: str) -> tuple[str, ...]:
    """Return the hub repositories that a ``dataset`` value names: one, or the parts of a mix."""
    return ALIASES.get(dataset.lower(), (dataset,))


def open_stream(source: Source, seed: int, commits: dict[str, str]) -> Corpus:
    """Return the corpus of a hub dataset, or of a mix that takes rows from its parts in turn.

    Args:
        source: the dataset's name and options.
        seed: of the shuffle.
        commits: hub repository → commit to read.
    """
    streams = [_stream_rows(name, commits[name], source, seed) for name in list_repositories(source.name)]
    return Corpus(streams[0] if len(streams) == 1 else _interleave(streams))


def check_rows(source: Source, commits: dict[str, str]) -> None:
    """Raise DatasetError if a hub dataset has no such configuration, split or column, or no rows (``open_stream``)."""
    for name in list_repositories(source.name):
        with _naming(name):
            _open_rows(name, commits[name], source)


def _stream_rows(name: str, commit: str, source: Source, seed: int) -> Iterator[Row]:
    if not hub.reachable():
        raise DatasetError(f"dataset: {name} is streamed, and the hub can't be reached.")
    with _naming(name):
        stream, column = _open_rows(name, commit, source)
        for row in stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS):
            yield convert_value(row[column], column, name)


def _open_rows(name: str, commit: str, source: Source) -> tuple[Any, str]:
    """Return the stream of a repository's rows, and the column to read; the first row has been read."""
    from datasets import load_dataset

    split = source.split or "train"
    stream = load_dataset(name, source.config or CONFIGS.get(name), split=split, streaming=True, revision=commit)
    first = next(iter(stream), None)
    if first is None:
        raise DatasetError(f"dataset: the split {split} of {name} has no rows.")
    return stream, pick_column(first, first, source.column, name)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Raise DatasetError with the repository's name for what fails inside the block."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as failure:
        if known := resource_failure(failure):
            raise known from failure
        # Unknown configurations, and any HTTP library's errors.
        reason = excerpt(failure, 150)
        raise DatasetError(f"dataset: {name} could not be read ({type(failure).__name__}: {reason}).") from failure


def _interleave(streams: list[Iterator[Row]]) -> Iterator[Row]:
    while streams:
        for stream in list(streams):
            try:
                yield next(stream)
            except StopIteration:
                streams.remove(stream)
