"""An interrupted repair goes on after its last checkpoint, and ends with the same bits."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from replaceme.base.files import read_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.base.plan import Block
from replaceme.edits.edits import Edits
from replaceme.models.model import Model
from replaceme.pipeline.activations import observe_activations
from replaceme.pipeline.calibrate import calibrate
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.pipeline.plan import plan
from replaceme.pipeline.profile import profile
from replaceme.pipeline.repair import repair
from replaceme.pipeline.select import select
from replaceme.pipeline.solve import solve
from replaceme.repair import repair as repair_module
from replaceme.repair.resume import Checkpoints
from replaceme.running.workspace import Workspace
from tests.conftest import made_model
from tests.helpers import many_documents
from tests.interruption import InterruptedRunError
from tests.methods.helpers import BLOCK, solved

SETTINGS: dict[str, tuple[tuple[Block, ...], dict[str, Any]]] = {
    "repair": ((BLOCK,), {"method": "lstsq", "repair": True, "alpha": 5.0}),
    "channels": ((BLOCK,), {"method": "lstsq", "transform": "channels", "repair": True, "alpha": 5.0}),
    "two blocks": ((Block(1, 2), Block(4, 5)), {"method": "lstsq", "transform": "joint", "repair": True, "alpha": 5.0}),
    "a later block alone": ((Block(1, 2), Block(4, 5)), {"method": "lstsq", "alpha": 5.0}),
}


@pytest.fixture
def repaired(monkeypatch: pytest.MonkeyPatch, checkpoint_at_each_chance: None) -> list[int]:
    """The layers that are repaired, in order; each is followed by a checkpoint."""
    layers: list[int] = []
    repair_layer = repair_module.repair_layer

    def noting(state: Any, layer: int) -> None:
        layers.append(layer)
        repair_layer(state, layer)

    monkeypatch.setattr(repair_module, "repair_layer", noting)
    return layers


def bits(edits: Edits, folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    edits.save(folder)
    return sha256_below(folder)


def interrupt(monkeypatch: pytest.MonkeyPatch, layer: int, work: Callable[[], object]) -> None:
    """Run ``work`` and interrupt it in the middle of a layer, when the states of one model have moved on already."""
    walk = repair_module.RepairState.walk_dense

    def stop(state: Any, at: int, observers: Any) -> None:
        walk(state, at, observers)
        if at == layer:
            raise InterruptedRunError

    with monkeypatch.context() as patch:
        patch.setattr(repair_module.RepairState, "walk_dense", stop)
        with pytest.raises(InterruptedRunError):
            work()


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in SETTINGS), ("channels", torch.bfloat16)])
def test_an_interrupted_repair_ends_with_the_same_bits(
    name: str, dtype: torch.dtype, repaired: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, documents = made_model("llama", dtype), many_documents()
    blocks, options = SETTINGS[name]

    def started() -> tuple[Edits, Callable[[], Any]]:
        edits, run_repair = solved(model, documents, blocks, **options)
        return edits, lambda: run_repair(tmp_path, Checkpoints(tmp_path / "checkpoint", "key"))

    whole, run_repair = solved(model, documents, blocks, **options)
    expected = run_repair(tmp_path)
    wanted, layers = bits(whole, tmp_path / "edits"), [*repaired]
    for number, layer in enumerate(layers):
        _, work = started()
        interrupt(monkeypatch, layer, work)
        edits, work = started()
        repaired.clear()
        assert work() == expected
        assert bits(edits, tmp_path / "edits") == wanted
        assert repaired == layers[number:]
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)


@pytest.mark.parametrize("harm", ["another key", "a bit", "halved", "no state", "another number of processes"])
def test_a_checkpoint_of_another_repair_or_a_damaged_one_is_ignored(
    harm: str, repaired: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, documents = made_model("llama"), many_documents()
    folder = tmp_path / "checkpoint"
    blocks, options = SETTINGS["repair"]
    _, run_repair = solved(model, documents, blocks, **options)
    interrupt(monkeypatch, 5, lambda: run_repair(tmp_path, Checkpoints(folder, "key")))
    # The last one, after the second layer, of the only process.
    place = folder / "2-0-of-1"
    assert [*folder.iterdir()] == [place]
    assert sorted(path.name for path in place.iterdir()) == [
        "dense", "edits.json", "edits.safetensors", "shortened", "state.json",
    ]  # fmt: skip
    content = (place / "dense").read_bytes()
    if harm == "a bit":
        (place / "dense").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif harm == "halved":
        (place / "shortened").write_bytes(content[: len(content) // 2])
    elif harm == "no state":
        (place / "state.json").write_text("[]", encoding="utf-8")
    elif harm == "another number of processes":
        place.rename(folder / "2-0-of-2")
    _, run_repair = solved(model, documents, blocks, **options)
    repaired.clear()
    run_repair(tmp_path, Checkpoints(folder, "another" if harm == "another key" else "key"))
    assert repaired == [1, 4, 5]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_disk_without_space_for_a_checkpoint_stops_no_repair(
    failure: Exception, repaired: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(Edits, "save", full)
    blocks, options = SETTINGS["repair"]
    _, run_repair = solved(made_model("llama"), many_documents(), blocks, **options)
    run_repair(tmp_path, Checkpoints(tmp_path / "checkpoint", "key"))
    assert "repair: the disk has no space for a checkpoint" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_stage_goes_on_and_removes_the_checkpoint(
    params: Params, tiny: Model, repaired: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, work = params.model_copy(update={"repair": True, "alpha": 5.0}), Workspace(tmp_path / "run")
    for stage in (inspect_inputs, calibrate, profile, select, plan, observe_activations, solve):
        stage(params, work)
    repair(params, work)
    wanted, layers, figures = sha256_below(work.repaired), [*repaired], read_json(work.metric("repair"))
    interrupt(monkeypatch, layers[-1], lambda: repair(params, work))
    repaired.clear()
    # Other settings begin anew.
    interrupt(monkeypatch, layers[0], lambda: repair(params.model_copy(update={"repair_ridge_mlp": 2.0}), work))
    repaired.clear()
    repair(params, work)
    assert repaired == layers[-1:]
    assert sha256_below(work.repaired) == wanted
    assert read_json(work.metric("repair")) == figures
    assert not [path for path in work.repaired.parent.iterdir() if "partial" in path.name]
