import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from replaceme.base import accelerators
from replaceme.base.errors import LostProcessError, ResourceError
from replaceme.base.group import all_gather, process_group, sharing
from replaceme.base.progress import logger
from replaceme.base.ranks import rank, world_size
from replaceme.models import devices
from replaceme.models.devices import free_memory
from replaceme.running import entry
from tests.ranks import in_ranks


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Let later tests log what this process would not, as another one than the first."""
    before = logger.level
    yield
    logger.setLevel(before)


def _lost() -> str:
    try:
        with process_group("auto"), sharing():
            all_gather(None)
            if rank() == 1:
                raise InterruptedError
            all_gather(None)
    except (LostProcessError, InterruptedError) as error:
        return str(error)
    return "nothing is lost"


def test_a_process_notices_that_another_one_has_ended(tmp_path: Path) -> None:
    said = "processes: another one has ended; run again: finished stages are kept."
    assert in_ranks(2, _lost, tmp_path) == [said, ""]


def _free() -> list[int]:
    devices.MEMORY_INFO = Path(os.environ["MEMORY"])
    devices.GROUP_LIMIT = Path("nowhere")
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with process_group("auto"):
        alone = free_memory("cpu")
        with sharing():
            return [alone, free_memory("cpu")]


def test_processes_that_share_work_share_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").write_text("MemAvailable:   3000 kB\n", encoding="utf-8")
    monkeypatch.setenv("MEMORY", str(tmp_path / "memory"))
    assert in_ranks(2, _free, tmp_path) == [[3000 << 10, 1500 << 10]] * 2


def test_each_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _seen(monkeypatch, "cuda", 2)
    assert [devices.resolve_device(device) for device in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:0",
        "cuda:0",
        "cuda:1",
        "cpu",
    ]
    _launched(monkeypatch, 1)
    assert [devices.resolve_device(device) for device in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ResourceError, match="processes: each needs a GPU of its own, and torch sees 2; start at most 2"):
        devices.resolve_device("cuda")


@pytest.mark.parametrize(
    ("kind", "device", "said"),
    [
        (None, "mps", "device: mps is asked for, but torch sees no mps device; use cpu or auto."),
        ("mps", "cuda", "device: cuda is asked for, but torch sees devices of the kind mps only; use mps or auto."),
        ("xpu", "xpu:1", "device: xpu:1 is asked for, but torch sees 1 xpu device."),
    ],
)
def test_a_device_that_is_not_there_is_named_with_what_is(
    kind: str | None, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _seen(monkeypatch, kind, 1 if kind else 0)
    with pytest.raises(ResourceError) as caught:
        devices.resolve_device(device)
    assert str(caught.value) == said


def _seen(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int) -> None:
    monkeypatch.setattr(accelerators, "find_kind", lambda: kind)
    monkeypatch.setattr(accelerators, "current_device", lambda: 0)
    monkeypatch.setattr(accelerators, "count_devices", lambda: count)


def test_on_the_processor_no_process_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _seen(monkeypatch, "cuda", 1)

    def number() -> int:
        with process_group("cpu"):
            return rank()

    assert in_ranks(2, number, tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("own", "error", "said"),
    [
        # All processes meet it: the first one says it, and the launcher ends the others meanwhile.
        (0, ResourceError("the disk is full."), "error: the disk is full.\n"),
        (1, ResourceError("the disk is full."), "rank 1: error: the disk is full.\n"),
        # The launcher says which one it was.
        (0, LostProcessError("processes: another one has ended."), "error: processes: another one has ended.\n"),
    ],
)
def test_of_several_processes_that_fail_one_says_why(
    own: int, error: ResourceError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _launched(monkeypatch, own)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)

    def fails() -> None:
        raise error

    assert entry.run(fails) == 2
    assert capsys.readouterr().err == said
    assert bool(waited) == (own == 1 or isinstance(error, LostProcessError))


def _launched(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for name, value in (("RANK", number), ("LOCAL_RANK", number), ("WORLD_SIZE", 2), ("TORCHELASTIC_RUN_ID", "test")):
        monkeypatch.setenv(name, str(value))


def test_other_programs_variables_make_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    _launched(monkeypatch, 0)
    assert world_size() == 2
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert world_size() == 1
