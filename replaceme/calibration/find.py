"""Find the text that ``dataset`` names, refuse an unusable one before any work, and identify its content."""

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
from replaceme.calibration import embedded, local, streamed
from replaceme.calibration.corpus import Corpus
from replaceme.calibration.sources import healing_params, list_sources, naming_heal_dataset, split_fingerprints
from replaceme.models import hub


@dataclass(frozen=True)
class DatasetSource:
    """A dataset of the hub, a local file or an embedded text.

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
        return {"sha256": embedded.fingerprint_text(self.source.name)}

    def check(self) -> None:
        """Raise DatasetError for a text that is empty or damaged at its start, or has no column to read.

        A hub dataset is looked at where the hub can be reached.
        """
        if self.commits and hub.reachable():
            streamed.check_rows(self.source, self.commits)
        if self.path and self.path.suffix == ".txt":
            local.read_text(self.path)
        elif self.path:
            local.choose_column(self.path, self.source.column)

    def open(self, seed: int) -> Corpus:
        """Return the text; documents are in the seeded order."""
        source = self.source
        if self.commits:
            return streamed.open_stream(source, seed, self.commits)
        if self.path:
            if self.path.suffix == ".txt":
                return Corpus([local.read_text(self.path)], running=True)
            return Corpus(local.read_rows(self.path, source.column, seed))
        articles = embedded.load_articles(source.name, source.split)
        order = seeded_order(len(articles), seed).tolist()
        return Corpus([articles[index] for index in order], running=embedded.TEXTS[source.name].running, plain=True)


def find_datasets(params: Params, fingerprints: Mapping[str, Any] | None = None) -> list[DatasetSource | None]:
    """Return what the entries of ``params.dataset`` name, in order; None for text that the model writes.

    Args:
        params: the parameters of the dataset.
        fingerprints: those of an earlier stage (``dataset_fingerprints``); their commits are read.

    Raises:
        DatasetError: there is no such file or dataset, or it can't be reached.
    """
    sources = list_sources(params)
    parts = split_fingerprints(fingerprints) if fingerprints else [{}] * len(sources)
    return [
        None if source.name == SELF else find_dataset(source, part.get("commits"))
        for source, part in zip(sources, parts, strict=True)
    ]


def dataset_fingerprints(params: Params) -> dict[str, Any]:
    """Return what identifies the content of all sources, independent of paths and time."""
    datasets = find_datasets(params)
    if isinstance(params.dataset, str):
        return {} if datasets[0] is None else datasets[0].fingerprint()
    parts = [dataset.fingerprint() if dataset else {SELF: True} for dataset in datasets]
    return {"sources": [{**part, **source.options()} for part, source in zip(parts, params.dataset, strict=True)]}


def healing_fingerprints(params: Params) -> dict[str, Any]:
    """Return what identifies the content of ``heal_dataset``; nothing where no text of its own is trained on."""
    if not params.heal_tokens or params.heal_dataset is None:
        return {}
    with naming_heal_dataset(params):
        return dataset_fingerprints(healing_params(params))


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
        _refuse_options(source, "config", "revision")
        _refuse_options(source, "column", allowed="text")
        splits = embedded.TEXTS[name].splits
        if source.split not in (None, *splits):
            raise DatasetError(f"dataset_split: {name} has no split '{excerpt(source.split)}'; it has {' and '.join(splits)}.")
        return DatasetSource(source)
    if path.exists() or path.suffix in local.SUFFIXES:
        local.check_file(path)
        _refuse_options(source, "config", "revision")
        _refuse_options(source, "split", allowed="train")
        if path.suffix == ".txt":
            _refuse_options(source, "column", allowed="text")
        return DatasetSource(source, path)
    repositories = streamed.list_repositories(name)
    if not all(map(hub.is_repository_id, repositories)):
        raise DatasetError(f"dataset: there is no file {excerpt(name)}; give a {', '.join(local.SUFFIXES)} file or a hub id.")
    if len(repositories) > 1:
        _refuse_options(source, "config", "revision")
    if commits is None:
        hint = nearest(name, embedded.TEXTS)
        commits = {repository: hub.resolve_commit(repository, "dataset", source.revision, hint) for repository in repositories}
    return DatasetSource(source, commits=commits)


def _refuse_options(source: Source, *options: str, allowed: str | None = None) -> None:
    """Refuse options that don't apply to this source, unless they are null or ``allowed``."""
    for option in options:
        if (value := getattr(source, option)) not in (None, allowed):
            raise DatasetError(f"dataset_{option}: '{excerpt(value)}' does not apply to {excerpt(source.name)}; use null.")
