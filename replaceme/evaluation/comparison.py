"""The pruned model's scores beside the dense one's, with their uncertainty: the content of metrics/evaluation.json.

Both models score the same items, so their difference is less uncertain than that of two samples: its standard error is that
of the items' differences, and ``p_value`` is that of the exact McNemar test (accuracy of 0 or 1 an item; McNemar 1947) or of
the paired t-test. ``retention_percent`` is the published table's last column: average accuracy of the pruned model over
that of the dense one (ReplaceMe, arXiv 2505.02819, table 1).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest, ttest_rel
from torch import Tensor

from replaceme.evaluation.perplexity import mean_stderr
from replaceme.files import read_json
from replaceme.workspace import Workspace

Figures = dict[str, Any]
UNITS = {"token": "perplexity", "word": "word_perplexity", "byte": "byte_perplexity"}
SIZES = ("parameters", "disk_bytes", "kv_cache_bytes_per_token")


def compare(dense: Figures, pruned: Figures, dense_items: Mapping[str, Tensor], pruned_items: Mapping[str, Tensor]) -> Figures:
    """Return for each score dense, pruned and what relates them.

    Args:
        dense: the dense model's figures (``Scores.figures``).
        pruned: the pruned model's.
        dense_items: the dense model's figures for each item (``Scores.items``).
        pruned_items: the pruned model's, on the same items.
    """
    comparison: Figures = {}
    for unit, key in UNITS.items():
        for task, scores in dense["perplexity"].items():
            a, b = scores.get(unit), pruned["perplexity"][task].get(unit)
            if a is not None and b is not None:
                comparison.setdefault(key, {})[task] = {"dense": a, "pruned": b, "ratio": b / a}
    for task, entry in comparison.get("perplexity", {}).items():
        sides = dense["perplexity"][task], pruned["perplexity"][task]
        if all("stderr" in side for side in sides):
            entry |= {"stderr_dense": sides[0]["stderr"], "stderr_pruned": sides[1]["stderr"]}
            change = pruned_items[f"losses/{task}"] - dense_items[f"losses/{task}"]
            entry["stderr_ratio"] = entry["ratio"] * mean_stderr(change, dense_items[f"counts/{task}"])
    if dense["accuracy"]:
        comparison["accuracy"] = {
            task: _accuracy(
                score, pruned["accuracy"][task], dense_items.get(f"accuracy/{task}"), pruned_items.get(f"accuracy/{task}")
            )
            for task, score in dense["accuracy"].items()
        }
        entries = comparison["accuracy"].values()
        means = {side: sum(entry[side] for entry in entries) / len(entries) for side in ("dense", "pruned")}
        comparison["average_accuracy"] = means
        if means["dense"]:
            comparison["retention_percent"] = 100 * means["pruned"] / means["dense"]
            stderr = _retention_stderr(means, list(dense["accuracy"]), dense_items, pruned_items)
            if stderr is not None:
                comparison["retention_stderr"] = 100 * stderr
    for size in SIZES:
        a, b = dense[size], pruned[size]
        comparison[size] = {"dense": a, "pruned": b, "removed_percent": 100 * (1 - b / a)}
    return comparison


def _retention_stderr(
    means: Mapping[str, float], tasks: Sequence[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> float | None:
    """Return the standard error of the ratio of the averages, from the items of both models (first order)."""
    ratio, names = means["pruned"] / means["dense"], [f"accuracy/{task}" for task in tasks]
    if not all(name in before and name in after and len(before[name]) > 1 for name in names):
        return None
    variance = sum(float((after[name] - ratio * before[name]).var()) / len(before[name]) for name in names)
    return math.sqrt(variance) / len(names) / means["dense"]


def _accuracy(dense: Figures, pruned: Figures, before: Tensor | None, after: Tensor | None) -> Figures:
    entry = {"dense": dense["accuracy"], "pruned": pruned["accuracy"]}
    entry |= {f"stderr_{name}": side["stderr"] for name, side in (("dense", dense), ("pruned", pruned)) if "stderr" in side}
    if before is not None and after is not None and len(before) > 1:
        change = after - before
        entry["items"] = len(change)
        entry["stderr_diff"] = float(change.std() / math.sqrt(len(change)))
        p_value = paired_p_value(before, after)
        if p_value is not None:
            entry["p_value"] = p_value
    return entry


def paired_p_value(before: Tensor, after: Tensor) -> float | None:
    """Return the two-sided p-value of a difference in mean on the same items; None where it isn't defined.

    Args:
        before: (items,) one model's score of each item.
        after: (items,) the other's.
    """
    change = after - before
    if not change.any():
        return 1.0
    if ((before == 0) | (before == 1)).all() and ((after == 0) | (after == 1)).all():
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        return float(binomtest(better, better + worse).pvalue)
    p_value = float(ttest_rel(after.numpy(), before.numpy()).pvalue)
    return p_value if math.isfinite(p_value) else None


def comparison_table(comparison: Figures) -> str:
    """Return the comparison as a small text table."""
    rows: list[tuple[str, ...]] = [("", "dense", "pruned", "")]
    for task, pair in comparison.get("perplexity", {}).items():
        rows.append((f"{task} perplexity", f"{pair['dense']:.4g}", f"{pair['pruned']:.4g}", f"x {pair['ratio']:.3g}"))
    for task in sorted(set(comparison.get("word_perplexity", {})) - set(comparison.get("perplexity", {}))):
        pair = comparison["word_perplexity"][task]
        rows.append((f"{task} word perplexity", f"{pair['dense']:.4g}", f"{pair['pruned']:.4g}", f"x {pair['ratio']:.3g}"))
    for task, pair in comparison.get("accuracy", {}).items():
        rows.append((f"{task} accuracy", *(_percent(pair, side) for side in ("dense", "pruned")), _kept(pair)))
    if len(comparison.get("accuracy", {})) > 1:
        means = comparison["average_accuracy"]
        rows.append(("average accuracy", *(f"{100 * means[side]:.1f} %" for side in ("dense", "pruned")), _kept(means)))
    size = comparison["parameters"]
    rows.append(
        ("parameters", f"{size['dense'] / 1e6:.1f} M", f"{size['pruned'] / 1e6:.1f} M", f"−{size['removed_percent']:.1f} %")
    )
    return align(rows)


def scores_table(figures: Figures) -> str:
    """Return one model's scores (``Scores.figures``) as a small text table."""
    rows: list[tuple[str, ...]] = [("", *UNITS)]
    for task, scores in figures["perplexity"].items():
        rows.append((f"{task} perplexity", *(f"{scores[unit]:.4g}" if unit in scores else "" for unit in UNITS)))
    if len(rows) == 1:
        rows = []
    for task, score in figures["accuracy"].items():
        stderr = f" ± {100 * score['stderr']:.1f}" if "stderr" in score else ""
        shown = f"{100 * score['accuracy']:.1f}{stderr} %"
        rows.append((f"{task} accuracy", shown, f"{score['fewshots']}-shot", score["metric"]))
    return align(rows)


def _percent(pair: Figures, side: str) -> str:
    stderr = pair.get(f"stderr_{side}")
    return f"{100 * pair[side]:.1f} %" if stderr is None else f"{100 * pair[side]:.1f} ± {100 * stderr:.1f} %"


def _kept(pair: Figures) -> str:
    return f"{100 * pair['pruned'] / pair['dense']:.1f} % kept" if pair["dense"] else ""


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    # The table of the last run again, when nothing had to be scored anew.
    print(comparison_table(read_json(Workspace().metric("evaluation"))))
