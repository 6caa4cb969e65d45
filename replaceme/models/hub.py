"""All traffic with the model hub: probe it, resolve names to commits, download a commit's files, upload a model.

The hub's client retries for half a minute without a network, so a short probe comes first.
"""

import functools
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from replaceme.base.errors import (
    DatasetError,
    ModelError,
    ParameterError,
    ReplaceMeError,
    ResourceError,
    excerpt,
    resource_failure,
)
from replaceme.base.progress import logger

PROBE_SECONDS = 5.0
KEYS = {"model": "model_path", "dataset": "dataset"}
OFFLINE_HELP = {
    "model": "offline, use a local folder or an embedded model, smollm2-135m-instruct",
    "dataset": "offline, use a local .txt, .jsonl, .csv or .parquet file or the embedded text wikipedia-sample",
}


def is_repository_id(name: str) -> bool:
    """Return whether ``name`` could be a hub repository: owner/name, or an old name without an owner."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def resolve_commit(name: str, kind: str, revision: str | None, hint: str = "") -> str:
    """Return the commit that a repository's revision points to now.

    Offline, a model's commit is taken from the local cache, and the log says so. Datasets are streamed, so they have none.

    Args:
        name: repository.
        kind: model or dataset.
        revision: branch, tag or commit; None is the default branch.
        hint: added to the message when nothing is found: the name that may have been meant.

    Raises:
        ModelError, DatasetError: unreachable and not cached, unknown, or not accessible.
    """
    if not reachable():
        cached = _cached_commit(name, revision) if kind == "model" else None
        if cached:
            logger.info("model_path: the hub can't be reached; the cached commit %s of %s is used", cached[:12], name)
            return cached
        raise _error(kind, f"{name} is no local path{hint}, and the hub can't be reached; {OFFLINE_HELP[kind]}.")
    try:
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10).sha)
    except Exception as failure:  # of the hub's client, and of the HTTP library below it
        raise _hub_failure(failure, kind, name, revision, hint) from failure


def snapshot(name: str, commit: str, patterns: tuple[str, ...], ignored: tuple[str, ...]) -> Path:
    """Return the local folder of a model repository at a commit, downloading what the cache lacks."""
    choice = {"allow_patterns": list(patterns), "ignore_patterns": list(ignored)}
    try:
        return Path(snapshot_download(name, revision=commit, local_files_only=not reachable(), **choice))
    except LocalEntryNotFoundError:
        raise _error("model", f"{name} at {commit[:12]} isn't cached, and the hub can't be reached.") from None
    except Exception as failure:  # as above
        raise _hub_failure(failure, "model", name, commit) from failure


def dataset_commit(name: str, config: str | None, what: str) -> str:
    """Return the commit of a dataset that is downloaded whole: the hub's newest, or offline the cached one.

    Args:
        name: repository.
        config: the dataset's configuration.
        what: the key and value that need it, for messages.

    Raises:
        DatasetError: unknown, not accessible, or unreachable and not cached.
    """
    if reachable():
        try:
            return resolve_commit(name, "dataset", None)
        except DatasetError as problem:
            reason = str(problem).removeprefix("dataset: ").rstrip(".")
            raise DatasetError(f"{what} needs the dataset {name}, which can't be had: {reason}.") from None
    from datasets import config as settings
    from datasets import load_dataset_builder

    # From here on, this process reads only its cache, without waiting for the network.
    settings.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        return str(load_dataset_builder(name, config).hash)
    except Exception:  # the library raises errors of many kinds for an uncached dataset
        raise DatasetError(
            f"{what} needs the dataset {name}, the hub can't be reached, and the cache has no copy; offline, use the embedded "
            "tasks or a .txt or .jsonl file."
        ) from None


def upload(name: str, files: Mapping[str, Path | bytes], private: bool) -> str:
    """Upload files to a model repository in one commit and return its URL; the repository is created if it doesn't exist.

    Args:
        name: user/name.
        files: path in the repository → file, or content.
        private: create the repository as private; refuse a public one.

    Raises:
        ParameterError: not a repository name, no token, no right to write there, or it is public and ``private`` is set.
        ResourceError: the hub can't be reached, or fails.
    """
    if "/" not in name or not is_repository_id(name):
        raise ParameterError(f"repo_id: '{name}' can't be a repository; give user/name, of letters, digits, '-', '_' and '.'.")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise ParameterError("HF_TOKEN: is not set; set this environment variable to a token with the right to write.")
    if not reachable():
        raise ResourceError(f"repo_id: the hub can't be reached, so nothing was uploaded to {name}; try again when it can.")
    api = HfApi(token=token)
    operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
    try:
        url = str(api.create_repo(name, private=private or None, exist_ok=True))
        if private and not api.repo_info(name).private:
            raise ParameterError(f"private: {name} exists and is public; make it private on the hub, or choose another.")
        api.create_commit(name, operations, commit_message="Pruned model")
    except HfHubHTTPError as failure:
        if failure.response.status_code in (401, 403):
            raise ParameterError(f"HF_TOKEN: this token may not write to {name}; use one that may.") from failure
        reason = failure.server_message or type(failure).__name__
        raise ResourceError(f"repo_id: the hub refused the upload to {name} ({reason.rstrip('.')}).") from failure
    except ReplaceMeError:
        raise
    except Exception as failure:  # any HTTP library's errors
        raise ResourceError(f"repo_id: the upload to {name} failed ({type(failure).__name__}).") from failure
    return url


@functools.cache
def reachable() -> bool:
    """Return whether the hub answers within ``PROBE_SECONDS``; a process asks once. In the client's offline mode it doesn't."""
    answers: list[object] = []

    def probe() -> None:
        with suppress(Exception):  # as above
            answers.append(get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS))

    # The client's timeout doesn't bound the name look-up, which can hang: hence the thread.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answers)


def _cached_commit(name: str, revision: str | None) -> str | None:
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns="config.json")).name
    except LocalEntryNotFoundError:
        return None


def _hub_failure(failure: Exception, kind: str, name: str, revision: str | None, hint: str = "") -> ReplaceMeError:
    """Return the error that says in one sentence why a repository can't be had."""
    if known := resource_failure(failure):
        return known
    if isinstance(failure, GatedRepoError):
        return _error(kind, f"{name} is gated: accept its licence on the hub and set the environment variable HF_TOKEN.")
    if isinstance(failure, RevisionNotFoundError):
        return _error(kind, f"{name} has no revision '{revision}'.")
    if isinstance(failure, RepositoryNotFoundError):
        return _error(kind, f"there is no local path and no public hub repository {name}{hint} (private ones need HF_TOKEN).")
    return _error(kind, f"{name} could not be read from the hub ({type(failure).__name__}: {excerpt(failure, 150)}).")


def _error(kind: str, text: str) -> ReplaceMeError:
    return (ModelError if kind == "model" else DatasetError)(f"{KEYS[kind]}: {text}")
