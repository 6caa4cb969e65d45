"""Uploads to the hub, and refusals; a fake hub records the requests."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from replaceme.cli.main import main
from replaceme.export.save import save_pruned
from replaceme.models import hub
from replaceme.models.model import Model
from replaceme.models.model_files import TEXT_RECORD
from tests.helpers import call, edits_for
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import TOKEN, Hub


@pytest.fixture
def pruned(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pruned model's folder with a card, and another file in it."""
    folder = tmp_path / "pruned"
    save_pruned(tiny, edits_for(2, 2), folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Pruned\n", encoding="utf-8")
    (folder / TEXT_RECORD).write_text('{"sources": []}', encoding="utf-8")
    (folder / "diary.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_models_files_and_nothing_else_are_put_there_in_one_commit(
    pruned: Path, api: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned)
    assert api.made == [("me/small", None)]
    assert api.files == {path.name: path.read_bytes() for path in pruned.iterdir() if path.name != "diary.txt"}
    assert "https://hub.example/me/small" in capsys.readouterr().err


def test_the_token_comes_from_the_environment_and_shows_nowhere(
    pruned: Path, api: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned)
    api.failure = RuntimeError("broken")
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned, "--debug", code=2)
    assert api.tokens == [TOKEN] * 2
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    files = [path for path in pruned.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert not [content for content in api.files.values() if TOKEN.encode() in content]


def test_private_means_private(pruned: Path, api: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned, "--private", code=2)
    assert "private: me/small exists and is public" in capsys.readouterr().err
    assert not api.files
    api.public = False
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned, "--private")
    assert api.made[-1] == ("me/small", True)
    assert api.files


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command line: the following arguments are required: --repo_id"),
        (["--repo_id", "small"], "repo_id: 'small' can't be a repository; give user/name"),
        (["--repo_id", "me/small/er"], "repo_id: 'me/small/er' can't be a repository"),
        (["--repo_id", "me/sm--all"], "repo_id: 'me/sm--all' can't be a repository"),
        (["--repo_id", "me/small", "--token", "x"], "command line: unrecognized arguments: --token x"),
        (
            ["--repo_id", "me/small", "--save_path", "nowhere"],
            "save_path: there is no pruned model in nowhere; run `dvc repro`",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], said: str, pruned: Path, api: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "push", "--save_path", pruned, *arguments, code=2)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {said}")
    assert not api.made


def test_without_a_model_a_token_or_a_hub_nothing_is_tried(
    pruned: Path, api: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "push", "--repo_id", "me/small", code=2)
    assert "save_path: there is no pruned model in artifacts/model" in capsys.readouterr().err
    monkeypatch.setattr(hub, "reachable", lambda: False)
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned, code=2)
    assert "the hub can't be reached, so nothing was uploaded to me/small" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned, code=2)
    assert "HF_TOKEN: is not set" in capsys.readouterr().err
    assert not api.made


def test_a_pipelines_model_without_its_pipeline_is_refused(pruned: Path, api: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    (pruned.parent / "artifacts").mkdir()
    pruned.rename(pruned.parent / "artifacts" / "model")
    call(main, "push", "--repo_id", "me/small", code=2)
    assert "(run it inside the repository)" in capsys.readouterr().err
    assert not api.made


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "HF_TOKEN: this token may not write to me/small"),
        (403, "HF_TOKEN: this token may not write to me/small"),
        (500, "repo_id: the hub refused the upload to me/small (out of order)."),
    ],
)
def test_a_hub_that_refuses_is_one_sentence(
    status: int, said: str, pruned: Path, api: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    api.failure = HfHubHTTPError("failed", response=response, server_message="out of order.")
    call(main, "push", "--repo_id", "me/small", "--save_path", pruned, code=2)
    assert said in capsys.readouterr().err


def test_what_a_command_made_goes_with_its_scores(finished: Finished, api: Hub) -> None:
    call(main, "push", "--repo_id", "me/small", "--save_path", finished.result)
    scores = ModelCard(api.files["README.md"].decode()).data.eval_results
    assert {each.dataset_name for each in scores} == {"text (seen in calibration)", "other"}
    assert {each.metric_type for each in scores} == {"perplexity"}
