"""Find the text that ``dataset`` names, refuse an unusable one before any work, and identify its content."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replaceme.base.documents import seeded_order
from replaceme.base.entries import SELF, Source
from replaceme.base.errors import DatasetError, excerpt
from replaceme.base.files import local_path
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params, nearest
from replaceme.corpora import embedded, local, streamed
from replaceme.corpora.corpus import Corpus
from replaceme.corpora.sources import by_source, sources_of
from replaceme.models import hub

# Tokens of a document of the model's own at most: a step of writing costs the more, the longer the documents are.
OWN_LENGTH = 512


@dataclass(frozen=True)
class DatasetSource:
    """A dataset that was found.

    Attributes:
        source: its name and options.
        path: the local file, or None.
        commits: hub repository → commit; empty for local and embedded text.
    """

    source: Source
    path: Path | None = None
    commits: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the content, independent of path and time."""
        if self.commits:
            return {"commits": self.commits}
        if self.path:
            return {"sha256": sha256_below(self.path)[self.path.name], "form": self.path.suffix}
        return {"sha256": embedded.text_fingerprint(self.source.name)}

    def open(self, seed: int) -> Corpus:
        """Return the text; documents are in the seeded order."""
        source = self.source
        if self.commits:
            return streamed.open_stream(source, seed, self.commits)
        if self.path:
            return local.open_file(self.path, source.column, seed)
        articles = embedded.text_articles(source.name, source.split)
        order = seeded_order(len(articles), seed).tolist()
        return Corpus([articles[index] for index in order], running=embedded.TEXTS[source.name].running, plain=True)


def find_datasets(params: Params, found: Mapping[str, Any] | None = None) -> list[DatasetSource | None]:
    """Return what the entries of ``params.dataset`` name, in order; None for text that the model writes.

    Args:
        params: the parameters of the dataset.
        found: the ``fingerprints`` of an earlier stage; their commits are read.

    Raises:
        DatasetError: there is no such file or dataset, or it can't be reached.
    """
    sources = sources_of(params)
    known = by_source(found) if found else [{}] * len(sources)
    return [
        None if source.name == SELF else find_dataset(source, each.get("commits"))
        for source, each in zip(sources, known, strict=True)
    ]


def fingerprints(params: Params) -> dict[str, Any]:
    """Return what identifies the content of all sources, independent of paths and time."""
    found = find_datasets(params)
    if isinstance(params.dataset, str):
        return {} if found[0] is None else found[0].fingerprint()
    parts = [dataset.fingerprint() if dataset else {SELF: True} for dataset in found]
    return {"sources": [{**part, **source.options()} for part, source in zip(parts, params.dataset, strict=True)]}


def own_documents(params: Params) -> int:
    """Return the number of documents that the dense model has to write, for its share of ``dataset_size`` documents' tokens.

    Its documents have ``OWN_LENGTH`` tokens, or ``max_length`` if that is less; the others have ``max_length`` at most.
    """
    sources = sources_of(params)
    whole = sum(source.share for source in sources)
    own = sum(source.share for source in sources if source.name == SELF)
    most = params.dataset_size * params.max_length * own / whole / min(OWN_LENGTH, params.max_length)
    return min(math.ceil(most) + 1, params.dataset_size) if own else 0


def find_dataset(source: Source, commits: dict[str, str] | None = None) -> DatasetSource:
    """Return the dataset that a source names.

    Args:
        source: its name and options.
        commits: hub repository → commit, as an earlier stage resolved them.

    Raises:
        DatasetError: there is no such file or dataset, or it can't be reached.
    """
    name = source.name
    path = local_path(name)
    if name in embedded.TEXTS:
        _refuse(source, "config", "revision")
        _refuse(source, "column", but="text")
        if source.split not in (None, *embedded.text_splits(name)):
            splits = " and ".join(embedded.text_splits(name))
            raise DatasetError(f"dataset_split: {name} has no split '{excerpt(source.split)}'; it has {splits}.")
        return DatasetSource(source)
    if path.exists() or path.suffix in local.SUFFIXES:
        local.check_file(path)
        _refuse(source, "config", "revision")
        _refuse(source, "split", but="train")
        if path.suffix == ".txt":
            _refuse(source, "column", but="text")
        return DatasetSource(source, path)
    repositories = streamed.repositories(name)
    if not all(map(hub.is_repository_id, repositories)):
        raise DatasetError(f"dataset: there is no file {excerpt(name)}; give a {', '.join(local.SUFFIXES)} file or a hub id.")
    if len(repositories) > 1:
        _refuse(source, "config", "revision")
    if commits is None:
        hint = nearest(name, embedded.TEXTS)
        commits = {repository: hub.resolve_commit(repository, "dataset", source.revision, hint) for repository in repositories}
    return DatasetSource(source, commits=commits)


def _refuse(source: Source, *options: str, but: str | None = None) -> None:
    """Refuse options that don't apply to this source; null and ``but``, which agrees with it, pass."""
    for option in options:
        if (value := getattr(source, option)) not in (None, but):
            raise DatasetError(f"dataset_{option}: '{excerpt(value)}' does not apply to {excerpt(source.name)}; use null.")
