"""The losses of a text by domain, and the typical rise over the domains."""

import math

import pytest
import torch
from scipy.stats import trim_mean

from replaceme.base.documents import SOURCE_BITS, Documents, split_documents
from replaceme.selection.candidate_evaluation import Losses, batches_of, next_token_losses
from replaceme.selection.cut_loss import dense_losses
from tests.conftest import made_model
from tests.helpers import context_of, many_documents, mean_loss


def losses(means: list[float]) -> Losses:
    return Losses([*range(len(means))], 10 * torch.tensor(means, dtype=torch.float64), torch.full((len(means),), 10.0))


def rise(rises: list[float], weights: list[float] | None = None) -> float:
    shares = dict(enumerate(weights or [1.0] * len(rises)))
    return losses([3 + each for each in rises]).rise_over(losses([3.0] * len(rises)), shares)


@pytest.mark.parametrize("rises", [[0.3], [0.3, 0.1], [4.0, 0.1, 0.2, 0.6], [9.0, 0.1, 0.2, 0.6, 0.3, 0.0, 0.4, 7.0]])
def test_the_rise_is_the_mean_of_the_middle_half_of_the_domains(rises: list[float]) -> None:
    assert rise(rises) == pytest.approx(trim_mean(rises, 0.25))


def test_it_is_the_mean_of_weighted_quantiles() -> None:
    rises, weights = [0.5, 0.1, 0.9, 0.4, 0.3], [30.0, 10.0, 25.0, 20.0, 15.0]
    repeated = sorted(value for value, weight in zip(rises, weights, strict=True) for _ in range(int(weight)))
    assert rise(rises, weights) == pytest.approx(sum(repeated[25:75]) / 50)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_domain_that_overflows_makes_the_rise_infinite(loss: float) -> None:
    assert rise([0.1, loss, 0.2]) == math.inf


def test_each_domains_losses_are_those_of_its_own_texts() -> None:
    texts = many_documents(12).documents
    numbers = [place % 3 for place in range(len(texts))]
    documents = Documents(texts, [(domain << SOURCE_BITS) + place for place, domain in enumerate(numbers)])
    context = context_of(model := made_model(), documents)
    found = next_token_losses(context, batches_of(context))
    for domain in range(3):
        own = Documents([text for text, number in zip(texts, numbers, strict=True) if number == domain])
        expected = mean_loss(model, own)
        assert float(found.sums[domain] / found.counts[domain]) == pytest.approx(expected, rel=1e-5)
    assert found.mean == pytest.approx(mean_loss(model, documents), rel=1e-5)
    assert dense_losses(context_of(model, documents)).domains == [*{*split_documents(documents)[1].domains}]
