import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from replaceme.base.documents import Batch, Documents
from replaceme.base.group import Shard, all_gather, all_reduce_sum, compute_on_rank0, merge_rows, process_group, shard, sharing
from replaceme.base.plan import Block
from replaceme.statistics.cut_statistics import REDUCIBLE, take_statistics
from replaceme.statistics.walk import Signal, Signals, signals_for, walk
from tests.conftest import made_model
from tests.helpers import context_of, many_documents
from tests.ranks import in_ranks


class Seen:
    """Notes the positions of the tokens that it sees; not additive."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return signals_for([0], "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        self.positions += range(batch.positions.start, batch.positions.stop)


class Shared(Seen):
    def all_reduce(self) -> None:
        pass


def _walked() -> list[list[int]]:
    model, alone, beside = made_model(), Shared(), [Shared(), Seen()]
    with process_group("auto"), sharing():
        for observers in ([alone], beside):
            walk(context_of(model, many_documents(7), 2), observers, description=None)
    return [observer.positions for observer in (alone, *beside)]


def test_processes_share_a_walk_if_all_of_its_observers_add_up(tmp_path: Path) -> None:
    everything = [*range(many_documents(7).token_count)]
    (first, *others), (second, *same) = in_ranks(2, _walked, tmp_path)
    assert sorted(first + second) == everything
    assert min(len(first), len(second)) > 0
    assert others == same == [everything] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_parts_of_the_batches_are_all_batches_once(size: int, documents: Documents) -> None:
    parts = [[*documents.batches(2, shard=Shard(rank, size))] for rank in range(size)]
    whole = [*documents.batches(2)]
    found = sorted((batch for part in parts for batch in part), key=lambda batch: batch.position)
    assert [batch.position for batch in found] == [batch.first_token for batch in whole]
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(found, whole, strict=True))
    for rank, part in enumerate(parts):
        assert len(part) == documents.batch_count(2, Shard(rank, size))
        assert [batch.first_token for batch in part] == [sum(b.token_count for b in part[:n]) for n in range(len(part))]
        assert sum(batch.token_count for batch in part) == documents.token_count_of(2, Shard(rank, size))


def _exchanged() -> list[Any]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with process_group("auto"), sharing():
        rank = shard().rank
        # The second process has seen nothing of b; a sum of float32 is added in float64.
        sums = {"a": torch.full((2, 3), 0.1 + rank, dtype=torch.float64).T}
        sums |= {} if rank else {"b": torch.tensor(2.0**-20), "c": torch.zeros(2)}
        all_reduce_sum(sums)
        rows = torch.zeros(4, dtype=torch.bfloat16)
        rows[rank::2] = 0.1 * (rank + 1)
        merge_rows(rows)
        drawn = compute_on_rank0(lambda: torch.cat([torch.rand(3), torch.tensor([torch.get_num_threads()])]))
        exchanged = {name: total.tolist() for name, total in sums.items()}
        return [exchanged, all_gather(rank), rows.tolist(), drawn.tolist(), torch.get_num_threads()]


def test_what_processes_exchange_is_the_same_in_all(tmp_path: Path) -> None:
    first, second = in_ranks(2, _exchanged, tmp_path)
    assert first == second
    sums, ranks, rows, drawn, threads = first
    assert sums == {"a": [[0.1 + 1.1] * 2] * 3, "b": 2.0**-20, "c": [0, 0]}
    assert (ranks, rows) == ([0, 1], torch.tensor([0.1, 0.2, 0.1, 0.2], dtype=torch.bfloat16).tolist())
    # What the first computes for all has the threads of both.
    assert (threads, drawn[3]) == (1, min(2, os.cpu_count() or 1))


def _statistics(batch_size: int) -> list[Any]:
    model = made_model()
    with process_group("auto"), sharing():
        taken = take_statistics(context_of(model, many_documents(7), batch_size), Block(2, 4), sorted(REDUCIBLE))
    return sorted([name, each, tensor.tolist()] for name, tensors in taken.items() for each, tensor in tensors.items())


@pytest.mark.parametrize("batch_size", [2, 7])
def test_statistics_of_two_processes_are_those_of_one(batch_size: int, tmp_path: Path) -> None:
    # With 7 documents in a batch, the second process has none.
    model = made_model()
    alone = take_statistics(context_of(model, many_documents(7), batch_size), Block(2, 4), sorted(REDUCIBLE))
    first, second = in_ranks(2, partial(_statistics, batch_size), tmp_path)
    assert first == second
    assert len(first) == sum(map(len, alone.values()))
    for name, each, values in first:
        torch.testing.assert_close(torch.tensor(values), alone[name][each].to(torch.tensor(values)), rtol=1e-6, atol=1e-12)
