"""Find the text that ``dataset`` names, refuse an unusable one before any work, and identify its content."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replaceme.base.documents import seeded_order
from replaceme.base.errors import DatasetError, excerpt
from replaceme.base.files import local_path
from replaceme.base.fingerprints import sha256_below
from replaceme.base.params import Params, nearest
from replaceme.corpora import embedded, local, streamed
from replaceme.corpora.corpus import Corpus
from replaceme.models import hub


@dataclass(frozen=True)
class DatasetSource:
    """A dataset that was found.

    Attributes:
        params: the parameters that select it.
        path: the local file, or None.
        commits: hub repository → commit; empty for local and embedded text.
    """

    params: Params
    path: Path | None = None
    commits: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the content, independent of path and time."""
        if self.commits:
            return {"commits": self.commits}
        if self.path:
            return {"sha256": sha256_below(self.path)[self.path.name], "form": self.path.suffix}
        return {"sha256": embedded.text_fingerprint(self.params.dataset)}

    def open(self) -> Corpus:
        """Return the text; documents are in the seeded order."""
        params = self.params
        if self.commits:
            return streamed.open_stream(params, self.commits)
        if self.path:
            return local.open_file(self.path, params.dataset_column, params.seed)
        articles = embedded.text_articles(params.dataset, params.dataset_split)
        order = seeded_order(len(articles), params.seed).tolist()
        return Corpus([articles[index] for index in order], running=params.dataset in embedded.RUNNING)


def find_dataset(params: Params, commits: dict[str, str] | None = None) -> DatasetSource:
    """Return the source that ``params.dataset`` names.

    Args:
        params: the parameters of the dataset.
        commits: hub repository → commit, as an earlier stage resolved them.

    Raises:
        DatasetError: there is no such file or dataset, or it can't be reached.
    """
    name = params.dataset
    path = local_path(name)
    if name in embedded.TEXTS:
        _refuse(params, "dataset_config", "dataset_revision")
        _refuse(params, "dataset_column", but="text")
        if params.dataset_split not in (None, *embedded.text_splits(name)):
            splits = " and ".join(embedded.text_splits(name))
            raise DatasetError(f"dataset_split: {name} has no split '{excerpt(params.dataset_split)}'; it has {splits}.")
        return DatasetSource(params)
    if path.exists() or path.suffix in local.SUFFIXES:
        local.check_file(path)
        _refuse(params, "dataset_config", "dataset_revision")
        _refuse(params, "dataset_split", but="train")
        if path.suffix == ".txt":
            _refuse(params, "dataset_column", but="text")
        return DatasetSource(params, path)
    repositories = streamed.repositories(name)
    if not all(map(hub.is_repository_id, repositories)):
        raise DatasetError(f"dataset: there is no file {excerpt(name)}; give a {', '.join(local.SUFFIXES)} file or a hub id.")
    if len(repositories) > 1:
        _refuse(params, "dataset_config", "dataset_revision")
    if commits is None:
        hint = nearest(name, embedded.TEXTS)
        commits = {
            repository: hub.resolve_commit(repository, "dataset", params.dataset_revision, hint) for repository in repositories
        }
    return DatasetSource(params, commits=commits)


def _refuse(params: Params, *keys: str, but: str | None = None) -> None:
    """Refuse keys that don't apply to this source; null and ``but``, which agrees with it, pass."""
    for key in keys:
        if getattr(params, key) not in (None, but):
            raise DatasetError(
                f"{key}: '{excerpt(getattr(params, key))}' does not apply to {excerpt(params.dataset)}; use null."
            )
