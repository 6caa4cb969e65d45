"""Fixtures of the pipeline's tests: one real run of it in a copy of the repository, and a hub that records what it is asked."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.stand import copy_code, set_params
from replaceme.models import hub
from replaceme.models.model import Model
from tests.conftest import made_text
from tests.pipeline.helpers import TOKEN, Hub, shell

# A sitecustomize that records which files of the library a stage has loaded, when its process ends.
NOTING = """
import atexit, json, os, pathlib, sys

def note():
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name.startswith("stages."):
        root = pathlib.Path.cwd()
        files = [pathlib.Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
        ours = [file.relative_to(root).as_posix() for file in files if root in file.parents]
        pathlib.Path(os.environ["LOADED"], f"{spec.name}.json").write_text(json.dumps(sorted(ours)))

atexit.register(note)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny: Model) -> Path:
    """A copy of the repository, set to a tiny model and a text of its own, and run once."""
    folder = made_project(tmp_path_factory.mktemp("project") / "repository", tiny)
    noting = folder.parent / "noting"
    noting.mkdir()
    (noting / "sitecustomize.py").write_text(NOTING, encoding="utf-8")
    (folder.parent / "loaded").mkdir()
    # The cache that the tests use.
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    shell(folder, "dvc", "repro", PYTHONPATH=str(noting), LOADED=str(folder.parent / "loaded"), REPLACEME_CACHE=cache)
    shell(folder, "git", "add", ".")
    shell(folder, "git", "commit", "-q", "-m", "first run")
    return folder


def made_project(folder: Path, tiny: Model) -> Path:
    """Copy the repository, set it to a tiny model and a text of its own, and return the folder."""
    copy_code(folder)
    (folder / "text.txt").write_text(made_text(600), encoding="utf-8")
    (folder / "held-out.txt").write_text(made_text(100, seed=1), encoding="utf-8")
    rows = [
        {"question": made_text(2, n), "choices": [made_text(1, 99 + 2 * n), made_text(1, 100 + 2 * n)], "answer": n % 2}
        for n in range(30)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model_path": str(tiny.folder), "dataset": "text.txt", "dataset_size": "20", "max_length": "48", "dtype": "float32",
        "layers_to_skip": "2", "transform": "dense", "eval_dtype": "float32",
        "tasks": "[held-out.txt, {questions.jsonl: {limit: 25}}]",
        "threads": "1", "device": "cpu",
    }  # fmt: skip
    set_params(folder, settings)
    shell(folder, "git", "init", "-q", "-b", "main")
    shell(folder, "git", "config", "user.name", "tester")
    shell(folder, "git", "config", "user.email", "tester@example.org")
    return folder


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A reachable hub, and a token in the environment."""
    stand_in = Hub()
    monkeypatch.setattr(hub, "HfApi", stand_in)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return stand_in
