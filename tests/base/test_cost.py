"""The cost of each stage of the compression, and the total."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from replaceme.base import cost as cost_module
from replaceme.base.cost import peak_memory, recorded
from replaceme.base.errors import ResourceError
from replaceme.base.files import read_json, write_json
from replaceme.base.params import Params, read_params
from replaceme.base.stage import COMPRESSION, Stage, run_stage
from replaceme.base.workspace import Workspace
from replaceme.methods.method import Method
from replaceme.methods.registry import METHODS
from replaceme.pipeline.report import compression_figures
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
    assert set(cost) == {"seconds", "peak_memory_bytes"}
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
    cuda = SimpleNamespace(is_initialized=lambda: True, device_count=lambda: 2, max_memory_allocated=lambda n: 100 * (n + 1))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with recorded(tmp_path / "cost.json"):
        pass
    assert read_json(tmp_path / "cost.json")["peak_cuda_bytes"] == 300


@pytest.mark.parametrize(("name", "left"), [("solve", ["artifacts/cost/solve.json"]), ("evaluate", [])])
def test_a_stage_of_the_compression_leaves_its_cost_and_no_other_does(
    name: str, left: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["stage"])
    Path("params.yaml").write_text("method: uidl\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        run_stage(Stage(name=name, run=lambda params, work: None, code=(), methods=METHODS))
    assert [path.as_posix() for path in Path("artifacts").rglob("*.json")] == left


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


def test_a_method_that_trains_says_so(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    costs(work := Workspace(tmp_path))
    method = METHODS[params.method]
    trained = Method(solve=method.solve, trained=True)
    monkeypatch.setitem(METHODS, params.method, trained)
    assert compression_figures(params, work)["trained"] is True


def test_a_stage_without_a_record_is_named(tmp_path: Path) -> None:
    costs(work := Workspace(tmp_path))
    work.cost("select").unlink()
    with pytest.raises(ResourceError, match=r"select\.json does not exist"):
        compression_figures(read_params(None, {}), work)


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
