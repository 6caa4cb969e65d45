"""The cost of each stage of the compression, and the total."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from replaceme.base import accelerators
from replaceme.base.files import cache_folder, write_json, write_text
from replaceme.base.parameters import Params, read_params
from replaceme.methods.method import Method
from replaceme.methods.registry import METHODS
from replaceme.pipeline.cost import compression_figures, summarize_run
from replaceme.running import machine as machine_module
from replaceme.running.cost import cost_measurement, kept_cost
from replaceme.running.stage import COMPRESSION, Stage, run_stage
from replaceme.running.workspace import Workspace
from tests.pipeline.closure import ROOT

MIB = 1 << 20


def test_seconds_and_peak_are_those_of_the_block() -> None:
    held = b"\1" * (300 * MIB)  # this process's own, which counts for nothing
    program = (
        "from replaceme.running.cost import cost_measurement\nwith cost_measurement() as cost:\n"
        "    import time; time.sleep(0.05); held = b'1' * (100 << 20)\nprint(cost)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
    cost = eval(done.stdout)
    assert set(cost) == {"seconds", "peak_memory_bytes", "machine"}
    assert 0.05 <= cost["seconds"] < 5
    assert 100 * MIB <= cost["peak_memory_bytes"] < 200 * MIB < len(held)


def test_a_machine_is_named_and_the_peaks_of_all_its_gpus_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "find_kind", lambda: "cuda")
    monkeypatch.setattr(accelerators, "count_devices", lambda: 2)
    monkeypatch.setattr("torch.accelerator.max_memory_allocated", lambda number: 100 * (number + 1))
    waited: list[int] = []
    monkeypatch.setattr("torch.accelerator.synchronize", waited.append)
    monkeypatch.setattr(accelerators, "device_name", lambda device: f"GPU {device[-1]}")
    monkeypatch.setattr(machine_module, "processor", lambda: "Made Up 9000")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5}, raising=False)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2_000_000}.get)
    with cost_measurement() as cost:
        pass
    assert waited == [0, 1]
    assert cost["peak_cuda_bytes"] == 300
    packages = f"torch {version('torch')}, transformers {version('transformers')}"
    assert cost["machine"] == f"Made Up 9000, 2 cores, 8.19 GB of memory, GPU 0, GPU 1; {packages}"


@pytest.fixture
def _made_up_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a stage ``solve`` that copies a file."""
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setattr("sys.argv", ["stage"])
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "cache"))
    stage = "{deps: [read.txt], params: [alpha], outs: [written], metrics: [{metrics/solve.json: {cache: false}}]}"
    write_text(Path("dvc.yaml"), f"stages: {{solve: {stage}}}\n")
    write_text(Path("params.yaml"), "method: uidl\n")
    write_text(Path("read.txt"), "some text")


def copy_text(name: str = "solve") -> None:
    """Run the made-up stage as DVC does."""

    def copy(params: Params, work: Workspace) -> None:
        write_text(Path("written", "copy.txt"), Path("read.txt").read_text())
        write_json(Path("metrics", "solve.json"), {})

    with pytest.raises(SystemExit, match="0"):
        run_stage(Stage(name=name, run=copy, methods=METHODS))


def cost_here(**params: Any) -> Any:
    """Return the known cost of what the made-up stage wrote."""
    return kept_cost("solve", read_params(Path("params.yaml"), params))


@pytest.mark.usefixtures("_made_up_pipeline")
def test_a_stage_keeps_its_cost_apart_from_its_outputs_and_the_report_has_none() -> None:
    copy_text("report")
    assert not (cache_folder() / "costs").exists()
    copy_text()
    assert set(cost_here()) == {"seconds", "peak_memory_bytes", "machine"}
    here = {path.as_posix() for path in Path().rglob("*") if path.is_file()}
    assert here == {"dvc.yaml", "params.yaml", "read.txt", "written/copy.txt", "metrics/solve.json"}


