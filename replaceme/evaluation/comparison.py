"""Comparison of the pruned model's scores with the dense model's, with uncertainties: the content of metrics/evaluation.json.

Both models score the same items, so the comparison is paired. The standard error of a difference comes from the differences of
the items; ``p_value`` is from the exact McNemar test (items of accuracy 0 or 1; McNemar 1947) or the paired t-test. In a group,
the tasks are fixed and the items of each are a sample; tasks are weighted by size or equally, as lm-eval defines the group.

Items of one article are not independent: they share its topic and its difficulty. Where items share articles, these are the
sample: an article's items are summed first (cluster-robust standard error; Liang and Zeger 1986, for evaluations Miller, arXiv
2411.00640), and ``p_value`` is from the paired t-test over articles.

``retention_percent`` is the published table's last column: average accuracy of the pruned model over that of the dense one
(ReplaceMe, arXiv 2505.02819, table 1). What guesses score counts as kept there. ``retention_above_chance_percent`` is the same
with chance taken off both: (pruned − chance) / (dense − chance), where the dense model is above chance.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from replaceme.base.files import read_json
from replaceme.base.progress import align
from replaceme.base.workspace import Workspace
from replaceme.evaluation.perplexity import mean_stderr

Figures = dict[str, Any]
UNITS = {"token": "perplexity", "word": "word_perplexity", "byte": "byte_perplexity"}
SIZES = ("parameters", "parameters_without_embeddings", "disk_bytes", "kv_cache_bytes_per_token")
# The table's columns, with their headings; one without cells is left out.
HEADS = {
    "": "", "dense": "dense", "pruned": "pruned", "change": "", "above chance": "above chance", "KL": "KL",
    "same token": "same token",
}  # fmt: skip
# Standard errors by which the dense model must be above chance, or nothing can be said of what is kept of that.
SURE = 2.0


def compare(dense: Figures, pruned: Figures, dense_items: Mapping[str, Tensor], pruned_items: Mapping[str, Tensor]) -> Figures:
    """Return each score of both models with their ratio or difference and its uncertainty.

    Args:
        dense: the dense model's figures (``Scores.figures``).
        pruned: the pruned model's figures.
        dense_items: the dense model's scores of each item (``Scores.items``).
        pruned_items: the pruned model's scores of the same items.
    """
    comparison: Figures = {}
    for unit, key in UNITS.items():
        for task, scores in dense["perplexity"].items():
            a, b = scores.get(unit), pruned["perplexity"].get(task, {}).get(unit)
            if a is not None and b is not None:
                comparison.setdefault(key, {})[task] = {"dense": a, "pruned": b, "ratio": b / a}
    for task, entry in comparison.get("perplexity", {}).items():
        sides = dense["perplexity"][task], pruned["perplexity"][task]
        if all("stderr" in side for side in sides):
            entry |= {"stderr_dense": sides[0]["stderr"], "stderr_pruned": sides[1]["stderr"]}
            change = pruned_items[f"losses/{task}"] - dense_items[f"losses/{task}"]
            counts, texts = dense_items[f"counts/{task}"], dense_items.get(f"texts/{task}")
            if (error := mean_stderr(change, counts, texts)) is not None:
                entry["stderr_ratio"] = entry["ratio"] * error
    for task in dense["perplexity"]:
        if f"divergences/{task}" in pruned_items:
            comparison.setdefault("divergence", {})[task] = _divergence(pruned_items, task)
    if dense["accuracy"]:
        comparison["accuracy"] = {
            task: _accuracy(score, pruned["accuracy"][task], dense_items, pruned_items, task)
            for task, score in dense["accuracy"].items()
        }
        means, retention = _averages([*comparison["accuracy"].values()])
        comparison |= {"average_accuracy": means, **retention}
        for name, chance in (("retention", 0.0), ("retention_above_chance", means.get("chance", 0.0))):
            if f"{name}_percent" in retention:
                stderr = _retention_stderr(means, chance, dense, dense_items, pruned_items)
                if stderr is not None:
                    comparison[f"{name}_stderr"] = 100 * stderr
    for size in SIZES:
        if size in dense and size in pruned:
            a, b = dense[size], pruned[size]
            comparison[size] = {"dense": a, "pruned": b, "removed_percent": 100 * (1 - b / a)}
    if "calibration_text" in pruned:
        comparison["calibration_text"] = pruned["calibration_text"]
        comparison["unseen"] = _unseen(comparison)
    return comparison


def _unseen(comparison: Mapping[str, Any]) -> Figures:
    """Return the scores on text of which nothing, and nothing of its domain, was calibrated on; empty if there is none.

    Returns:
        ``perplexity_ratio``, the geometric mean of the ratios of ``texts`` perplexities, with ``stderr_perplexity_ratio`` (the
        texts are fixed, the windows of each are a sample); ``kl`` and ``agreement``, the means of these texts' figures; and
        ``retention_percent``, the average accuracy over the dense model's, of ``tasks`` tasks, and
        ``retention_above_chance_percent``.
    """
    known = comparison["calibration_text"]
    unseen = {task for task, text in known.items() if not text["seen"] and not text["same_domain"]}
    figures: Figures = {}
    if ratios := {task: entry for task, entry in comparison.get("perplexity", {}).items() if task in unseen}:
        mean = math.exp(sum(math.log(entry["ratio"]) for entry in ratios.values()) / len(ratios))
        figures |= {"texts": len(ratios), "perplexity_ratio": mean}
        if all("stderr_ratio" in entry for entry in ratios.values()):
            variance = sum((entry["stderr_ratio"] / entry["ratio"]) ** 2 for entry in ratios.values())
            figures["stderr_perplexity_ratio"] = mean * math.sqrt(variance) / len(ratios)
        divergences = [comparison["divergence"][task] for task in ratios if task in comparison.get("divergence", {})]
        for name in ("kl", "agreement") if len(divergences) == len(ratios) else ():
            figures[name] = sum(entry[name] for entry in divergences) / len(ratios)
    if scores := [entry for task, entry in comparison.get("accuracy", {}).items() if task in unseen]:
        figures |= {"tasks": len(scores), **_averages(scores)[1]}
    return figures


def _averages(scores: Sequence[Figures]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the averages (dense, pruned and, if known, chance), and the retentions; without those that would divide by 0."""
    sides = ("dense", "pruned", *(("chance",) if all("chance" in entry for entry in scores) else ()))
    means = {side: sum(entry[side] for entry in scores) / len(scores) for side in sides}
    retention = {"retention_percent": 100 * means["pruned"] / means["dense"]} if means["dense"] else {}
    stderr = math.sqrt(sum(entry.get("stderr_dense", 0.0) ** 2 for entry in scores)) / len(scores)
    if (kept := _above_chance(means, stderr)) is not None:
        retention["retention_above_chance_percent"] = kept
    return means, retention


