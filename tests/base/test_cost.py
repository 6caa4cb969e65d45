"""The cost of each stage of the compression, and the total."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replaceme.base import cost as cost_module
from replaceme.base import machine as machine_module
from replaceme.base.cost import kept, known, peak_memory, recorded
from replaceme.base.estimate import load_of
from replaceme.base.files import cache_folder, read_json, write_json, write_text
from replaceme.base.parameters import Params, read_params
from replaceme.base.stage import COMPRESSION, Stage, run_stage
from replaceme.base.workspace import Workspace
from replaceme.methods.method import Method
from replaceme.methods.registry import METHODS
from replaceme.pipeline.cost import STAGE, compression_figures, summary_of
from tests.pipeline.closure import ROOT

MIB = 1 << 20


def test_seconds_and_peak_are_those_of_the_block(tmp_path: Path) -> None:
    held = b"\1" * (300 * MIB)  # this process's own, which counts for nothing
    block = "import time; time.sleep(0.05); held = b'1' * (100 << 20)"
    program = (
        f"from pathlib import Path\nfrom replaceme.base.cost import recorded\nwith recorded(Path('cost.json')):\n    {block}"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    cost = read_json(tmp_path / "cost.json")
    assert set(cost) == {"seconds", "peak_memory_bytes", "machine"}
    assert 0.05 <= cost["seconds"] < 5
    assert 100 * MIB <= cost["peak_memory_bytes"] < 200 * MIB < len(held)


def test_without_proc_the_kernels_own_figure_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = peak_memory()
    monkeypatch.setattr(cost_module, "STATUS", tmp_path / "status")
    assert peak_memory() >= 0.9 * known


def test_what_fails_has_no_cost(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), recorded(tmp_path / "cost.json"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_the_peaks_of_all_cuda_devices_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 2, max_memory_allocated=lambda n: 100 * (n + 1),
        get_device_name=lambda n: f"GPU {n}",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with recorded(tmp_path / "cost.json"):
        pass
    cost = read_json(tmp_path / "cost.json")
    assert cost["peak_cuda_bytes"] == 300
    assert ", GPU 0, GPU 1; torch " in cost["machine"]


def test_a_machine_is_named_by_processor_cores_memory_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "CPU_INFO", tmp_path / "cpuinfo")
    write_text(tmp_path / "cpuinfo", "processor\t: 0\nmodel name\t: Made Up 9000\nflags\t: a b\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5}, raising=False)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2_000_000}.get)
    found = f"torch {version('torch')}, transformers {version('transformers')}"
    assert machine_module.machine() == f"Made Up 9000, 2 cores, 8.19 GB of memory; {found}"


@pytest.fixture
def made_up_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a stage ``solve`` that copies a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path.parent / "cache"))
    stage = "{deps: [read.txt], params: [alpha], outs: [written], metrics: [{metrics/solve.json: {cache: false}}]}"
    write_text(Path("dvc.yaml"), f"stages: {{solve: {stage}}}\n")
    write_text(Path("params.yaml"), "method: uidl\n")
    write_text(Path("read.txt"), "some text")


def copied(name: str = "solve") -> None:
    """Run the made-up stage as DVC does."""

    def copy(params: Params, work: Workspace) -> None:
        write_text(Path("written", "copy.txt"), Path("read.txt").read_text())
        write_json(Path("metrics", "solve.json"), {})

    with pytest.raises(SystemExit, match="0"):
        run_stage(Stage(name=name, run=copy, code=(), methods=METHODS))


def cost_here(**params: Any) -> Any:
    """Return the known cost of what the made-up stage wrote."""
    return known(kept("solve", read_params(Path("params.yaml"), params)))


@pytest.mark.usefixtures("made_up_pipeline")
def test_a_stage_keeps_its_cost_apart_from_its_outputs_and_the_report_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path_factory.mktemp("cache")))
    copied("report")
    assert not (cache_folder() / "costs").exists()
    copied()
    assert set(cost_here()) == {"seconds", "peak_memory_bytes", "machine"}
    here = {path.as_posix() for path in Path().rglob("*") if path.is_file()}
    assert here == {"dvc.yaml", "params.yaml", "read.txt", "written/copy.txt", "metrics/solve.json"}


@pytest.mark.usefixtures("made_up_pipeline")
def test_a_cost_belongs_to_parameters_and_to_what_was_read_and_written() -> None:
    copied()
    first = cost_here()
    assert cost_here(seed=7) == first
    assert cost_here(alpha=1.0) is None
    for path in (Path("read.txt"), Path("written", "copy.txt"), Path("metrics", "solve.json")):
        content = path.read_text()
        write_text(path, f"{content} ")
        assert cost_here() is None
        write_text(path, content)
        assert cost_here() == first
    write_text(Path("read.txt"), "other text")
    copied()
    other = cost_here()
    write_json(kept("solve", read_params(Path("params.yaml"))), other | {"seconds": 7})
    assert cost_here()["seconds"] == 7
    # What was computed before is there again, as DVC restores it.
    for path in (Path("read.txt"), Path("written", "copy.txt")):
        write_text(path, "some text")
    assert cost_here() == first


@pytest.mark.usefixtures("made_up_pipeline")
@pytest.mark.parametrize(
    "record",
    [
        '{"seconds": Infinity, "peak_memory_bytes": 1}',
        "",
        "[1]",
        '{"seconds": 1}',
        '{"seconds": "1", "peak_memory_bytes": 1}',
        '{"seconds": 1, "peak_memory_bytes": 1, "machine": 7}',
        "null",
    ],
)
def test_a_broken_record_is_none(record: str) -> None:
    copied()
    write_text(kept("solve", read_params(Path("params.yaml"))), record)
    assert cost_here() is None


@pytest.mark.usefixtures("made_up_pipeline")
def test_a_stage_is_done_though_its_cost_can_not_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REPLACEME_CACHE", str(tmp_path / "read.txt"))
    copied()
    assert "cost: that of the stage solve is not kept" in capsys.readouterr().err


@pytest.mark.usefixtures("made_up_pipeline")
def test_a_pipeline_without_records_and_outputs_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(ROOT / "dvc.yaml", "dvc.yaml")
    write_json(Path("artifacts", "blocks.json"), [{"start": 2, "end": 4}])
    write_json(Path("metrics", "evaluation.json"), {"parameters": {"removed_percent": 20.5}})
    with pytest.raises(SystemExit, match="0"):
        run_stage(STAGE)
    found = read_json(Path("metrics", "compression.json"))
    assert found.pop("settings") == load_of(read_params(Path("params.yaml"), methods=METHODS, preset="recommended"))
    assert found == {"stages_not_measured": len(COMPRESSION), "trained": False, "judgement_seconds": {}}
    assert read_json(Path("metrics", "summary.json")) == {"removed_layers": 2, "size_percent": 79.5}
    assert "cost: not known on this machine" in capsys.readouterr().err


def costs(work: Workspace) -> None:
    for number, name in enumerate(COMPRESSION):
        write_json(work.cost(name), {"seconds": 2.0**number, "peak_memory_bytes": 1000 - number})


def test_the_whole_compression_is_the_sum_of_seconds_and_the_largest_peak(tmp_path: Path) -> None:
    costs(work := Workspace(tmp_path))
    params = read_params(None, {"method": "lstsq"})
    figures = compression_figures(params, work)
    assert figures == {
        "seconds": 2.0 ** len(COMPRESSION) - 1,
        "stage_seconds": {name: 2.0**number for number, name in enumerate(COMPRESSION)},
        "peak_memory_bytes": 1000,
        "trained": False,
    }
    write_json(
        work.cost("repair"), {"seconds": 2.0 ** COMPRESSION.index("repair"), "peak_memory_bytes": 5000, "peak_cuda_bytes": 7000}
    )
    figures = compression_figures(params, work)
    assert (figures["seconds"], figures["peak_memory_bytes"], figures["peak_cuda_bytes"]) == (
        2.0 ** len(COMPRESSION) - 1,
        5000,
        7000,
    )


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
    assert summary_of(evaluation, 8, {"seconds": 60.0, "peak_memory_bytes": 1_500_000_000}) == {
        "removed_layers": 8, "size_percent": 80.0, "unseen_ratio": 7.0, "unseen_stderr": 0.5, "unseen_kl": 1.25,
        "same_token": 50.0, "seen_ratio": 4.0, "retention": 90.0, "above_chance": 80.0, "exact_answers": 25.0,
        "seconds": 60.0, "memory_gb": 1.5,
    }  # fmt: skip


def test_each_machine_is_named_once(tmp_path: Path, params: Params) -> None:
    costs(work := Workspace(tmp_path))
    for name, machine in zip(COMPRESSION, ("new", "old", "new"), strict=False):
        write_json(work.cost(name), {"seconds": 1.0, "peak_memory_bytes": 1000, "machine": machine})
    assert compression_figures(params, work)["machines"] == ["new", "old"]


def test_a_method_that_trains_says_so(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    costs(work := Workspace(tmp_path))
    method = METHODS[params.method]
    trained = Method(solve=method.solve, trained=True)
    monkeypatch.setitem(METHODS, params.method, trained)
    assert compression_figures(params, work)["trained"] is True


def test_a_stage_without_a_record_leaves_the_others_and_no_sum(tmp_path: Path) -> None:
    costs(work := Workspace(tmp_path))
    work.cost("select").unlink()
    figures = compression_figures(read_params(None, {}), work)
    assert figures.pop("stage_seconds").keys() == set(COMPRESSION) - {"select"}
    assert figures == {"stages_not_measured": 1, "trained": False}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_that_becomes_free_is_kept_unless_the_user_tunes_the_allocator() -> None:
    program = (
        "import resource, torch; from replaceme.base.compute import use_processor; use_processor(1)\n"
        "for _ in range(20): parts = [torch.ones(4 << 20) for _ in range(3)]; del parts\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | {"PYTHONPATH": str(ROOT)}
    faults = [
        int(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout)
        for env in (plain, plain | {"MALLOC_PERTURB_": "0"})
    ]
    # Three tensors of 16 MiB fault their pages in once, or in each of the twenty rounds.
    pages = 20 * 3 * (16 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults[1] - faults[0] > pages // 2
