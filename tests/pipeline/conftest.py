"""Fixtures of the pipeline's tests: a real run by DVC in a copy of the repository, one without DVC, and a hub that records
what it is asked.
"""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.sandbox import copy_code, set_params
from replaceme.cli import commands
from replaceme.models import hub
from replaceme.models.model import Model
from replaceme.pipeline import speed
from tests.conftest import DOT, WRITTEN, draw_dot, made_text
from tests.helpers import FAST, call
from tests.pipeline.helpers import TOKEN, Hub, dvc, shell

# Hooks of the stages. One makes each picture a dot, and lets the models write as little as in this process.
QUICK = f"""
if stage == "stages.report":
    from replaceme.report import pictures
    dot = pictures.Picture({DOT!r}, {DOT!r}, (1, 1))
    pictures._draw_themes = lambda draw, *arguments: dot if draw(*arguments, pictures.LIGHT) else None
if stage in ("stages.baseline", "stages.evaluate"):
    from replaceme.evaluation import continuations
    continuations.MAX_TOKENS = {WRITTEN}
"""
# One records which files of the library a stage has loaded, when its process ends.
RECORD_FILES = """
import atexit, json, os, pathlib, sys

def record():
    root = pathlib.Path.cwd()
    files = [pathlib.Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
    ours = [file.relative_to(root).as_posix() for file in files if root in file.parents]
    pathlib.Path(os.environ["LOADED"], f"{stage}.json").write_text(json.dumps(sorted(ours)))

atexit.register(record)
"""
# A hook of the console scripts.
ONE_ROUND = "from replaceme.pipeline import speed; speed.ROUNDS = 1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of a real run by DVC as slow."""
    for item in items:
        if "project" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time each model once: that a median is taken changes no test."""
    monkeypatch.setattr(speed, "ROUNDS", 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny: Model) -> Path:
    """A copy of the repository, set to a tiny model and a text of its own, and run once."""
    folder = made_project(tmp_path_factory.mktemp("project") / "repository", tiny)
    hook, loaded = folder.parent / "record_files.py", folder.parent / "loaded"
    hook.write_text(QUICK + RECORD_FILES, encoding="utf-8")
    (folder.parent / "quick.py").write_text(QUICK, encoding="utf-8")
    (folder.parent / "one_round.py").write_text(ONE_ROUND, encoding="utf-8")
    loaded.mkdir()
    # The cache that the tests use.
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    dvc(folder, "repro", STAGE_HOOK=str(hook), LOADED=str(loaded), REPLACEME_CACHE=cache)
    # An experiment is pushed to the remote of the commit that it starts from.
    dvc(folder, "remote", "add", "--default", "storage", str(folder.parent / "storage"))
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


@dataclass(frozen=True)
class Finished:
    """A finished run without DVC, with published keys only, scored on its calibration text and on another text.

    Attributes:
        folder: holds ``config.yaml``, the texts, and the run's result in ``result``. Only copies are changed.
        printed: what the run printed.
        said: what it said on standard error.
    """

    folder: Path
    printed: str
    said: str

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def work(self) -> Path:
        return self.folder / "result.work"

    def copy(self, folder: Path) -> "Finished":
        """Copy the result and its work folder; a run there goes on with them."""
        for source in (self.result, self.work):
            shutil.copytree(source, folder / source.name)
        return Finished(folder, self.printed, self.said)

    def arguments(self) -> list[str | Path]:
        """Return the arguments of the run, in this folder."""
        return ["--save_path", self.result, *FAST]


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, tiny: Model) -> Path:
    """A config of published keys, beside its texts."""
    folder = tmp_path_factory.mktemp("published")
    for name, seed in (("text.txt", 0), ("other.txt", 9)):
        (folder / name).write_text(made_text(600 if not seed else 40, seed), encoding="utf-8")
    (folder / "config.yaml").write_text(
        f"method: lstsq\nmodel_path: {tiny.folder}\ndataset: {folder / 'text.txt'}\ndataset_column: text\nbatch_size: 8\n"
        "max_length: 48\nuse_4bit: false\nlayers_to_skip: 2\nmin_distance_layer: 2\nmerge_consecutive: true\nalpha: 0.1\n"
        f"num_A: 1\nsave_path: {folder / 'result'}\nsave_transform_only: false\n"
        f"tasks: {{{folder / 'text.txt'}: {{fewshots: 0}}, {folder / 'other.txt'}: {{fewshots: 0}}}}\n",
        encoding="utf-8",
    )
    return folder / "config.yaml"


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run, started from an empty folder."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        patch.setenv("REPLACEME_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr("replaceme.report.pictures._draw_themes", draw_dot)
        patch.chdir(tmp_path_factory.mktemp("empty"))
        call(commands.run_replaceme, "--config", config, *FAST)
        assert not list(Path().iterdir())
    return Finished(config.parent, out.getvalue(), err.getvalue())


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A reachable hub, and a token in the environment."""
    stand_in = Hub()
    monkeypatch.setattr(hub, "HfApi", stand_in)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return stand_in
