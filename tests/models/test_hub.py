"""The hub without a network: requests, commits from the cache, and error messages."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from replaceme.base.errors import DatasetError, ModelError
from replaceme.base.parameters import Params, read_params
from replaceme.corpora.find import find_datasets
from replaceme.models import hub
from replaceme.models.find import find_model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))


def made(**options: Any) -> Params:
    return read_params(None, options)


@pytest.mark.usefixtures("offline")
def test_an_unreachable_model_or_dataset_is_named_with_the_offline_alternatives() -> None:
    with pytest.raises(
        ModelError, match=r"owner/model is no local path, and the hub can't be reached; offline, use a local folder"
    ):
        find_model(made(model_path="owner/model"))
    with pytest.raises(
        DatasetError, match=r"owner/data is no local path, and the hub can't be reached; offline, use a local \.txt"
    ):
        find_datasets(made(dataset="owner/data"))


@pytest.mark.usefixtures("offline")
def test_a_misspelt_embedded_name_is_recognised() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m-instruct'"):
        find_model(made(model_path="smollm2-135m"))


@pytest.mark.usefixtures("offline")
def test_offline_the_cached_commit_is_used_for_a_model_but_not_for_a_dataset(tmp_path: Path) -> None:
    for kind in ("model", "dataset"):
        references = tmp_path / f"{kind}s--owner--name" / "refs"
        references.mkdir(parents=True)
        (references / "main").write_text("d" * 40, encoding="utf-8")
    assert hub.resolve_commit("owner/name", "model", None) == "d" * 40
    with pytest.raises(DatasetError, match="the hub can't be reached"):
        hub.resolve_commit("owner/name", "dataset", None)


@pytest.mark.parametrize("name", ["owner/name", "foo--bar"])
def test_a_broken_connection_is_reported_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoConnectionError(Exception):
        """An HTTP library's error, not an OSError."""

    def refuse(*_args: Any, **_options: Any) -> None:
        raise NoConnectionError

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(hub.HfApi, "repo_info", refuse)
    with pytest.raises(ModelError, match=f"{name} could not be looked up on the hub"):
        find_model(made(model_path=name))


def test_the_probe_of_a_silent_hub_ends_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_args, **_options: (time.sleep(2), socket.socket())[1])
    hub.reachable.cache_clear()
    began = time.monotonic()
    assert not hub.reachable()
    assert time.monotonic() - began < 1.5
    hub.reachable.cache_clear()


@pytest.mark.parametrize(
    ("proxy", "excepted", "asked"),
    [
        ("proxy.example:3128", "", ("proxy.example", 3128)),
        ("http://proxy.example:3128", "", ("proxy.example", 3128)),
        ("proxy.example:3128", "hub.example", ("hub.example", 443)),
        (None, "", ("hub.example", 443)),
    ],
)
def test_the_probe_connects_to_the_proxy_if_there_is_one(
    proxy: str | None, excepted: str, asked: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        addresses.append(address)
        return socket.socket()

    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    if proxy:
        monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.setenv("no_proxy", excepted)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "create_connection", connect)
    hub.reachable.cache_clear()
    assert hub.reachable()
    hub.reachable.cache_clear()
    assert addresses == [asked]
