"""What else runs on a device: the memory that is counted, streaming, several processes, and the commands, whole."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import replaceme
from replaceme.cli.main import main
from replaceme.models import devices
from replaceme.models.devices import free_memory, release_memory
from replaceme.models.memory import load_streamed, measure_parts
from replaceme.models.model import Model
from replaceme.pipeline.actions import SPEED_FILE
from replaceme.pipeline.heal import heal
from replaceme.pipeline.runner import run_stages
from replaceme.running.cost import cost_measurement
from replaceme.running.processes import run_in_processes
from replaceme.running.stage import FIT
from replaceme.running.workspace import Workspace
from replaceme.statistics.sums import Sums
from tests.device import pretended
from tests.device.collectives import pretended_nccl
from tests.device.conftest import set_float64
from tests.device.test_results import fit, make_params
from tests.helpers import TEXT, call, logits_of
from tests.interruption import InterruptedRunError, counted, stop_at
from tests.ranks import in_ranks


def test_blocks_that_torch_keeps_are_free_and_go_back_between_stages() -> None:
    release_memory()
    free = free_memory("cuda:0")
    held = torch.ones(1 << 18, device="cuda:0")
    assert free_memory("cuda:0") == free - held.nbytes
    del held
    assert torch.accelerator.memory_reserved(0) >= 1 << 20
    assert free_memory("cuda:0") == free
    release_memory()
    assert torch.accelerator.memory_reserved(0) == torch.accelerator.memory_allocated(0)


def test_the_cost_of_a_stage_has_the_peak_and_the_name_of_the_devices() -> None:
    with cost_measurement() as cost:
        torch.ones(1 << 18, device="cuda:1")
    assert cost["peak_cuda_bytes"] >= 1 << 20
    assert "Pretended GPU 0, Pretended GPU 1" in cost["machine"]


def test_the_doctor_names_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    call(main, "doctor")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["cuda:1"].startswith("Pretended GPU 1, 8.59 GB of 8.59 GB are free, float64")
    assert lines["device"] == "auto is cuda:0 (Pretended GPU 0)"
    assert lines["dtype"].startswith("auto is bfloat16; on cuda:0, a product of 1536 x 8960 takes float32 in ")


def test_memory_that_is_the_processors_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = SimpleNamespace(recommended_max_memory=lambda: 10 << 30, current_allocated_memory=lambda: 1 << 30)
    monkeypatch.setattr(torch, "mps", mps)
    for free, expected in ((2 << 30, 2 << 30), (20 << 30, 9 << 30)):
        monkeypatch.setattr(devices, "_free_of_processor", lambda free=free: free)
        assert free_memory("mps:0") == expected


@pytest.mark.parametrize("part", [1.0, 1.5, 2.0, 4.0, 5.9])
def test_a_streamed_model_computes_within_its_memory(tiny: Model, part: float) -> None:
    outside, layer = measure_parts(tiny, "float32")
    expected = logits_of(tiny.load())
    gc.collect()
    torch.accelerator.reset_peak_memory_stats(1)
    before = torch.accelerator.memory_allocated(1)
    # The thread's present device is the first one.
    model = load_streamed(tiny, "float32", outside + int(part * layer), device="cuda:1")
    weights = torch.accelerator.max_memory_allocated(1) - before
    with torch.inference_mode():
        logits = model(TEXT.to("cuda:1"), use_cache=False).logits.cpu()
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    assert weights <= outside + layer
    assert {value.device for value in model.parameters() if not value.is_meta} == {torch.device("cuda:1")}


def test_sums_of_tiles_have_six_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    # Features of sizes that differ a thousand times, as those of language models do, with a mean.
    x = (torch.randn(6000, 96, generator=generator) + 1) * torch.logspace(-1.5, 1.5, 96)
    exact = x.double().T @ x.double()
    set_float64(there=False)
    sums = Sums()
    for rows in x.to("cuda").split(1500):
        sums.add_squares("gram", rows)
    gram = sums.take_totals()["gram"]
    scale = exact.diagonal().sqrt()
    assert gram.dtype == torch.float64
    assert float(((gram - exact) / scale / scale[:, None]).abs().max()) <= 1e-6
    assert float((gram - exact).norm() / exact.norm()) <= 1e-6


@pytest.mark.parametrize("given", [16, 5])
def test_a_batch_that_does_not_fit_is_halved(given: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    removed, logits = fit(tmp_path, "llama", {"preset": "published"}, "cpu")
    release_memory()
    before = torch.accelerator.memory_allocated(0)
    torch.accelerator.reset_peak_memory_stats(0)
    fit(tmp_path, "llama", {"preset": "published", "batch_size": 2}, "cuda", "small")
    pretended.extension.set_limit(before + int(1.1 * (torch.accelerator.max_memory_allocated(0) - before)))
    own_removed, own = fit(tmp_path, "llama", {"preset": "published", "batch_size": given}, "cuda", "large")
    assert own_removed == removed
    assert float((own - logits).norm() / logits.norm()) < 1e-5
    said = [record.message for record in caplog.records if "does not fit the GPU" in record.message]
    assert said[0].startswith(f"batch_size: {given} does not fit the GPU's memory; ")
    assert len(said) == (3 if given == 16 else 1)


@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_a_healing_with_smaller_batches_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    settings = {"preset": "published", "dtype": "float32", "heal_tokens": 600, "heal_tokens_per_step": 200}
    with pytest.raises(InterruptedRunError), counted(stop_at(1)):
        fit(tmp_path, "llama", {**settings, "batch_size": 4}, "cuda")
    smaller = make_params(tmp_path, "llama", {**settings, "batch_size": 2}, "cuda")
    with counted() as steps:
        heal(smaller, Workspace(tmp_path / "llama" / "cuda"))
    assert steps[0] > 0


def _fitted(folder: Path, device: str, float64: bool) -> dict[str, Any]:
    set_float64(there=float64)
    work, params = Workspace(folder / "shared"), make_params(folder, "llama", {}, device)
    with pretended_nccl():
        run_in_processes(2, lambda: run_stages(params, work, ["inputs", *FIT]), device)
    return {"device": torch.cuda.current_device(), "peak": torch.accelerator.max_memory_allocated()}


@pytest.mark.parametrize("float64", [True, False])
def test_two_processes_with_a_device_each_find_what_one_finds(float64: bool, tmp_path: Path) -> None:
    alone = Workspace(tmp_path / "alone")
    run_stages(make_params(tmp_path, "llama", {}, "cpu"), alone, ["inputs", *FIT])
    ranks = in_ranks(2, lambda: _fitted(tmp_path, "cuda", float64), tmp_path)
    assert [each["device"] for each in ranks] == [0, 1]
    assert all(each["peak"] for each in ranks)
    own, one = (json.loads((work.metric("repair")).read_text()) for work in (Workspace(tmp_path / "shared"), alone))
    assert _flat(own) == pytest.approx(_flat(one), rel=1e-4)


def _flat(content: Any, path: str = "") -> dict[str, float]:
    if isinstance(content, dict):
        return {key: value for name, each in content.items() for key, value in _flat(each, f"{path}/{name}").items()}
    return {path: content}


def test_a_model_is_pruned_scored_and_timed_where_nobody_names_a_device(tiny: Model, text_file: Path, tmp_path: Path) -> None:
    settings = {
        "dtype": "float32", "eval_dtype": "float32", "threads": 1, "dataset_size": 20, "max_length": 48, "eval_tokens": 600,
        "tasks": [str(text_file)],
    }  # fmt: skip
    scores = {}
    for device in ("cpu", "auto"):
        torch.accelerator.reset_peak_memory_stats(0)
        pruned = replaceme.prune(tiny.folder, text_file, 2, tmp_path / device, device=device, **settings)
        scores[device] = pruned.scores["perplexity"]["text"]["pruned"]
    assert torch.accelerator.max_memory_allocated(0)
    assert scores["auto"] == pytest.approx(scores["cpu"], rel=1e-4)
    call(main, "speed", "--model", tiny.folder, "--save_path", tmp_path / "auto", "--eval_dtype", "float32", "--threads", "1")
    times = json.loads(next(tmp_path.rglob(SPEED_FILE)).read_text(encoding="utf-8"))
    assert times["device"] == "Pretended GPU 0"