def _above_chance(figures: Mapping[str, float], stderr: float) -> float | None:
    """Return (pruned − chance) / (dense − chance) in percent; None if chance is unknown, or the dense model isn't above it.

    Args:
        figures: ``dense``, ``pruned`` and ``chance``.
        stderr: the standard error of the dense model's accuracy.
    """
    if "chance" not in figures or figures["dense"] - figures["chance"] <= SURE * stderr:
        return None
    return 100 * (figures["pruned"] - figures["chance"]) / (figures["dense"] - figures["chance"])


def seen_tasks(comparison: Mapping[str, Any]) -> list[str]:
    """Return the tasks that are scored on calibration text."""
    return [task for task, figures in comparison.get("calibration_text", {}).items() if figures["seen"]]


def seen_note(comparison: Mapping[str, Any]) -> str:
    """Return a sentence on the tasks that are scored on calibration text; empty if there are none."""
    seen = seen_tasks(comparison)
    return f"Seen: {', '.join(seen)} ({'are' if len(seen) > 1 else 'is'} scored on calibration text)." if seen else ""


def _divergence(items: Mapping[str, Tensor], task: str) -> Figures:
    """Return the mean KL divergence from the dense model (nats a token), the share of positions with its most likely token."""
    counts, texts = items[f"counts/{task}"], items.get(f"texts/{task}")
    figures = {}
    for name, part in (("kl", "divergences"), ("agreement", "agreements")):
        sums = items[f"{part}/{task}"]
        figures[name] = float(sums.sum() / counts.sum())
        if (error := mean_stderr(sums, counts, texts)) is not None:
            figures[f"stderr_{name}"] = error
    return figures


