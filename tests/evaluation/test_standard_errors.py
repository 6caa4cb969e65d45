import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel
from torch import Tensor

from replaceme.evaluation.standard_errors import Sample, compute_paired_p_value, t_test
from replaceme.evaluation.windows import Windows


def alone(count: int) -> Tensor:
    return torch.full((count,), -1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_significance_is_the_exact_mcnemar_test(pairs: list[tuple[bool, bool]]) -> None:
    before, after = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float64) for side in (0, 1))
    better, worse = sum(not a and b for a, b in pairs), sum(a and not b for a, b in pairs)
    n, k = better + worse, min(better, worse)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    assert compute_paired_p_value(before, after) == pytest.approx(expected, rel=1e-9)


def test_scores_other_than_0_and_1_are_compared_by_the_paired_t_test() -> None:
    before, after = torch.rand(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert compute_paired_p_value(before, after) == pytest.approx(ttest_rel(before.numpy(), after.numpy()).pvalue)
    assert t_test(0.3, 0.2) == pytest.approx(math.erfc(1.5 / 2**0.5))
    assert (t_test(0.0, 0.0), t_test(0.1, 0.0)) == (1, 0)


def test_independent_items_have_the_standard_error_of_a_mean() -> None:
    scores = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert Sample.of_tasks([alone(50)], True).stderr(scores) == pytest.approx(float(scores.std()) / 50**0.5)
    assert Sample.of_tasks([alone(1)], True).stderr(scores[:1]) is None


@pytest.mark.parametrize("by_size", [True, False])
def test_in_a_group_the_tasks_are_fixed_and_their_items_a_sample(by_size: bool) -> None:
    parts = [torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (40, 200)]
    weights = [len(part) / 240 if by_size else 0.5 for part in parts]
    sample, scores = Sample.of_tasks([alone(40), alone(200)], by_size), torch.cat(parts)
    mean = sum(weight * float(part.mean()) for weight, part in zip(weights, parts, strict=True))
    variance = sum(weight**2 * float(part.var()) / len(part) for weight, part in zip(weights, parts, strict=True))
    assert float(sample.weights @ scores) == pytest.approx(mean)
    assert sample.stderr(scores) == pytest.approx(variance**0.5)


def test_the_standard_error_is_cluster_robust_for_articles_of_any_size() -> None:
    scores, articles = torch.rand(40, generator=torch.Generator().manual_seed(5)).double(), torch.arange(40).square() % 11
    sums = [float((scores - scores.mean())[articles == each].sum()) for each in articles.unique()]
    expected = (len(sums) / (len(sums) - 1) * sum(each**2 for each in sums)) ** 0.5 / 40
    assert Sample.of_tasks([articles], True).stderr(scores) == pytest.approx(expected)


def test_articles_of_one_size_are_the_items_of_a_t_test() -> None:
    scores, articles = torch.randn(12, 9, generator=torch.Generator().manual_seed(2)).double(), torch.arange(12)
    sample = Sample.of_tasks([articles.repeat_interleave(9)], True)
    stderr = sample.stderr(scores.flatten())
    assert stderr == pytest.approx(float(scores.mean(1).std()) / 12**0.5)
    assert sample.cluster_counts.tolist() == [12]
    assert t_test(float(scores.mean()), stderr or 0, 11) == pytest.approx(ttest_1samp(scores.mean(1).numpy(), 0).pvalue)


def test_two_tasks_over_the_same_articles_are_no_two_samples() -> None:
    scores, articles = torch.rand(60, generator=torch.Generator().manual_seed(4)).double(), torch.arange(60) // 3
    one, other, lone = (Sample.of_tasks([each], True) for each in (articles, articles + 100, alone(60)))
    assert Sample.of_scores([one, one]).stderr(scores.repeat(2)) == pytest.approx(one.stderr(scores))
    assert Sample.of_scores([one, other]).stderr(scores.repeat(2)) == pytest.approx((one.stderr(scores) or 0) / 2**0.5)
    assert Sample.of_scores([lone, lone]).stderr(scores.repeat(2)) == pytest.approx((lone.stderr(scores) or 0) / 2**0.5)


def windows_of(texts: list[int], counts: list[int]) -> Windows:
    return Windows([torch.zeros(count + 1, dtype=torch.int64) for count in counts], texts, 1, 1, 1)


def test_windows_are_weighted_by_their_tokens_and_clustered_by_text() -> None:
    counts = torch.tensor([30.0, 40, 35, 40, 40, 40, 20, 10, 40, 40], dtype=torch.float64)
    losses = torch.rand(10, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mean = float((losses * counts).sum() / counts.sum())
    residuals = (losses - mean) * counts
    single, several = windows_of([0] * 10, counts.int().tolist()), windows_of([0, 1, 2, 3, 4] * 2, counts.int().tolist())
    assert single.sample.stderr(losses) == pytest.approx(float(residuals.std()) * 10**0.5 / float(counts.sum()))
    by_text = residuals.reshape(2, 5).sum(0)
    expected = (5 / 4 * float(by_text.square().sum())) ** 0.5 / float(counts.sum())
    assert several.sample.stderr(losses) == pytest.approx(expected)
    assert float(several.sample.weights @ losses) == pytest.approx(mean)


def test_few_texts_have_no_standard_error() -> None:
    losses = torch.arange(12, dtype=torch.float64)
    assert windows_of([*range(4)] * 3, [3] * 12).sample.stderr(losses) is None
    assert windows_of([0], [3]).sample.stderr(losses[:1]) is None
    assert windows_of([*range(6)] * 2, [3] * 12).sample.stderr(losses)
