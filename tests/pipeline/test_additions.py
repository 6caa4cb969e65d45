"""A made-up method, family and statistic, each in this one file and added to its table, as CONTRIBUTING.md says."""

from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import replaceme
from replaceme.base.combinations import Settings, Use, Values, users_of
from replaceme.base.documents import Batch, Documents
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params, fields_of, read_params
from replaceme.base.plan import Block, Plan
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.method import Method, Solved, Statistics
from replaceme.methods.registry import FIELDS, METHODS, USERS, has_effect, read_by
from replaceme.models.families import FAMILIES, Family, family_of
from replaceme.models.model import Model
from replaceme.pipeline.activations import observe_activations
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.running.workspace import Workspace
from replaceme.statistics.cut_statistics import STATISTICS, CutStatistic
from tests.conftest import WIDTH, made_model
from tests.helpers import TEXT, edits_of, passing, shortened_logits


class Fading(Settings):
    """Parameters of the made-up method, which multiplies the MLP output before the cut by a number."""

    faded_factor: Annotated[float, Use(("solve", "repair"))] = Field(1.0, gt=0)
    """The number that the MLP output before the cut is multiplied by."""


def solve(params: Params, block: Block, statistics: Statistics) -> Solved:
    sums = statistics("gram")
    T = Fading.of(params).faded_factor * torch.eye(len(sums["gram"]), dtype=torch.float64)
    return Solved(Edits("a made-up method", [], {block.layer_before_cut: T}), {"tokens": int(sums["tokens"])})


def refuses(values: Values) -> list[str]:
    return ["faded_factor: 1 changes nothing; use another number."] if values["faded_factor"] == 1 else []


METHOD = Method(
    settings=Fading,
    statistics=lambda params: ("gram",),
    solve=solve,
    words="multiplies one output by a number",
    refuses=refuses,
)


@pytest.fixture
def _faded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method ``faded``, as if its import and its entry stood in the registry."""
    monkeypatch.setitem(METHODS, "faded", METHOD)
    monkeypatch.setitem(FIELDS, "faded_factor", fields_of(METHODS)["faded_factor"])
    monkeypatch.setitem(USERS, "faded_factor", users_of(METHODS)["faded_factor"])


@pytest.mark.usefixtures("_faded")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"faded_factor": -1.0}, "faded_factor: must be above 0"),
        ({"faded_facter": 0.5}, "'faded_factor'"),
        ({}, "faded_factor: 1 changes nothing"),
        ({"faded_factor": 0.5, "transform": "joint"}, "method faded, which multiplies one output by a number"),
    ],
)
def test_what_a_new_method_refuses_is_said(given: dict[str, object], said: str) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(None, {"method": "faded", **given}, METHODS)
    assert said in str(caught.value)


@pytest.mark.usefixtures("_faded")
def test_a_new_method_has_parameters_of_its_own_and_prunes_a_model(
    tiny: Model, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "faded_factor" in read_by("solve")
    with caplog.at_level("INFO", "replaceme"):
        other = read_params(None, {"faded_factor": 0.5}, METHODS)
    assert "faded_factor belongs to method faded" in caplog.text
    assert not has_effect("faded_factor", other.model_dump())
    pruned = replaceme.prune(
        tiny.folder, text_file, 2, tmp_path / "faded", preset="published", method="faded", faded_factor=0.5, tasks=[],
        dtype="float32", dataset_size=8, max_length=48, threads=1, device="cpu",
    )  # fmt: skip
    layer = pruned.figures["select"]["host"]
    before, after = (loaded.model.layers[layer].mlp.down_proj.weight for loaded in (tiny.load(), pruned.model()))
    assert torch.allclose(after, 0.5 * before)
    assert "with a made-up method" in (pruned.path / "README.md").read_text(encoding="utf-8")


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

    def take(self, output_before_cut: Tensor, target: Tensor, batch: Batch) -> None:
        self.largest = self.largest.maximum(output_before_cut.amax(dim=0))

    def tensors(self) -> dict[str, Tensor]:
        return {"largest": self.largest}


def test_a_statistic_is_one_observer_and_one_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, params: Params, documents: Documents
) -> None:
    monkeypatch.setitem(STATISTICS, "largest", lambda block, context: Largest(block))
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
