import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from replaceme.base import compute, entry
from replaceme.base.compute import free_memory
from replaceme.base.errors import LostProcessError, ResourceError
from replaceme.base.group import joined, sharing, told
from replaceme.base.progress import logger
from replaceme.base.ranks import LAUNCHED, started
from tests.ranks import in_ranks


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Let later tests log what this process would not, as another one than the first."""
    before = logger.level
    yield
    logger.setLevel(before)


def _lost() -> str:
    with joined() as rank, sharing():
        told()
        if rank == 1:
            os._exit(0)
        with pytest.raises(LostProcessError) as lost:
            told()
        # Without the others, the group can't be left in order.
        Path(os.environ["LOST"] + str(rank)).write_text(str(lost.value), encoding="utf-8")
        os._exit(0)
    return ""


def test_the_sentence_of_a_lost_process_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOST", str(tmp_path / "lost"))
    with pytest.raises(FileNotFoundError):  # they wrote no result
        in_ranks(3, _lost, tmp_path)
    assert (tmp_path / "lost0").read_text(encoding="utf-8") == (
        "processes: rank 1 has ended; run again: finished stages are kept."
    )


def _free() -> list[int]:
    compute.MEMORY_INFO = Path(os.environ["MEMORY"])
    compute.GROUP_LIMIT = Path("nowhere")
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with joined():
        alone = free_memory("cpu")
        with sharing():
            return [alone, free_memory("cpu")]


def test_processes_that_share_work_share_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").write_text("MemAvailable:   3000 kB\n", encoding="utf-8")
    monkeypatch.setenv("MEMORY", str(tmp_path / "memory"))
    assert in_ranks(2, _free, tmp_path) == [[3000 << 10, 1500 << 10]] * 2


def test_each_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (compute.resolve_device("auto"), compute.resolve_device("cuda")) == ("cuda", "cuda")
    monkeypatch.setattr(compute, "group_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [compute.resolve_device(device) for device in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ResourceError, match="processes: each needs a GPU of its own, and torch sees 2; start at most 2"):
        compute.resolve_device("cuda")


def test_an_error_of_another_process_than_the_first_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "SAYING_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")

    def fails() -> None:
        raise ResourceError("the disk is full.")

    assert entry.run(fails) == 2
    assert capsys.readouterr().err == "rank 1: error: the disk is full.\n"


@pytest.mark.parametrize(("launched", "waits"), [(True, [entry.SAYING_SECONDS]), (False, [])])
def test_the_first_process_leaves_it_to_the_launcher_to_say_which_one_was_lost(
    launched: bool, waits: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    if launched:
        monkeypatch.setenv(LAUNCHED, "1")

    def fails() -> None:
        raise LostProcessError("processes: rank 1 has ended.")

    assert entry.run(fails) == 2
    assert waited == waits
    assert capsys.readouterr().err == "error: processes: rank 1 has ended.\n"


def test_other_programs_variables_make_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert started() == 1


def test_on_the_processor_no_process_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def number() -> int:
        with joined("cpu") as rank:
            return rank

    assert in_ranks(2, number, tmp_path) == [0, 1]
