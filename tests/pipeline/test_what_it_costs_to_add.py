"""What an addition costs: a made-up method, criterion, stage, family and statistic, each added as CONTRIBUTING.md says.

Method, criterion and stage are added to a copy of the repository: files from ``additions``, and single lines in other files.
The copy must then pass the addition's own tests and the repository's tests of what is declared. A family and a statistic are
entries of tables, and are added to these at run time.
"""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.stand import copy_code
from replaceme.base.documents import Batch, Documents
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Plan
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.models.families import FAMILIES, Family, family_of
from replaceme.models.model import Model
from replaceme.pipeline.activations import observe_activations
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace
from replaceme.statistics.cut_statistics import STATISTICS, CutStatistic
from tests.conftest import WIDTH, made_model
from tests.helpers import TEXT, edits_of, passing, shortened_logits
from tests.pipeline.helpers import shell

ADDITIONS = Path(__file__).parent / "additions"
# The tests of what is declared; those that run the pipeline itself are left out.
DECLARATIONS = [
    "tests/base/test_parameters.py",
    "tests/pipeline/test_rooms.py",
    *(
        f"tests/pipeline/test_pipeline.py::test_{name}"
        for name in (
            "every_stage_has_a_script_and_a_description",
            "every_file_that_a_stage_imports_lies_below_its_dependencies_and_each_of_these_is_imported",
            "a_stages_declaration_is_that_of_dvc_yaml",
            "metrics_keep_the_run_cache",
        )
    ),
]


@dataclass(frozen=True)
class Addition:
    """What is added to the repository.

    Attributes:
        files: new file → the file of ``additions`` with its content.
        lines: (file, a text that it holds once, what is added after that text).
        parameters: parameter → the stages of dvc.yaml that list it.
        reference: whether docs/parameters.md is to be made again.
    """

    files: dict[str, str]
    lines: list[tuple[str, str, str]]
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reference: bool = False


METHOD = Addition(
    files={"replaceme/methods/faded.py": "faded.py", "tests/methods/test_faded.py": "check_faded.py"},
    lines=[
        ("replaceme/methods/registry.py", "\n    cosine,", "\n    faded,"),
        ("replaceme/methods/registry.py", '"cosine": cosine.METHOD,', '\n    "faded": faded.METHOD,'),
        ("params.yaml", "\nsave_transform_only: false", "\nfaded_factor: 0.5\n#"),
    ],
    parameters={"faded_factor": ("solve", "repair", "export")},
    reference=True,
)
CRITERION = Addition(
    files={"tests/selection/test_last.py": "check_last.py"},
    lines=[
        (
            "replaceme/selection/criteria.py",
            "for criterion in (",
            """
        Criterion(
            "last", "its place, the last one allowed",
            lambda choice: (runs(choice.layers[-choice.params.layers_to_skip :]), {}),
        ),""",
        )
    ],
    reference=True,
)
STAGE = Addition(
    files={
        "replaceme/pipeline/tally.py": "tally.py",
        "stages/tally.py": "tally_script.py",
        "tests/pipeline/test_tally.py": "check_tally.py",
    },
    lines=[
        ("replaceme/running/stage.py", 'JUDGEMENT = ("baseline", "evaluate", "report"', ', "tally"'),
        (
            "dvc.yaml",
            "outs: [artifacts/report]",
            """

  tally:
    desc: The number of blocks.
    cmd: python -m stages.tally
    deps: [artifacts/plan.json, replaceme/pipeline/tally.py, replaceme/base]
    params: [seed]
    metrics: [{metrics/tally.json: {cache: false}}]""",
        ),
    ],
)


@pytest.mark.parametrize("addition", [METHOD, CRITERION, STAGE], ids=["method", "criterion", "stage"])
def test_a_repository_with_one_more_passes_its_tests(addition: Addition, tmp_path: Path) -> None:
    copy_code(
        tmp_path, "tests", "reproduce", "benchmarks", "pyproject.toml", "README.md", "docs/parameters.md", "docs/design.md"
    )  # fmt: skip
    for path, source in addition.files.items():
        shutil.copyfile(ADDITIONS / source, tmp_path / path)
    for file, before, added in addition.lines:
        replaced(tmp_path / file, f"({re.escape(before)})", lambda found, added=added: found[1] + added)
    for key, stages in addition.parameters.items():
        for stage in stages:
            params_of = rf"(?s)(\n  {stage}:\n(?:(?!\n\n).)*?params:\s+\[)"
            replaced(tmp_path / "dvc.yaml", params_of, lambda found, key=key: f"{found[1]}{key}, ")
    if addition.reference:
        page = shell(tmp_path, sys.executable, "-m", "replaceme.cli.reference")
        (tmp_path / "docs" / "parameters.md").write_text(page, encoding="utf-8")
    own = [path for path in addition.files if path.startswith("tests/")]
    pytest_of = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tmp'}"]
    shell(tmp_path, *pytest_of, *own, *DECLARATIONS)


def replaced(file: Path, pattern: str, by: Callable[[re.Match[str]], str]) -> None:
    """Replace the one place in a file where a pattern is found."""
    text, count = re.subn(pattern, by, file.read_text(encoding="utf-8"))
    assert count == 1, (file, pattern)
    file.write_text(text, encoding="utf-8")


class MadeUpConfig(LlamaConfig):
    model_type = "made_up"


class MadeUpForCausalLM(LlamaForCausalLM):
    config_class = MadeUpConfig


def test_a_family_is_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, documents: Documents) -> None:
    AutoConfig.register("made_up", MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpForCausalLM, exist_ok=True)
    monkeypatch.setitem(FAMILIES, "made_up", lambda config: Family())
    model = made_model("made_up", torch.float64)
    edits = edits_of(2, 2, model)
    expected = shortened_logits(model, edits, TEXT)
    apply_edits(model, family_of(model.config), edits)
    with torch.no_grad():
        assert (model(TEXT, use_cache=False).logits - expected).norm() < 1e-9 * expected.norm()
    made_model("made_up").save_pretrained(tmp_path / "dense")
    source = Model(tmp_path / "dense", "made-up")
    save_pruned(source, edits, tmp_path / "pruned")
    assert verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, documents)["logits_error"] < 1e-4


class Largest(CutStatistic):
    """The largest value of each channel of the state at the cut."""

    signals_before_cut = ("output",)

    def __init__(self, block: Block):
        super().__init__(block)
        self.largest = torch.full((WIDTH,), -torch.inf)

    def take(self, left: Tensor, target: Tensor, batch: Batch) -> None:
        self.largest = self.largest.maximum(left.amax(dim=0))

    def tensors(self) -> dict[str, Tensor]:
        return {"largest": self.largest}


def test_a_statistic_is_one_observer_and_one_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, params: Params, documents: Documents
) -> None:
    monkeypatch.setitem(STATISTICS, "largest", lambda place: Largest(place.block))
    work, block = Workspace(tmp_path), Block(2, 4)
    inspect_inputs(params, work)
    work.documents.mkdir(parents=True)
    documents.save(work.documents)
    Plan((block,), ("gram", "largest")).save(work.plan)
    observe_activations(params, work)
    assert {path.stem for path in work.statistics.iterdir()} == {"gram", "largest"}
    found = load_file(work.statistics / "largest.safetensors")["largest"]
    states = passing(Model(Path(params.model_path), "tiny").load(), block.layer_before_cut, documents)["output"]
    assert np.allclose(found.numpy(), states.max(axis=0), rtol=1e-4, atol=1e-5)