def parts_of(items: Mapping[str, Tensor], task: str) -> list[Tensor]:
    """Return the items of each single task of ``task`` from ``Scores.items``; an empty list if they aren't known."""
    names = takewhile(items.__contains__, (f"accuracy/{task}/{number}" for number in count()))
    return [items[name] for name in names]


def weighted_mean(parts: Sequence[Tensor], by_size: bool) -> float:
    """Return the mean over all items (``by_size``) or the mean of the parts' means."""
    return sum(weight * float(part.mean()) for weight, part in zip(_weights(parts, by_size), parts, strict=True))


def articles_of(items: Mapping[str, Tensor], task: str, count: int) -> list[Tensor | None]:
    """Return the articles of the items of each of ``count`` single tasks of ``task``; None where none is shared or known."""
    return [items.get(f"articles/{task}/{number}") for number in range(count)]


def weighted_stderr(parts: Sequence[Tensor], by_size: bool, articles: Sequence[Tensor | None] = ()) -> float:
    """Return the standard error of ``weighted_mean``: the parts are fixed, the articles (or items) of each are a sample.

    Args:
        parts: (items,) each; at least two items.
        by_size: as for ``weighted_mean``.
        articles: of each part, (items,) int64, equal for items of one article; None or nothing for independent items.
    """
    return _clustered_stderr(parts, _weights(parts, by_size), articles or [None] * len(parts))


def _clustered_stderr(parts: Sequence[Tensor], weights: Sequence[float], articles: Sequence[Tensor | None]) -> float:
    """Return the standard error of ``Σ weight · mean(part)``, with errors summed within an article, also over parts."""
    shares = []
    for part, weight, own in zip(parts, weights, articles, strict=True):
        count = article_count(part, own)
        shares.append((part - part.mean()) * (weight / len(part) * math.sqrt(count / (count - 1))))
    sample, place = torch.cat(_owners(parts, articles)).unique(return_inverse=True)
    sums = torch.zeros(len(sample), dtype=torch.float64).index_add_(0, place, torch.cat(shares))
    return math.sqrt(float(sums.square().sum()))


def article_count(part: Tensor, articles: Tensor | None) -> int:
    """Return the number of articles in a part; the number of its items if there is no article, or a single one."""
    count = 0 if articles is None else len(articles.unique())
    return count if count > 1 else len(part)


def _owners(parts: Sequence[Tensor], articles: Sequence[Tensor | None]) -> list[Tensor]:
    """Return each item's article; an item without one gets a negative number of its own."""
    owners, alone = [], -1
    for part, own in zip(parts, articles, strict=True):
        shared = own is not None and article_count(part, own) < len(part)
        owners.append(own if own is not None and shared else alone - torch.arange(len(part)))
        alone -= len(part)
    return owners


def _weights(parts: Sequence[Tensor], by_size: bool) -> list[float]:
    total = sum(map(len, parts))
    return [len(part) / total if by_size else 1 / len(parts) for part in parts]


