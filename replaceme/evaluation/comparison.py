"""Comparison of the pruned model's scores with the dense model's, with uncertainties: the content of metrics/evaluation.json.

Both models score the same items, so the comparison is paired. The standard error of a difference comes from the differences of
the items (``replaceme.evaluation.standard_errors``); ``p_value`` is from the exact McNemar test, or from the paired t-test over
articles where items share them.

``retention_percent`` is the published table's last column: average accuracy of the pruned model over that of the dense one
(ReplaceMe, arXiv 2505.02819, table 1). What guesses score counts as kept there. ``retention_above_chance_percent`` is the same
with chance taken off both: (pruned − chance) / (dense − chance), where the dense model is above chance.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from replaceme.evaluation.standard_errors import Sample, compute_paired_p_value, t_test
from replaceme.evaluation.tables import UNITS

Figures = dict[str, Any]
Items = Mapping[str, Tensor]
SIZES = ("parameters", "parameters_without_embeddings", "disk_bytes", "kv_cache_bytes_per_token")
# Standard errors by which the dense model must be above chance, or nothing can be said of what is kept of that.
MIN_STDERRS = 2.0


def compare_scores(dense: Figures, pruned: Figures, dense_items: Items, pruned_items: Items) -> Figures:
    """Return each score of both models with their ratio or difference and its uncertainty.

    Args:
        dense: the dense model's figures (``Scores.figures``).
        pruned: the pruned model's figures.
        dense_items: the dense model's scores of each item (``Scores.items``).
        pruned_items: the pruned model's scores of the same items.
    """
    comparison: Figures = {}
    sides = {"dense": dense, "pruned": pruned}
    for unit, key in UNITS.items():
        for task, scores in dense["perplexity"].items():
            before, after = scores.get(unit), pruned["perplexity"].get(task, {}).get(unit)
            if before is not None and after is not None:
                comparison.setdefault(key, {})[task] = {"dense": before, "pruned": after, "ratio": after / before}
    for task, entry in comparison.get("perplexity", {}).items():
        if all("stderr" in side["perplexity"][task] for side in sides.values()):
            entry |= {f"stderr_{name}": side["perplexity"][task]["stderr"] for name, side in sides.items()}
            change = pruned_items[f"losses/{task}"] - dense_items[f"losses/{task}"]
            if (stderr := Sample.load(dense_items, task).stderr(change)) is not None:
                entry["stderr_ratio"] = entry["ratio"] * stderr
    for task in dense["perplexity"]:
        if f"divergences/{task}" in pruned_items:
            comparison.setdefault("divergence", {})[task] = _average_divergence(pruned_items, task)
    if dense["accuracy"]:
        comparison["accuracy"] = {
            task: _compare_accuracy(score, pruned["accuracy"][task], _pair_items(task, dense_items, pruned_items))
            for task, score in dense["accuracy"].items()
        }
        means, retention = _average_accuracies([*comparison["accuracy"].values()])
        pairs = [_pair_items(task, dense_items, pruned_items) for task in dense["accuracy"]]
        comparison |= {"average_accuracy": means, **retention, **_compute_retention_stderrs(means, retention, pairs)}
    for size in SIZES:
        if size in dense and size in pruned:
            sizes = {name: side[size] for name, side in sides.items()}
            comparison[size] = {**sizes, "removed_percent": 100 * (1 - sizes["pruned"] / sizes["dense"])}
    if "calibration_text" in pruned:
        comparison["calibration_text"] = pruned["calibration_text"]
        comparison["unseen"] = _summarize_unseen(comparison)
    return comparison


def _average_divergence(items: Items, task: str) -> Figures:
    """Return the mean KL divergence from the dense model (nats a token) and how often both most likely tokens agree."""
    sample, figures = Sample.load(items, task), {}
    for name, part in (("kl", "divergences"), ("agreement", "agreements")):
        figures[name] = float(sample.weights @ items[f"{part}/{task}"])
        if (stderr := sample.stderr(items[f"{part}/{task}"])) is not None:
            figures[f"stderr_{name}"] = stderr
    return figures


def _pair_items(task: str, dense_items: Items, pruned_items: Items) -> tuple[Tensor, Tensor, Sample] | None:
    """Return both models' scores of a task's items, (items,) float64, and their sample; None if they aren't known of both."""
    before, after = (items.get(f"accuracy/{task}") for items in (dense_items, pruned_items))
    if before is None or after is None or len(before) != len(after):
        return None
    return before, after, Sample.load(dense_items, task)