@pytest.mark.usefixtures("_made_up_pipeline")
def test_a_cost_belongs_to_the_parameters_and_to_what_was_written() -> None:
    copy_text()
    first = cost_here()
    assert cost_here(seed=7) == first
    assert cost_here(alpha=1.0) is None
    for path in (Path("written", "copy.txt"), Path("metrics", "solve.json")):
        content = path.read_text()
        write_text(path, f"{content} ")
        assert cost_here() is None
        write_text(path, content)
        assert cost_here() == first
    write_text(Path("read.txt"), "other text")
    copy_text()
    assert cost_here() is not None
    # What was computed before is there again, as DVC restores it.
    write_text(Path("written", "copy.txt"), "some text")
    assert cost_here() == first
    for record in (cache_folder() / "costs" / "solve").iterdir():
        record.write_text("")
    assert cost_here() is None


@pytest.mark.usefixtures("_made_up_pipeline")
def test_a_stage_is_done_though_its_cost_can_not_be_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REPLACEME_CACHE", str(Path("read.txt").absolute()))
    copy_text()
    assert "cost: that of the stage solve is not kept" in capsys.readouterr().err


def record_costs(work: Workspace, **others: dict[str, Any]) -> None:
    for number, name in enumerate(COMPRESSION):
        cost = {"seconds": 2.0**number, "peak_memory_bytes": 1000 - number, "machine": "old"}
        write_json(work.record(name), {"cost": cost | others.get(name, {})})


def test_the_whole_compression_is_the_sum_of_seconds_and_the_largest_peak(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_costs(work := Workspace(tmp_path))
    figures = {
        "seconds": 2.0 ** len(COMPRESSION) - 1,
        "stage_seconds": {name: 2.0**number for number, name in enumerate(COMPRESSION)},
        "peak_memory_bytes": 1000,
        "machines": ["old"],
        "trained": False,
    }
    assert compression_figures(params, work) == figures
    others = {"peak_memory_bytes": 5000, "peak_cuda_bytes": 7000}
    record_costs(work, repair=others, select={"machine": "new"})
    assert compression_figures(params, work) == figures | others | {"machines": ["new", "old"]}
    monkeypatch.setitem(METHODS, params.method, Method(solve=METHODS[params.method].solve, trained=True))
    assert compression_figures(params, work)["trained"] is True
    work.record("select").unlink()
    figures = compression_figures(params, work)
    assert figures["stages_not_measured"] == 1
    assert figures["stage_seconds"].keys() == {*COMPRESSION} - {"select"}
    assert "seconds" not in figures


def test_the_summary_has_a_dozen_figures_and_what_was_seen_apart() -> None:
    marks = {"a": (0, 0), "b": (1, 0), "c": (0, 1), "retrieval_exact": (0, 0)}
    evaluation = {
        "parameters": {"removed_percent": 20.0},
        "perplexity": {"a": {"ratio": 7.0}, "b": {"ratio": 2.0}, "c": {"ratio": 8.0}},
        "calibration_text": {task: {"seen": seen, "same_domain": domain} for task, (seen, domain) in marks.items()},
        "unseen": {"perplexity_ratio": 7.0, "stderr_perplexity_ratio": 0.5, "kl": 1.25, "agreement": 0.5},
        "accuracy": {"retrieval_exact": {"pruned": 0.25}, "other": {"pruned": 0.75}},
        "retention_percent": 90.0,
        "retention_above_chance_percent": 80.0,
    }
    checked = {"perplexity_ratio": 1.5, "plain_removal": {"perplexity_ratio": 3.0}}
    assert summarize_run(evaluation, 8, {"seconds": 60.0, "peak_memory_bytes": 1_500_000_000}, checked) == {
        "removed_layers": 8, "size_percent": 80.0, "unseen_ratio": 7.0, "unseen_stderr": 0.5, "unseen_kl": 1.25,
        "own_text_ratio": 1.5, "plain_removal_ratio": 3.0, "same_token": 50.0, "seen_ratio": 4.0, "retention": 90.0,
        "above_chance": 80.0, "exact_answers": 25.0, "seconds": 60.0, "memory_gb": 1.5,
    }  # fmt: skip
    assert summarize_run({"parameters": {"removed_percent": 20.5}}, 2, {}, {}) == {"removed_layers": 2, "size_percent": 79.5}