def _accuracy(
    dense: Figures, pruned: Figures, dense_items: Mapping[str, Tensor], pruned_items: Mapping[str, Tensor], task: str
) -> Figures:
    entry = {"dense": dense["accuracy"], "pruned": pruned["accuracy"]}
    entry |= {f"stderr_{name}": side["stderr"] for name, side in (("dense", dense), ("pruned", pruned)) if "stderr" in side}
    entry |= {"chance": dense["chance"]} if "chance" in dense else {}
    if (kept := _above_chance(entry, entry.get("stderr_dense", 0.0))) is not None:
        entry["above_chance_percent"] = kept
    before, after = parts_of(dense_items, task), parts_of(pruned_items, task)
    changes = _changes(before, after)
    if changes:
        by_size, articles = dense["by_size"], articles_of(dense_items, task, len(changes))
        entry["items"] = sum(map(len, changes))
        entry["stderr_diff"] = weighted_stderr(changes, by_size, articles)
        count = sum(map(article_count, changes, articles))
        if count < entry["items"]:
            entry["articles"] = count
            change = weighted_mean(changes, by_size)
            entry["p_value"] = _clustered_p_value(change, entry["stderr_diff"], count - len(changes))
        elif by_size:
            entry["p_value"] = paired_p_value(torch.cat(list(before)), torch.cat(list(after)))
        else:  # McNemar's test weights items equally; here a normal test on the mean of the tasks' means
            entry["p_value"] = _normal_p_value(weighted_mean(changes, by_size), entry["stderr_diff"])
    return entry


def _changes(before: Sequence[Tensor], after: Sequence[Tensor], ratio: float = 1.0) -> list[Tensor]:
    """Return ``after − ratio · before`` of each part, or an empty list if it allows no standard error."""
    if len(before) != len(after) or not all(len(a) == len(b) > 1 for a, b in zip(before, after, strict=True)):
        return []
    return [b - ratio * a for a, b in zip(before, after, strict=True)]


def _retention_stderr(
    means: Mapping[str, float], chance: float, dense: Figures, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> float | None:
    """Return the standard error of (pruned − chance) / (dense − chance), from the items of both models (delta method)."""
    tasks, above = dense["accuracy"], means["dense"] - chance
    ratio = (means["pruned"] - chance) / above
    parts: list[Tensor] = []
    weights: list[float] = []
    articles: list[Tensor | None] = []
    for task, score in tasks.items():
        changes = _changes(parts_of(before, task), parts_of(after, task), ratio)
        if not changes:
            return None
        parts += changes
        weights += [weight / len(tasks) for weight in _weights(changes, score["by_size"])]
        articles += articles_of(before, task, len(changes))
    return _clustered_stderr(parts, weights, articles) / above


def paired_p_value(before: Tensor, after: Tensor) -> float:
    """Return the two-sided p-value of a difference in mean on the same items.

    Args:
        before: (items,) one model's score of each item; at least two items.
        after: (items,) the other model's scores.
    """
    from scipy.stats import binomtest

    change = after - before
    if ((before == 0) | (before == 1)).all() and ((after == 0) | (after == 1)).all():
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return _t_p_value(change)


def _t_p_value(change: Tensor) -> float:
    from scipy.stats import ttest_1samp

    if not float(change.std()):  # every item changed by the same amount
        return float(not change.any())
    return float(ttest_1samp(change.numpy(), 0).pvalue)


def _clustered_p_value(mean: float, stderr: float, degrees: int) -> float:
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / stderr, degrees)) if stderr else float(not mean)


def _normal_p_value(mean: float, stderr: float) -> float:
    return math.erfc(abs(mean) / stderr / math.sqrt(2)) if stderr else float(not mean)


def comparison_table(comparison: Figures) -> str:
    """Return the comparison as a text table, and a sentence on seen texts."""
    return "\n".join(filter(None, [align(comparison_rows(comparison)), seen_note(comparison)]))


