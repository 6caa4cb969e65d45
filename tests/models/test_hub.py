"""The hub: what it answers, what its cache gives without a network, and one sentence for each failure."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from replaceme.base.errors import DatasetError, ModelError
from replaceme.base.parameters import read_params
from replaceme.calibration.find import find_datasets
from replaceme.models import hub
from replaceme.models.find import find_model


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Return a function that has the hub at a port of this machine."""

    def to(port: int) -> None:
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        hub.reachable.cache_clear()

    yield to
    hub.reachable.cache_clear()


@pytest.fixture
def serve(connect: Callable[[int], None]) -> Iterator[Callable[..., None]]:
    """Return a function that starts a hub with one answer to everything."""
    servers = []

    def start(status: int, code: str = "", **content: Any) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[0].serve_forever, daemon=True).start()
        connect(servers[0].server_port)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_revision_is_resolved_to_its_commit(serve: Callable[..., None]) -> None:
    serve(200, id="owner/name", sha="c" * 40)
    assert hub.resolve_commit("owner/name", "model", "v2") == "c" * 40


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "owner/name is gated: accept its licence on the hub and set the environment variable HF_TOKEN."),
        (404, "RevisionNotFound", "owner/name has no revision 'v2'."),
        (401, "RepoNotFound", "there is no local path and no public hub repository owner/name (private ones need HF_TOKEN)."),
        (400, "", "owner/name could not be read from the hub (BadRequestError: "),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(status: int, code: str, said: str, serve: Callable[..., None]) -> None:
    serve(status, code)
    with pytest.raises(ModelError) as caught:
        find_model(read_params(None, {"model_path": "owner/name", "revision": "v2"}))
    assert str(caught.value).startswith(f"model_path: {said}")


@pytest.mark.parametrize("hangs", ["answer", "name look-up"])
def test_a_silent_hub_is_given_up_after_a_while(
    hangs: str, connect: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connect(silent.getsockname()[1])
        if hangs == "name look-up":
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: time.sleep(8))
        began = time.monotonic()
        assert not hub.reachable()
        assert time.monotonic() - began < 5


def test_in_offline_mode_the_hub_is_not_asked(serve: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    serve(200)
    assert hub.reachable()
    hub.reachable.cache_clear()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable()


@pytest.mark.usefixtures("offline")
def test_an_unreachable_model_or_dataset_is_named_with_the_offline_alternatives() -> None:
    said = r"owner/name is no local path, and the hub can't be reached; offline, use a local "
    with pytest.raises(ModelError, match=rf"model_path: {said}folder"):
        find_model(read_params(None, {"model_path": "owner/name"}))
    with pytest.raises(DatasetError, match=rf"dataset: {said}\.txt"):
        find_datasets(read_params(None, {"dataset": "owner/name"}))


@pytest.mark.usefixtures("offline")
def test_a_misspelt_embedded_name_is_recognised() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m-instruct'"):
        find_model(read_params(None, {"model_path": "smollm2-135m"}))


def test_offline_the_cached_commit_is_used_for_a_model_but_not_for_a_dataset(
    put_into_hub_cache: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    put_into_hub_cache(tmp_path / "model", commit="d" * 40)
    assert hub.resolve_commit("owner/name", "model", None) == "d" * 40
    with pytest.raises(DatasetError, match="the hub can't be reached"):
        hub.resolve_commit("owner/name", "dataset", None)
