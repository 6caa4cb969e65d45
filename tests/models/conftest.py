"""A model in the hub's cache."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from replaceme.models import hub


@pytest.fixture
def put_into_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that puts a folder into the hub's cache as a revision of ``owner/name``; the hub can't be reached.

    As by the hub's client, the snapshot consists of links to blobs.
    """
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"

    def put(source: Path, revision: str = "main", commit: str = "1" * 40) -> Path:
        snapshot = repository / "snapshots" / commit
        for folder in (repository / "blobs", repository / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit, encoding="utf-8")
        for number, path in enumerate(sorted(source.iterdir())):
            blob = f"{commit[:4]}{number}"
            shutil.copyfile(path, repository / "blobs" / blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
        return snapshot

    return put
