"""The losses of a text by domain, and the typical rise over the domains."""

import math
from statistics import median

import pytest
import torch

from replaceme.base.documents import SOURCE_BITS, Documents
from replaceme.selection.cut_loss import dense_losses
from replaceme.selection.trials import Losses, batches_of, next_token_loss, next_token_losses
from tests.conftest import made_model
from tests.helpers import many_documents


def losses(means: list[float], counts: list[float]) -> Losses:
    sizes = torch.tensor(counts, dtype=torch.float64)
    return Losses(torch.tensor(means, dtype=torch.float64) * sizes, sizes)


def rise(rises: list[float], counts: list[float]) -> float:
    return losses([3 + each for each in rises], counts).rise_over(losses([3.0] * len(rises), counts))


@pytest.mark.parametrize("rises", [[0.3], [0.3, 0.1], [0.5, 0.1, 0.9], [4.0, 0.1, 0.2, 0.6], [0.1, 0.9, 0.2, 0.3, 7.0]])
def test_the_rise_is_the_median_of_domains_of_one_size(rises: list[float]) -> None:
    assert rise(rises, [100.0] * len(rises)) == pytest.approx(median(rises))


def test_two_domains_are_weighted_by_their_tokens() -> None:
    assert rise([0.8, 0.2], [300.0, 100.0]) == pytest.approx(0.75 * 0.8 + 0.25 * 0.2)
    # As the whole text's mean.
    assert losses([3.8, 3.2], [300.0, 100.0]).mean - 3 == pytest.approx(0.65)


def test_a_domain_with_most_of_the_tokens_decides() -> None:
    assert rise([0.1, 0.2, 5.0], [10.0, 10.0, 980.0]) == pytest.approx(5.0, rel=0.02)
    assert rise([5.0, 0.2, 0.1], [10.0, 980.0, 10.0]) == pytest.approx(0.2)


def test_no_single_domain_of_many_decides() -> None:
    worse, better = [0.6, 0.65, 0.6, 1.1], [1.1, 0.8, 0.7, 0.3]
    assert sum(better) < sum(worse)
    assert rise(worse, [1.0] * 4) < rise(better, [1.0] * 4)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_domain_that_overflows_makes_the_rise_infinite(loss: float) -> None:
    assert rise([0.1, loss, 0.2], [1.0, 1.0, 1.0]) == math.inf


def test_each_domains_losses_are_those_of_its_own_texts() -> None:
    texts = many_documents(12).documents
    numbers = [place % 3 for place in range(len(texts))]
    documents = Documents(texts, [(domain << SOURCE_BITS) + place for place, domain in enumerate(numbers)])
    model = made_model()
    found = next_token_losses(model, documents, batches_of(model, documents, 4))
    for domain in range(3):
        own = Documents([text for text, number in zip(texts, numbers, strict=True) if number == domain])
        expected = next_token_loss(model, batches_of(model, own, 1))
        assert float(found.sums[domain] / found.counts[domain]) == pytest.approx(expected, rel=1e-5)
    assert found.mean == pytest.approx(next_token_loss(model, batches_of(model, documents, 1)), rel=1e-5)
    assert len(dense_losses(model, documents, 4).counts) > 1