def comparison_rows(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the comparison as rows of cells, the heading first; a task that is scored on calibration text is marked."""
    marks = _marks(comparison)
    rows = [*_perplexity_rows(comparison, marks), *_accuracy_rows(comparison, marks)]
    for key, name in (("parameters", "parameters"), ("parameters_without_embeddings", "… without embeddings")):
        if size := comparison.get(key):
            own = {side: f"{size[side] / 1e6:.1f} M" for side in ("dense", "pruned")}
            rows.append({"": name, **own, "change": f"−{size['removed_percent']:.1f} %"})
    heads = [head for head in HEADS if any(row.get(head) for row in rows)]
    return [tuple(HEADS[head] for head in heads), *(tuple(row.get(head, "") for head in heads) for row in rows)]


def _marks(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return what a table puts after each task's name, where the calibration text is known."""
    return {
        task: " (seen)" if text["seen"] else " (domain seen)" if text.get("same_domain") else ""
        for task, text in figures.get("calibration_text", {}).items()
    }


def _perplexity_rows(comparison: Mapping[str, Any], marks: Mapping[str, str]) -> Iterator[dict[str, str]]:
    divergence, unseen = comparison.get("divergence", {}), comparison.get("unseen", {})
    perplexity, words = comparison.get("perplexity", {}), comparison.get("word_perplexity", {})

    def distance(figures: Figures) -> dict[str, str]:
        return {"KL": f"{figures['kl']:.3f}", "same token": f"{100 * figures['agreement']:.1f} %"} if "kl" in figures else {}

    if "perplexity_ratio" in unseen:
        error = f" ± {unseen['stderr_perplexity_ratio']:.2g}" if "stderr_perplexity_ratio" in unseen else ""
        change = f"x {unseen['perplexity_ratio']:#.3g}{error}"
        yield {"": f"{unseen['texts']} unseen texts, geometric mean", "change": change, **distance(unseen)}
    for kind, pairs in (("perplexity", perplexity), ("word perplexity", words)):
        for task in pairs if pairs is perplexity else sorted(words.keys() - perplexity.keys()):
            row = {
                "": f"{task} {kind}{marks.get(task, '')}",
                **{side: f"{pairs[task][side]:.4g}" for side in ("dense", "pruned")},
            }
            yield row | {"change": f"x {pairs[task]['ratio']:.3g}", **distance(divergence.get(task, {}))}


def _accuracy_rows(comparison: Mapping[str, Any], marks: Mapping[str, str]) -> Iterator[dict[str, str]]:
    scores = comparison.get("accuracy", {})
    for task, pair in scores.items():
        row = {"": f"{task} accuracy{marks.get(task, '')}", **{side: _percent(pair, side) for side in ("dense", "pruned")}}
        yield row | {"change": _kept(pair), "above chance": above_chance(pair, pair.get("above_chance_percent"))}
    if len(scores) > 1:
        means = comparison["average_accuracy"]
        part = " (in part seen)" * any(task in scores for task in seen_tasks(comparison))
        row = {"": f"average accuracy{part}", **{side: f"{100 * means[side]:.1f} %" for side in ("dense", "pruned")}}
        kept = above_chance(means, comparison.get("retention_above_chance_percent"))
        yield row | {"change": _kept(means), "above chance": kept}


def above_chance(figures: Mapping[str, Any], kept: float | None) -> str:
    """Return what is kept of the accuracy above chance in words; an empty text if chance is unknown."""
    if "chance" not in figures:
        return ""
    return "dense at chance" if kept is None else f"{kept:.1f} %"


def scores_table(figures: Figures) -> str:
    """Return one model's scores (``Scores.figures``) as a text table."""
    rows: list[tuple[str, ...]] = [("", *UNITS)]
    marks = _marks(figures)
    for task, scores in figures["perplexity"].items():
        cells = [f"{scores[unit]:.4g}" if unit in scores else "" for unit in UNITS]
        rows.append((f"{task} perplexity{marks.get(task, '')}", *cells))
    if len(rows) == 1:
        rows = []
    for task, score in figures["accuracy"].items():
        stderr = f" ± {100 * score['stderr']:.1f}" if "stderr" in score else ""
        shown = f"{100 * score['accuracy']:.1f}{stderr} %"
        rows.append((f"{task} accuracy{marks.get(task, '')}", shown, f"{score['fewshots']}-shot", score["metric"]))
    return align(rows)


def _percent(pair: Figures, side: str) -> str:
    stderr = pair.get(f"stderr_{side}")
    return f"{100 * pair[side]:.1f} %" if stderr is None else f"{100 * pair[side]:.1f} ± {100 * stderr:.1f} %"


def _kept(pair: Figures) -> str:
    return f"{100 * pair['pruned'] / pair['dense']:.1f} % kept" if pair["dense"] else ""


if __name__ == "__main__":
    # Print the last run's table again, if no stage had to run.
    print(comparison_table(read_json(Workspace().metric("evaluation"))))
