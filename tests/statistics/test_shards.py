from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from replaceme.base.documents import Documents
from replaceme.base.errors import ResourceError
from replaceme.statistics.cut_statistics import take_statistics
from replaceme.statistics.shards import StoredShards, Tokens
from tests.conftest import WIDTH, made_model
from tests.helpers import context_of
from tests.statistics.helpers import BLOCK, at_cut

TOKENS_A_SHARD = 50


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replaceme.statistics.shards.SHARD_BYTES", 2 * WIDTH * 2 * TOKENS_A_SHARD)


def read_all(folder: Path, counts: torch.Tensor) -> tuple[StoredShards, list[Tokens]]:
    shards = StoredShards(counts, lambda name: load_file(folder / f"{name}.safetensors"))
    return shards, [shards.read(number) for number in range(len(shards.counts))]


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_the_fast_form_keeps_m_and_y_of_exactly_the_real_tokens(
    documents: Documents, tmp_path: Path, batch_size: int, small_shards: None
) -> None:
    model = made_model(dtype=torch.float64)
    taken = take_statistics(context_of(model, documents, batch_size, tmp_path), BLOCK, ["tokens"])
    shards, read = read_all(tmp_path, taken["tokens"]["counts"])
    assert sum(shards.counts) == documents.token_count
    assert shards.counts[:-1] == [TOKENS_A_SHARD] * (documents.token_count // TOKENS_A_SHARD)
    M, Z, H = at_cut(model, documents.in_walk_order())
    for expected, stored in ((M, [part[0] for part in read]), (H - Z, [part[2] for part in read])):
        assert np.allclose(torch.cat(stored).double().numpy(), expected, rtol=2**-8, atol=1e-3)
    assert all(part[1] is None for part in read)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"tokens.{number}.safetensors" for number in range(len(shards.counts))
    }


def test_the_accurate_form_keeps_all_that_passed_and_a_bf16_walk_loses_nothing(documents: Documents, tmp_path: Path) -> None:
    model = made_model(dtype=torch.bfloat16)
    taken = take_statistics(context_of(model, documents, 1, tmp_path), BLOCK, ["tokens_accurate"])
    _, [(M, Z, H)] = read_all(tmp_path, taken["tokens_accurate"]["counts"])
    expected_m, expected_z, expected_h = at_cut(model, documents.in_walk_order())
    assert Z is not None
    assert np.array_equal(M.double().numpy(), expected_m)
    assert np.array_equal(H.double().numpy(), expected_h)
    assert np.allclose((Z + M.float()).double().numpy(), expected_z + expected_m, rtol=1e-6, atol=1e-6)


def test_tokens_that_do_not_fit_on_the_disk_are_refused_before_any_is_written(
    documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2 * WIDTH * 2 * documents.token_count
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free - 1))
    with pytest.raises(ResourceError, match=r"loss cosine keeps 0 MiB of tokens there.*lower dataset_size or max_length"):
        take_statistics(context_of(made_model(), documents, 4, tmp_path), BLOCK, ["tokens"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    take_statistics(context_of(made_model(), documents, 4, tmp_path), BLOCK, ["tokens"])
