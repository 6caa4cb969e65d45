"""Several processes in place of one: the same cut, channels and figures, and the end of all if one dies."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from replaceme.api import prune
from replaceme.base.documents import Documents
from replaceme.base.entries import Task
from replaceme.base.errors import ParameterError
from replaceme.base.files import read_json, write_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params, read_params
from replaceme.base.plan import load_blocks
from replaceme.base.published import RECOMMENDED
from replaceme.edits.edits import Edits
from replaceme.methods.registry import METHODS
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.pipeline.runner import run_stages
from replaceme.repair import repair
from replaceme.running.processes import run_in_processes
from replaceme.running.stage import COMPRESSION, FIT, JUDGEMENT
from replaceme.running.workspace import Workspace
from tests.conftest import WIDTH, made_text
from tests.interruption import InterruptedRunError, counted, stop_at
from tests.pipeline.closure import ROOT
from tests.ranks import in_ranks

DEFAULT = {key: RECOMMENDED[key] for key in ("selection", "transform", "repair")}


def _fitted(params: Params, work: Workspace) -> list[str]:
    ran: list[str] = []
    run_in_processes(2, lambda: ran.extend(run_stages(params, work, FIT)), "auto")
    return ran


def _repaired(params: Params, work: Workspace, stop: int | None) -> list[int]:
    """Run the repair in two processes; return the layers that it has begun. All stop in the middle of layer ``stop``."""
    begun: list[int] = []
    walk = repair.RepairState.walk_dense

    def noting(state: Any, layer: int, observers: Any) -> None:
        begun.append(layer)
        walk(state, layer, observers)
        if layer == stop:
            raise InterruptedRunError

    with mock.patch.object(repair.RepairState, "walk_dense", noting), suppress(InterruptedRunError):
        run_in_processes(2, lambda: run_stages(params, work, ["repair"]), "auto")
    return begun


def _healed(params: Params, work: Workspace, stop: int | None) -> list[int]:
    """Heal in two processes; return the steps that this one has taken. All stop after ``stop`` of them."""
    with counted(stop_at(-1 if stop is None else stop)) as steps, suppress(InterruptedRunError):
        run_in_processes(2, lambda: run_stages(params, work, ["heal", "check"]), "auto")
    return steps


def _numbers(content: Any) -> list[float]:
    if isinstance(content, Mapping):
        return [number for key in sorted(content) for number in _numbers(content[key])]
    if isinstance(content, list):
        return [number for each in content for number in _numbers(each)]
    return [content]


@pytest.mark.parametrize(
    "setting",
    [
        {**DEFAULT, "memory": "150KB"},
        {"method": "sleb"},
        {**DEFAULT, "remove": "30%", "layers_to_skip": 1},
        {**DEFAULT, "heal_tokens": 1000, "heal_tokens_per_step": 200, "heal_learning_rate": 1e-3, "heal_optimizer": "muon"},
    ],
    ids=["streamed", "greedy", "narrower", "healed"],
)
def test_two_processes_find_what_one_finds(setting: dict[str, Any], params: Params, tmp_path: Path) -> None:
    params = Params.model_validate({**dict(params), **setting, "batch_size": 3})
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    for work in (one, two):
        inspect_inputs(params, work)
    run_stages(params, one, FIT)
    # The second process only serves the first one.
    assert in_ranks(2, partial(_fitted, params, two), tmp_path) == [[*FIT], []]
    assert load_blocks(one.blocks) == load_blocks(two.blocks)
    mine, others = (Edits.load(work.edits) for work in (one, two))
    assert mine.channels.keys() == others.channels.keys()
    assert all(torch.equal(mine.channels[host], others.channels[host]) for host in mine.channels)
    figures = [f"metrics/{stage}.json" for stage in ("select", "solve", "repair", "heal")]
    for name in (*figures, "artifacts/profile/profile.json"):
        ours, theirs = (_numbers(read_json(work.root / name)) for work in (one, two))
        assert theirs == pytest.approx(ours, rel=1e-4 if name == "metrics/heal.json" else 1e-6, abs=1e-9), name
    for stage in ("repaired", "edits"):
        ours, theirs = (load_file(work.root / "artifacts" / stage / "edits.safetensors") for work in (one, two))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            # A training in float32 passes on the order of its sums from step to step.
            most = (1e-4 if params.heal_tokens and stage == "edits" else 1e-6) * float(tensor.double().norm())
            assert float((theirs[name].double() - tensor.double()).norm()) <= most, name
    # Nothing of the second process is left.
    left = {path.relative_to(two.root) for path in two.root.rglob("*")} ^ {
        path.relative_to(one.root) for path in one.root.rglob("*")
    }
    assert not left


@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_a_shared_repair_goes_on_at_its_last_checkpoint_to_the_same_bits(params: Params, tmp_path: Path) -> None:
    params = Params.model_validate({**dict(params), **DEFAULT, "batch_size": 3})
    whole, work = Workspace(tmp_path / "whole"), Workspace(tmp_path / "run")
    for place in (whole, work):
        inspect_inputs(params, place)
        run_stages(params, place, FIT[: FIT.index("repair")])
    layers, others = in_ranks(2, partial(_repaired, params, whole, None), tmp_path)
    assert layers == others
    *finished, last = layers
    assert in_ranks(2, partial(_repaired, params, work, last), tmp_path) == [layers, layers]
    number = len(finished)
    assert {path.name for path in work.checkpoints.iterdir()} == {f"{number}-{rank}-of-2" for rank in range(2)}
    # Each process has its part of the states, and the first one the edits.
    sizes = [(work.checkpoints / f"{number}-{rank}-of-2" / "dense").stat().st_size for rank in range(2)]
    itemsize = getattr(torch, params.dtype).itemsize
    assert sum(sizes) == Documents.load(work.documents).token_count * WIDTH * itemsize
    assert in_ranks(2, partial(_repaired, params, work, None), tmp_path) == [[last], [last]]
    assert sha256_below(work.repaired) == sha256_below(whole.repaired)
    assert not work.checkpoints.exists()


@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_a_checkpoint_of_a_shared_repair_counts_if_all_processes_have_it(params: Params, tmp_path: Path) -> None:
    params, work = Params.model_validate({**dict(params), **DEFAULT, "batch_size": 3}), Workspace(tmp_path / "run")
    inspect_inputs(params, work)
    run_stages(params, work, FIT[: FIT.index("repair")])
    layers, _ = in_ranks(2, partial(_repaired, params, work, 5), tmp_path)
    place = work.checkpoints / f"{len(layers) - 1}-1-of-2"
    (place / "dense").write_bytes(b"")
    assert in_ranks(2, partial(_repaired, params, work, layers[0]), tmp_path) == [layers[:1], layers[:1]]
    # The other process's part is gone too.
    assert [*work.checkpoints.iterdir()] == [place]


@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_a_shared_healing_goes_on_at_its_last_checkpoint_to_the_same_bits(params: Params, tmp_path: Path) -> None:
    healing = {"heal_tokens": 1000, "heal_tokens_per_step": 200, "heal_optimizer": "muon"}
    settings = {"method": "uidl", **healing, "batch_size": 3}
    params, whole, work = Params.model_validate({**dict(params), **settings}), *map(Workspace, (tmp_path / "a", tmp_path / "b"))
    for place in (whole, work):
        inspect_inputs(params, place)
        run_stages(params, place, FIT[:-1])
    steps, others = in_ranks(2, partial(_healed, params, whole, None), tmp_path)
    assert steps == others
    assert in_ranks(2, partial(_healed, params, work, 3), tmp_path) == [steps[:3], steps[:3]]
    assert in_ranks(2, partial(_healed, params, work, None), tmp_path) == [steps[3:], steps[3:]]
    assert sha256_below(work.edits) == sha256_below(whole.edits)


def test_two_processes_give_the_scores_of_one(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"the old town {n}", "choices": ["and people", "fish", "wine are sold"], "answer": n % 3} for n in range(9)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = (*params.tasks, Task(str(questions)), Task("retrieval_exact", limit=6))
    params = Params.model_validate({**dict(params), "tasks": tasks, "max_length": 512, "eval_tokens": 3000})
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    for work in (one, two):
        monkeypatch.setenv("REPLACEME_CACHE", str(work.root / "cache"))
        inspect_inputs(params, work)
        run_stages(params, work, COMPRESSION)
    monkeypatch.setenv("REPLACEME_CACHE", str(one.root / "cache"))
    run_stages(params, one, JUDGEMENT[:2])
    table = capfd.readouterr().out
    monkeypatch.setenv("REPLACEME_CACHE", str(two.root / "cache"))
    assert in_ranks(2, partial(_scored, params, two), tmp_path) == [[*JUDGEMENT[:2]], []]
    assert capfd.readouterr().out == table
    assert read_json(two.metric("evaluation")) == read_json(one.metric("evaluation"))
    for name in ("items.safetensors", "continuations.json", "scores.json"):
        assert (two.baseline / name).read_bytes() == (one.baseline / name).read_bytes(), name


def _scored(params: Params, work: Workspace) -> list[str]:
    ran: list[str] = []
    run_in_processes(2, lambda: ran.extend(run_stages(params, work, JUDGEMENT[:2])), "auto")
    return ran


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"device": "cuda:1"}, "device: cuda:1 is one GPU, and each process has its own; use cuda or auto, or processes: 1."),
        ({"use_4bit": True}, "use_4bit: packs the weights for one process; use false, or processes: 1."),
        ({"device_map": "auto"}, "device_map: spreads the model over GPUs, of which each process has one; use null,"),
        ({"processes": 0}, "processes: must be at least 1, not 0."),
    ],
)
def test_what_processes_cannot_share_is_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(said)):
        read_params(None, {"processes": 2, **setting}, METHODS)


def test_a_call_from_python_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "processes: a call from Python has one; use 1 here"
    with pytest.raises(ParameterError, match=said):
        prune("nowhere", processes=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParameterError, match=said):
        prune("nowhere")


@pytest.mark.slow
def test_a_stage_starts_processes_of_which_a_killed_one_ends_all_and_the_launcher_starts_them_again(
    params: Params, tmp_path: Path
) -> None:
    (text := tmp_path / "long.txt").write_text(made_text(1500), encoding="utf-8")
    params = params.model_copy(update={"dataset": str(text), "dataset_size": 200, "batch_size": 1, "tasks": ()})
    work = Workspace(tmp_path)
    inspect_inputs(params, work)
    run_stages(params, work, ["generate", "calibrate"])
    # YAML includes JSON.
    write_json(tmp_path / "params.yaml", json.loads(params.model_dump_json(exclude={"tasks"})) | {"processes": 2})
    environment, stage = os.environ | {"PYTHONPATH": str(ROOT)}, ["-m", "stages.profile"]
    with subprocess.Popen([sys.executable, *stage], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        # Until both have begun the stage.
        assert any(line == "profile: shared by 2 processes\n" for line in run.stderr)
        _, second = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="ascii").split()
        os.kill(int(second), signal.SIGKILL)
        said = run.stderr.read()
    assert run.returncode == 2
    assert said == (
        "error: processes: rank 1 of 2 was ended by SIGKILL, perhaps for lack of memory; run again: finished stages are kept.\n"
    )
    assert not work.profile.exists()
    run_stages(params.model_copy(update={"dataset_size": 40}), work, ["calibrate"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, *stage], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, check=True)
    found = read_json(work.profile / "profile.json")
    run_stages(params, work, ["profile"])
    assert _numbers(found) == pytest.approx(_numbers(read_json(work.profile / "profile.json")), rel=1e-6, abs=1e-9)
