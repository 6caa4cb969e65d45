"""Documents: which are held out, and their form on disk."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from replaceme.base.documents import (
    EXCERPT_LENGTH,
    EXCERPT_SEED,
    FILE,
    SOURCE_BITS,
    Documents,
    excerpts_of,
    folds_of,
    part_of,
    split_indices,
)


def made(sources: list[int]) -> Documents:
    """Return documents of 3 tokens each, the first of which is the document's source."""
    return Documents([torch.tensor([source, 5, 6]) for source in sources], sources)


@pytest.mark.parametrize("every", [5, 20])
def test_of_documents_of_their_own_the_last_of_each_few_is_held_out(every: int) -> None:
    used, held_out = split_indices(range(47), every)
    assert held_out == [*range(every - 1, 47, every)]
    assert sorted(used + held_out) == [*range(47)]
    assert split_indices(range(every - 1), every)[1] == []


@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([5, 20]))
@settings(max_examples=200, deadline=None)
def test_no_text_is_on_both_sides_of_a_split(sources: list[int], every: int) -> None:
    used, held_out = split_indices(sources, every)
    assert sorted(used + held_out) == [*range(len(sources))]
    kept, gone = ({sources[place] for place in places} for places in (used, held_out))
    assert not kept & gone
    sizes = Counter(sources)
    assert bool(held_out) == (len(sources) >= every and len(sizes) > 1) or len(sources) < every
    smallest = min(sizes.values(), default=0)
    assert len(held_out) * every <= len(sources) or (len(gone) == 1 and len(held_out) == smallest)


@given(st.lists(st.integers(0, 30), min_size=5, max_size=90), st.sampled_from([5, 20]))
@settings(max_examples=200, deadline=None)
def test_every_domain_holds_out_its_own_share(domains: list[int], every: int) -> None:
    sources = [(domain << SOURCE_BITS) + number for number, domain in enumerate(domains)]
    _, held_out = split_indices(sources, every)
    counts, gone = Counter(domains), Counter(domains[place] for place in held_out)
    if len(sources) < every:
        assert not held_out
        return
    assert len(held_out) == len(sources) // every
    assert all(abs(gone[domain] - count / every) < 1 for domain, count in counts.items())


def test_the_text_of_a_loss_has_every_domain() -> None:
    sources = [(domain << SOURCE_BITS) + number for domain, count in enumerate((20, 3, 3, 3)) for number in range(count)]
    documents = Documents([torch.full((1500,), source >> SOURCE_BITS) for source in sources], sources)
    excerpts = excerpts_of(documents)
    assert [len(each) for each in excerpts.documents] == [EXCERPT_LENGTH] * 4
    assert {int(each[0]) for each in excerpts.documents} == {0, 1, 2, 3}
    alone = Documents([torch.full((900,), number) for number in range(9)], [*range(9)])
    assert [int(each[0]) for each in excerpts_of(alone).documents] == [
        int(each[0]) for each in alone.shuffled(EXCERPT_SEED).documents[:5]
    ]


def test_a_part_of_a_text_is_whole_documents_of_every_domain_at_its_share() -> None:
    sources = [(domain << SOURCE_BITS) + number for domain, count in enumerate((20, 10, 10)) for number in range(count)]
    documents = Documents([torch.full((100,), source >> SOURCE_BITS) for source in sources], sources)
    part = part_of(documents, 1950)
    assert part.token_count == 2000
    assert part.tokens_by_domain == {0: 1000, 1: 500, 2: 500}
    assert all(len(document) == 100 for document in part.documents)
    assert len(set(part.sources)) == 20
    assert part_of(documents, 4000) is documents


def test_sources_follow_their_documents_and_survive_the_disk(tmp_path: Path) -> None:
    documents = made([3, 3, 1, 4, 1])
    documents.save(tmp_path)
    for same in (documents.shuffled(0), documents.in_walk_order(), documents.head(3, 2), Documents.load(tmp_path)):
        assert [int(document[0]) for document in same.documents] == same.sources


def test_documents_of_their_own_need_no_sources_on_disk(tmp_path: Path) -> None:
    Documents(made([7, 3, 5]).documents).save(tmp_path)
    assert set(load_file(tmp_path / FILE)) == {"input_ids", "lengths"}
    assert Documents.load(tmp_path).sources == [0, 1, 2]


def test_domains_survive_the_disk_where_each_document_is_a_source_of_its_own(tmp_path: Path) -> None:
    sources = [(number % 3 << SOURCE_BITS) + number // 3 for number in range(9)]
    documents = Documents([torch.arange(2 + number) for number in range(9)], sources)
    documents.save(tmp_path)
    assert Documents.load(tmp_path).domains == [0, 1, 2] * 3
    assert Documents.load(tmp_path).tokens_by_domain == documents.tokens_by_domain == {0: 15, 1: 18, 2: 21}


def sources_by_fold(documents: Documents) -> list[set[int]]:
    """Return the sources of each fold."""
    ordered, folds = documents.in_walk_order(), folds_of(documents)
    first = [0, *torch.tensor([len(each) for each in ordered.documents]).cumsum(0).tolist()[:-1]]
    found: dict[int, set[int]] = {}
    for source, place in zip(ordered.sources, first, strict=True):
        found.setdefault(int(folds[place]), set()).add(source)
    return [found[fold] for fold in sorted(found)]


def test_each_domain_is_spread_over_the_folds() -> None:
    domains = [0, 1, 2, 3] * 8
    documents = Documents([torch.arange(5)] * 32, [(domain << SOURCE_BITS) + place for place, domain in enumerate(domains)])
    for sources in sources_by_fold(documents):
        assert Counter(source >> SOURCE_BITS for source in sources) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert len(folds_of(documents)) == documents.token_count


def test_folds_of_one_domain_are_whole_sources_of_like_size() -> None:
    documents = Documents([torch.arange(5)] * 16, [place // 2 for place in range(16)])
    assert sorted(map(len, sources_by_fold(documents))) == [2, 2, 2, 2]
    assert folds_of(documents).bincount().tolist() == [20, 20, 20, 20]


def test_documents_of_one_source_are_the_folds() -> None:
    assert folds_of(Documents([torch.arange(5)] * 3, [7, 7, 7])).unique().tolist() == [0, 1, 2]
    assert folds_of(Documents([torch.arange(5)])).tolist() == [0] * 5
