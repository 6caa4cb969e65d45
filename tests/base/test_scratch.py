"""Tensors on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme.base.scratch import scratch


def test_the_space_of_scratch_tensors_is_taken_before_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    mapped = torch.from_file

    def noting(file: str, **options: Any) -> torch.Tensor:
        taken.append(512 * Path(file).stat().st_blocks)
        return mapped(file, **options)

    monkeypatch.setattr(torch, "from_file", noting)
    tensors = scratch([(300, 100), (7, 1000)], torch.float32, tmp_path)
    assert [tensor.shape for tensor in tensors] == [(300, 100), (7, 1000)]
    assert not any(tensor.any() for tensor in tensors)
    assert taken[0] >= 120_000
    assert taken[1] >= 28_000
    assert not [*tmp_path.iterdir()]
