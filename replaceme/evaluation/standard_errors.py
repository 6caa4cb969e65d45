"""Standard errors and p-values of means over items that share articles, or over windows that share texts.

Items of one article share its topic and its difficulty, so the articles are the sample. For scores x with weights w, the
weighted mean m of each single task and its number n of articles, the cluster-robust standard error of Σ w·x is

    sqrt( Σ_articles ( Σ_items of the article  w · (x − m) · sqrt(n / (n − 1)) )² )

(Liang and Zeger 1986; for evaluations Miller, arXiv 2411.00640). An item that shares no article is a cluster of its own. For
windows, weighted by their tokens, it is that of a ratio estimate, to first order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """How the items of a score were sampled: the single tasks of a group are fixed, the articles of each are drawn.

    Attributes:
        weights: (items,) float64, each item's weight in the mean; they sum to 1.
        tasks: (items,) int64, the number of each item's single task, from 0.
        articles: (items,) int64, equal for items of one article; negative for an item that shares none.
    """

    weights: Tensor
    tasks: Tensor
    articles: Tensor

    @classmethod
    def of_tasks(cls, articles: Sequence[Tensor], by_size: bool) -> "Sample":
        """Return the sample of a group, from the articles of each single task's items, (items,) int64, as above.

        Args:
            articles: of each single task.
            by_size: whether the mean is over all items; otherwise it is the mean of the tasks' means.
        """
        sizes = torch.tensor([len(each) for each in articles])
        weights = 1 / (sizes.sum() if by_size else len(sizes) * sizes).double().expand(len(sizes))
        tasks = torch.arange(len(sizes)).repeat_interleave(sizes)
        return cls(weights[tasks], tasks, torch.cat([*articles]))

    @classmethod
    def of_scores(cls, samples: Sequence["Sample"]) -> "Sample":
        """Return the sample of the mean of several scores; two tasks over the same articles are one sample of articles."""
        tasks: list[Tensor] = []
        for sample in samples:
            tasks.append(sample.tasks + (int(tasks[-1].max()) + 1 if tasks else 0))
        weights = torch.cat([sample.weights / len(samples) for sample in samples])
        return cls(weights, torch.cat(tasks), torch.cat([sample.articles for sample in samples]))

    @classmethod
    def load(cls, items: Mapping[str, Tensor], task: str) -> "Sample":
        """Return the sample of a task from ``Scores.items``."""
        return cls(*(items[f"{part}/{task}"] for part in ("weights", "tasks", "articles")))

    def tensors(self, task: str) -> dict[str, Tensor]:
        """Return what ``load`` reads."""
        return {f"weights/{task}": self.weights, f"tasks/{task}": self.tasks, f"articles/{task}": self.articles}

    @property
    def clusters(self) -> Tensor:
        """(items,) int64: the number of each item's article, from 0; an item that shares none has a number of its own."""
        alone = self.articles < 0
        return torch.where(alone, -1 - torch.arange(len(alone)), self.articles).unique(return_inverse=True)[1]

    @property
    def cluster_counts(self) -> Tensor:
        """(single tasks,) int64: the number of articles of each single task."""
        return torch.stack([self.tasks, self.clusters]).unique(dim=1)[0].bincount()

    def stderr(self, scores: Tensor) -> float | None:
        """Return the standard error of the mean of scores, (items,) float64; None if a single task has a single article."""
        counts = self.cluster_counts.double()
        if counts.min() < 2:
            return None
        sums, totals = (
            torch.zeros_like(counts).index_add_(0, self.tasks, each) for each in (self.weights * scores, self.weights)
        )
        errors = self.weights * (scores - (sums / totals)[self.tasks]) * (counts / (counts - 1)).sqrt()[self.tasks]
        return math.sqrt(float(torch.zeros_like(errors).index_add_(0, self.clusters, errors).square().sum()))


def compute_paired_p_value(before: Tensor, after: Tensor) -> float:
    """Return the two-sided p-value of a difference in mean: the exact McNemar test (McNemar 1947), or the paired t-test.

    Args:
        before: (items,) float64, one model's score of each item; at least two items.
        after: (items,) float64, the other model's. McNemar's test is for scores of 0 or 1.
    """
    from scipy.stats import binomtest

    change = after - before
    if all(bool(((scores == 0) | (scores == 1)).all()) for scores in (before, after)):
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return t_test(float(change.mean()), float(change.std()) / math.sqrt(len(change)), len(change) - 1)


def t_test(mean: float, stderr: float, degrees: float = math.inf) -> float:
    """Return the two-sided p-value of a mean, by Student's t with so many degrees of freedom, or by the normal distribution."""
    from scipy.stats import t

    # Without a spread, all items have changed by the same amount.
    return float(2 * t.sf(abs(mean) / stderr, degrees)) if stderr else float(not mean)