def _compare_accuracy(dense: Figures, pruned: Figures, items: tuple[Tensor, Tensor, Sample] | None) -> Figures:
    sides = {"dense": dense, "pruned": pruned}
    entry = {name: side["accuracy"] for name, side in sides.items()}
    entry |= {f"stderr_{name}": side["stderr"] for name, side in sides.items() if "stderr" in side}
    entry |= {"chance": dense["chance"]} if "chance" in dense else {}
    if (kept := _compute_above_chance(entry, entry.get("stderr_dense", 0.0))) is not None:
        entry["above_chance_percent"] = kept
    if items is None or (stderr := items[2].stderr(items[1] - items[0])) is None:
        return entry
    before, after, sample = items
    entry |= {"items": len(before), "stderr_diff": stderr}
    mean, clusters = float(sample.weights @ (after - before)), sample.cluster_counts
    if int(clusters.sum()) < len(before):
        entry["articles"] = int(clusters.sum())
        entry["p_value"] = t_test(mean, stderr, int(clusters.sum()) - len(clusters))
    elif dense["by_size"]:
        entry["p_value"] = compute_paired_p_value(before, after)
    else:  # McNemar's test weights items equally; here a normal test on the mean of the tasks' means
        entry["p_value"] = t_test(mean, stderr)
    return entry


def _average_accuracies(scores: Sequence[Figures]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the averages (dense, pruned and, if known, chance), and the retentions; without those that would divide by 0."""
    names = ("dense", "pruned", *(("chance",) if all("chance" in entry for entry in scores) else ()))
    means = {name: sum(entry[name] for entry in scores) / len(scores) for name in names}
    retention = {"retention_percent": 100 * means["pruned"] / means["dense"]} if means["dense"] else {}
    stderr = math.sqrt(sum(entry.get("stderr_dense", 0.0) ** 2 for entry in scores)) / len(scores)
    if (kept := _compute_above_chance(means, stderr)) is not None:
        retention["retention_above_chance_percent"] = kept
    return means, retention


def _compute_above_chance(figures: Mapping[str, float], stderr: float) -> float | None:
    """Return (pruned − chance) / (dense − chance) in percent; None if chance is unknown, or the dense model isn't above it.

    Args:
        figures: ``dense``, ``pruned`` and ``chance``.
        stderr: the standard error of the dense model's accuracy.
    """
    if "chance" not in figures or figures["dense"] - figures["chance"] <= MIN_STDERRS * stderr:
        return None
    return 100 * (figures["pruned"] - figures["chance"]) / (figures["dense"] - figures["chance"])


def _compute_retention_stderrs(
    means: Mapping[str, float], retention: Mapping[str, float], pairs: Sequence[tuple[Tensor, Tensor, Sample] | None]
) -> dict[str, float]:
    """Return the standard error of each retention, from the items of all tasks of both models (delta method)."""
    if not all(pairs):
        return {}
    stderrs: dict[str, float] = {}
    befores, afters, samples = zip(*filter(None, pairs), strict=True)
    before, after, sample = torch.cat(befores), torch.cat(afters), Sample.of_scores(samples)
    for name, chance in (("retention", 0.0), ("retention_above_chance", means.get("chance", 0.0))):
        above = means["dense"] - chance
        if f"{name}_percent" in retention:
            stderr = sample.stderr(after - (means["pruned"] - chance) / above * before)
            stderrs |= {} if stderr is None else {f"{name}_stderr": 100 * stderr / above}
    return stderrs


def _summarize_unseen(comparison: Mapping[str, Any]) -> Figures:
    """Return the scores on text of which nothing, and nothing of its domain, was calibrated on; empty if there is none.

    Returns:
        ``perplexity_ratio``, the geometric mean of the ratios of ``texts`` perplexities, with ``stderr_perplexity_ratio`` (the
        texts are fixed, the windows of each are a sample); ``kl`` and ``agreement``, the means of these texts' figures; and
        ``retention_percent``, the average accuracy over the dense model's, of ``tasks`` tasks, and
        ``retention_above_chance_percent``.
    """
    calibration = comparison["calibration_text"]
    unseen = {task for task, text in calibration.items() if not text["seen"] and not text["same_domain"]}
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
        figures |= {"tasks": len(scores), **_average_accuracies(scores)[1]}
    return figures
