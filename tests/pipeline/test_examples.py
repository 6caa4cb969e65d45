"""The examples: configs that are read without a complaint, and a notebook that runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from replaceme.base.parameters import read_params
from replaceme.methods.registry import METHODS
from replaceme.models.model import Model
from tests.pipeline.closure import ROOT

EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_its_command_and_asks_for_nothing_without_effect(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opener = path.read_text(encoding="utf-8").splitlines()[0]
    assert opener == f"# replaceme prune --config {path.relative_to(ROOT)}"
    with caplog.at_level("INFO", "replaceme"):
        params = read_params(path, methods=METHODS, preset=None)
    assert caplog.messages == [f"preset recommended ({path} says so)"]
    assert params.save_path


def test_the_notebook_runs(tiny: Model, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "prune.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # A tiny model and text in the place of the embedded ones.
    small = 'max_length=48, dtype="float32", threads=1, device="cpu",'
    names: dict[str, Any] = {}
    for source in sources:
        code = source.replace('"smollm2-135m-instruct"', repr(str(tiny.folder))).replace(
            '"wikipedia-sample"', repr(str(text_file))
        )
        code = re.sub(r"tasks=\[.*?\]", f"tasks=[{str(text_file)!r}]", code).replace("layers=4,", f"layers=2, {small}")
        exec(compile(code, "prune.ipynb", "exec"), names)
    assert names["weaker"].removed_layers == names["pruned"].removed_layers
    assert all(not cell.get("outputs") for cell in cells)
