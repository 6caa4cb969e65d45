"""Scores as text tables: one model's, or both models' side by side; what was calibrated on is marked."""

from collections.abc import Iterator, Mapping
from typing import Any

from replaceme.base.progress import align

# The units of a perplexity, and its keys in a comparison.
UNITS = {"token": "perplexity", "word": "word_perplexity", "byte": "byte_perplexity"}
SIDES = ("dense", "pruned")
# The columns of a comparison; one without cells is left out, and that of the change has no heading.
COLUMNS = ("", *SIDES, "change", "above chance", "KL", "same token")


def format_score_comparison(comparison: Mapping[str, Any]) -> str:
    """Return the comparison as a text table, and a sentence on contaminated tasks."""
    return "\n".join(filter(None, [align(tabulate_score_comparison(comparison)), describe_contamination(comparison)]))


def format_scores(figures: Mapping[str, Any]) -> str:
    """Return one model's scores (``Scores.figures``) as a text table."""
    marks = _mark_contamination(figures)
    rows: list[tuple[str, ...]] = [("", *UNITS)] if figures["perplexity"] else []
    for task, scores in figures["perplexity"].items():
        rows.append((f"{task} perplexity{marks.get(task, '')}", *(f"{scores[u]:.4g}" if u in scores else "" for u in UNITS)))
    for task, score in figures["accuracy"].items():
        cells = _format_percent(score["accuracy"], score.get("stderr")), f"{score['fewshots']}-shot", score["metric"]
        rows.append((f"{task} accuracy{marks.get(task, '')}", *cells))
    return align(rows)


def find_contaminated_tasks(comparison: Mapping[str, Any]) -> list[str]:
    """Return the tasks that are scored on calibration text."""
    return [task for task, figures in comparison.get("calibration_text", {}).items() if figures["seen"]]


def describe_contamination(comparison: Mapping[str, Any]) -> str:
    """Return a sentence on the tasks that are scored on calibration text; empty if there are none."""
    tasks = find_contaminated_tasks(comparison)
    return f"Seen: {', '.join(tasks)} ({'are' if len(tasks) > 1 else 'is'} scored on calibration text)." if tasks else ""


def tabulate_score_comparison(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the comparison as rows of cells, the heading first; a task that is scored on calibration text is marked."""
    rows = [*_tabulate_perplexities(comparison), *_tabulate_accuracies(comparison)]
    for key, name in (("parameters", "parameters"), ("parameters_without_embeddings", "… without embeddings")):
        if size := comparison.get(key):
            millions = {side: f"{size[side] / 1e6:.1f} M" for side in SIDES}
            rows.append({"": name, **millions, "change": f"−{size['removed_percent']:.1f} %"})
    columns = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    head = tuple("" if name == "change" else name for name in columns)
    return [head, *(tuple(row.get(name, "") for name in columns) for row in rows)]


def _mark_contamination(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return what a table puts after each task's name, where the calibration text is known."""
    return {
        task: " (seen)" if text["seen"] else " (domain seen)" if text.get("same_domain") else ""
        for task, text in figures.get("calibration_text", {}).items()
    }


def _tabulate_perplexities(comparison: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    marks, unseen = _mark_contamination(comparison), comparison.get("unseen", {})
    perplexity, words = comparison.get("perplexity", {}), comparison.get("word_perplexity", {})
    if "perplexity_ratio" in unseen:
        stderr = f" ± {unseen['stderr_perplexity_ratio']:.2g}" if "stderr_perplexity_ratio" in unseen else ""
        change = f"x {unseen['perplexity_ratio']:#.3g}{stderr}"
        yield {"": f"{unseen['texts']} unseen texts, geometric mean", "change": change, **_format_divergence(unseen)}
    # lm-eval's own texts have no perplexity per token.
    rest = {task: words[task] for task in sorted(words.keys() - perplexity.keys())}
    for kind, pairs in (("perplexity", perplexity), ("word perplexity", rest)):
        for task, pair in pairs.items():
            cells = {side: f"{pair[side]:.4g}" for side in SIDES} | {"change": f"x {pair['ratio']:.3g}"}
            divergence = comparison.get("divergence", {}).get(task, {})
            yield {"": f"{task} {kind}{marks.get(task, '')}", **cells, **_format_divergence(divergence)}


def _format_divergence(figures: Mapping[str, float]) -> dict[str, str]:
    return {"KL": f"{figures['kl']:.3f}", "same token": f"{100 * figures['agreement']:.1f} %"} if "kl" in figures else {}


def _tabulate_accuracies(comparison: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    marks, scores = _mark_contamination(comparison), comparison.get("accuracy", {})
    for task, pair in scores.items():
        cells = {side: _format_percent(pair[side], pair.get(f"stderr_{side}")) for side in SIDES}
        kept = _format_above_chance(pair, pair.get("above_chance_percent"))
        yield {"": f"{task} accuracy{marks.get(task, '')}", **cells, "change": _format_kept(pair), "above chance": kept}
    if len(scores) > 1:
        means = comparison["average_accuracy"]
        part = " (in part seen)" * any(task in scores for task in find_contaminated_tasks(comparison))
        kept = _format_above_chance(means, comparison.get("retention_above_chance_percent"))
        cells = {side: _format_percent(means[side]) for side in SIDES}
        yield {"": f"average accuracy{part}", **cells, "change": _format_kept(means), "above chance": kept}


def _format_above_chance(figures: Mapping[str, Any], kept: float | None) -> str:
    if "chance" not in figures:
        return ""
    return "dense at chance" if kept is None else f"{kept:.1f} %"


def _format_percent(accuracy: float, stderr: float | None = None) -> str:
    return f"{100 * accuracy:.1f} %" if stderr is None else f"{100 * accuracy:.1f} ± {100 * stderr:.1f} %"


def _format_kept(pair: Mapping[str, float]) -> str:
    return f"{100 * pair['pruned'] / pair['dense']:.1f} % kept" if pair["dense"] else ""
