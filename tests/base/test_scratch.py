"""Tensors on disk."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from replaceme.base.errors import ResourceError
from replaceme.base.scratch import ScratchFile, scratch, unmap


def test_the_space_of_scratch_tensors_is_taken_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    mapped = torch.from_file

    def noting(file: str, **options: Any) -> torch.Tensor:
        taken.append(512 * Path(file).stat().st_blocks)
        return mapped(file, **options)

    monkeypatch.setattr(torch, "from_file", noting)
    tensors = scratch([(300, 100), (7, 1000)], torch.float32, tmp_path, "a test")
    assert [tensor.shape for tensor in tensors] == [(300, 100), (7, 1000)]
    assert not any(tensor.any() for tensor in tensors)
    assert taken[0] >= 120_000
    assert taken[1] >= 28_000
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, memory of files is not counted")
def test_what_is_unmapped_takes_no_memory_and_stays_what_it_was(tmp_path: Path) -> None:
    def mapped() -> int:
        (found,) = re.findall(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        return 1024 * int(found)

    (rows,) = scratch([(2, 1 << 22)], torch.float32, tmp_path, "a test")
    rows[0], rows[1] = 1.5, torch.arange(1 << 22)
    before = mapped()
    unmap(rows[1])
    assert before - mapped() > 15 << 20
    unmap(rows[0, 5:9])  # less than a page
    assert torch.equal(rows[1], torch.arange(1 << 22).float())
    assert bool((rows[0] == 1.5).all())
    with pytest.raises(AssertionError):
        unmap(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool, torch.int64])
def test_a_scratch_file_gives_back_what_it_was_given(tmp_path: Path, dtype: torch.dtype) -> None:
    given = (torch.randn(4, 6, 5) * 3).to(dtype)
    with ScratchFile(tmp_path) as file:
        one, other = file.mapping(), file.mapping()
        one["a", 1], other["a", 1], one["scalar"] = given, given[1:, ::2].transpose(0, 1), given[0, 0, 0]
        assert torch.equal(one["a", 1], given)
        assert torch.equal(other.pop(("a", 1)), given[1:, ::2].transpose(0, 1))
        assert one["scalar"].shape == ()
        assert (len(one), len(other), one["a", 1].dtype) == (2, 0, dtype)
        assert list(tmp_path.iterdir()) == []


def test_a_scratch_file_says_what_the_disk_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2 << 20))
    with (
        ScratchFile(tmp_path) as file,
        pytest.raises(ResourceError, match="states between layers need 3 MiB there, and 2 MiB are"),
    ):
        file.mapping()["state"] = torch.empty(3 << 20, dtype=torch.uint8)
