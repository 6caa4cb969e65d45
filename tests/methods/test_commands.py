"""The whole command with each method that is more than a map: edits, model, card and page agree on what was removed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from replaceme.base.files import read_json
from replaceme.cli import commands
from replaceme.edits.edits import Edits
from replaceme.models.model import Model
from replaceme.models.own_form import is_own_form
from replaceme.running.workspace import Workspace
from tests.conftest import LAYERS
from tests.helpers import FAST, call

GHOSTED = {"method": "ghosted", "layers_to_skip": 2}
PRUNER = {"method": "llm_pruner", "layers_to_skip": 2, "max_length": 64}
PARTS = r"2 of 4 heads and \d+ of 48 MLP channels in "


@pytest.mark.parametrize(
    ("options", "removed", "own_form", "card", "page"),
    [
        (
            {"method": "laco", "layers_to_skip": 3, "laco_layers": 3},
            3, False, ["with LaCo\\.", "laco_layers: 3", "were merged into those of layer"],
            ["merging layers into the one before them"],
        ),
        (
            {**GHOSTED, "num_A": 2, "layers_to_skip": 1, "merge_consecutive": "false"},
            2, True, ["with Ghosted Layers"], ["relative residual"],
        ),
        (
            {"method": "linearpatch", "layers_to_skip": 2},
            2, True,
            ["with LinearPatch \\(hadamard\\)\\.", "A linear map was added after layer \\d; it multiplies the whole hid"],
            ["relative residual", "largest factor"],
        ),
        (
            {**PRUNER, "plain": "true"},
            0, False, [f"# llama without {PARTS}every layer", "width-pruning", "plain: true"],
            [f"<h1>llama without {PARTS}every layer</h1>", "after the last layer differs by"],
        ),
        (
            {**PRUNER, "min_distance_layer": 2, "max_distance_layer": 5},
            0, True, [f"{PARTS}each of layers 2–4 were removed from `llama` with LLM-Pruner\\.", "trust_remote_code=True"],
            [f'<p class="lead">{PARTS}each of layers 2–4 of llama were removed by LLM-Pruner\\.'],
        ),
        (
            {"method": "prune_and_comp", "layers_to_skip": 3},
            3, False, ["with Prune&Comp\\.", "by \\d\\.\\d+ after layer \\d"],
            ["the smallest block influence, one layer at a time"],
        ),
        (
            {"method": "slicegpt", "layers_to_skip": 3},
            0, True, ["\\d+ of the 32 dimensions of its residual stream were removed from `llama` with SliceGPT\\."],
            ["No whole layer was removed, but \\d+ of the 32 dimensions"],
        ),
    ],
    ids=["laco", "ghosted blocks", "linearpatch", "pruner plain", "pruner", "scaled", "slicegpt"],
)  # fmt: skip
def test_the_whole_command_prunes_with_the_method(
    options: dict[str, Any], removed: int, own_form: bool, card: list[str], page: list[str],
    save_tiny: Callable[..., Model], text_file: Path, tmp_path: Path,
) -> None:  # fmt: skip
    given = [part for key, value in options.items() for part in (f"--{key}", value)]
    where = ["--model", save_tiny().folder, "--dataset", text_file, "--tasks", f"[{text_file}]", "--eval_tokens", 200]
    call(commands.run_replaceme, *where, *FAST, *given, "--save_path", tmp_path / "pruned")
    work = Workspace(tmp_path / "pruned.work", tmp_path / "pruned")
    edits, exported = Edits.load(work.edits), read_json(work.metric("export"))
    assert len(edits.removed_layers) == removed
    assert is_own_form(work.model) == own_form
    loaded = AutoModelForCausalLM.from_pretrained(work.model, trust_remote_code=own_form)
    assert loaded.config.num_hidden_layers == LAYERS - removed
    assert loaded.num_parameters() == exported["parameters"]
    if not removed:
        gone = exported["parameters_dense"] - exported["parameters"]
        assert read_json(work.metric("repair"))["parameters_removed"] == gone
        assert f"{gone:,}" in (work.report / "index.html").read_text(encoding="utf-8")
    for file, texts in ((work.model / "README.md", card), (work.report / "index.html", page)):
        content = file.read_text(encoding="utf-8")
        assert [text for text in texts if not re.search(text, content)] == []
