"""The page's tables as text cells, from the pipeline's figures.

Rows, columns and tables without figures are left out. All accuracies are in percent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from replaceme.evaluation.tables import UNITS, find_contaminated_tasks
from replaceme.report.formatting import (
    Figures,
    format_duration,
    format_number,
    format_percent,
    format_quantity,
    format_with_error,
)

SIGNIFICANT = 0.05
CONTAMINATED = "†"
AT_CHANCE = "‡"
NOTES = {
    "*": "differs from the dense model at p < 0.05 (exact McNemar test or paired t-test over the same items, or over their "
    "articles where items share one)",
    "°": "no significant difference from the dense model (p ≥ 0.05, same test)",
    AT_CHANCE: "the dense model isn't two standard errors above chance, so nothing can be said",
}
SIZES = {
    "parameters": ("parameters", ""),
    "parameters_without_embeddings": ("… without embeddings", ""),
    "disk_bytes": ("size on disk", "B"),
    "kv_cache_bytes_per_token": ("KV cache per token", "B"),
}
BARE = "the same with nothing in the block's place"
FIT_WORDS = {
    "removed_layers": ("layers removed", "in the whole model"),
    "tokens": ("calibration tokens", "used for the fit"),
    "relative_residual": (
        "relative residual",
        "‖H − state‖ / ‖H‖ at the cut, over all tokens, where H is the dense model's state; 0 is perfect",
    ),
    "relative_residual_removed": ("… without a map", BARE),
    "weighted_residual": (
        "relative residual",
        "√ mean over tokens of ‖H − state‖² / ‖H‖² at the cut, where H is the dense model's state; 0 is perfect",
    ),
    "weighted_residual_joint": (
        "relative residual",
        "√ mean over tokens of ‖H − state‖² / ‖H‖² at the cut, H the dense model's state, before the MLP is solved again",
    ),
    "weighted_residual_transform": ("… with a map alone", "the same with the best map T on the MLP's output"),
    "weighted_residual_removed": ("… without either", BARE),
    "mean_cosine": (
        "mean cosine",
        "between the state with the map and the dense model's, averaged over tokens; 1 is perfect. Where it gets worse while "
        "the residual improves, a few tokens of very large norm dominate the fit",
    ),
    "mean_cosine_removed": ("… without a map", BARE),
    "smallest_factor": ("smallest factor", "by which a channel is scaled"),
    "largest_factor": ("largest factor", "the same"),
    "condition_number": (
        "condition number",
        "of MᵀM + αI, where M is the map's input: how far noise in the text can be amplified",
    ),
    "smallest_eigenvalue": ("smallest eigenvalue", "of MᵀM: the scale to compare α with"),
    "alpha_over_smallest_eigenvalue": ("α / smallest eigenvalue", "far below 1, the ridge changes almost nothing"),
    "distance_from_identity": ("distance from identity", "‖T − I‖ / √d; 0 leaves the layer before the cut unchanged"),
    "loss_start": ("loss at the start", "the solver's objective per token, penalty included"),
    "loss_end": ("… at the end", "the same at the best iterate, which is kept"),
    "iterations": ("iterations", "of the solver"),
    "converged": ("converged", "1: the loss stopped changing; 0: the solver ran out of iterations"),
    "rescaled_by": ("rescaled by", "the cosine objective leaves the map's scale open; this factor minimizes ‖Y − M T‖"),
    "distance_from_alpha_zero": ("distance from α = 0", "relative distance of the map from the one without a ridge"),
}
PART_WORDS = {
    "removed_heads": ("heads removed", "of the queries, over all layers"),
    "removed_channels": ("MLP channels removed", "over all layers"),
    "width": ("width", "of the residual stream after slicing"),
    "slicing": ("slicing", "fraction of the width that was removed"),
    "kept_squares_lowest": (
        "squares kept, at least",
        "fraction of the states' squared norms that the basis keeps, lowest over the norms",
    ),
    "kept_squares_mean": ("… on average", "the same, averaged over the norms"),
    "parameters_removed": ("parameters removed", "in the whole model"),
    "parameters_wanted": (
        "… wanted",
        "those of layers_to_skip whole layers, or of remove; heads and channels come as close to it as they can",
    ),
    "calibration_loss": (
        "calibration loss",
        "of the dense model, in nats per token, on the texts whose gradients rank the parts",
    ),
}


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first cell of each row is its heading.

    Attributes:
        caption: the contents, in a sentence or less.
        head: one heading per column.
        rows: one cell per column.
        notes: footnotes, as pairs of the mark in a cell and the note.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[tuple[str, str]] = ()


def tabulate_accuracy(evaluation: Figures) -> Table | None:
    """Return dense and pruned accuracy and what is kept of it: the average first, then one column per task."""
    tasks = evaluation.get("accuracy")
    if not tasks:
        return None
    columns = {_mark_contamination(name, evaluation): _format_accuracy(task) for name, task in tasks.items()}
    if "average_accuracy" in evaluation:
        kept = {key: evaluation[key] for key in ("retention_percent", "retention_stderr") if key in evaluation}
        above = {f"above_chance_{key}": evaluation.get(f"retention_above_chance_{key}") for key in ("percent", "stderr")}
        columns = {"average": _format_accuracy({**evaluation["average_accuracy"], **kept, **above}), **columns}
    names = next(iter(columns.values()))
    rows = [[name, *(column[name] for column in columns.values())] for name in names]
    marks = {cell.split()[-1] for row in rows for cell in row[1:] if cell}
    return Table(
        "Accuracy in percent, ± one standard error (of the difference: paired over the items, or their articles)",
        ["", *columns],
        [row for row in rows if any(row[1:])],
        [*((mark, note) for mark, note in NOTES.items() if mark in marks), *_note_contamination(evaluation, tasks)],
    )


def _format_accuracy(task: Figures) -> dict[str, str]:
    dense, pruned, p_value = task["dense"], task["pruned"], task.get("p_value")
    mark = "" if p_value is None else " *" if p_value < SIGNIFICANT else " °"
    kept = task.get("retention_percent", 100 * pruned / dense if dense else None)
    above = task.get("above_chance_percent")
    above_words = AT_CHANCE if above is None else format_percent(above, task.get("above_chance_stderr"), scale=1)
    return {
        "dense": format_percent(dense, task.get("stderr_dense")),
        "pruned": format_percent(pruned, task.get("stderr_pruned")) + mark,
        "% of dense": "" if kept is None else format_percent(kept, task.get("retention_stderr"), scale=1),
        "… above chance": above_words if "chance" in task else "",
        "difference": format_percent(pruned - dense, task.get("stderr_diff"), sign="+"),
        "p": "" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
        "chance": format_percent(task["chance"]) if "chance" in task else "",
        "items": str(task.get("items", "")),
    }


def tabulate_divergence(evaluation: Figures) -> Table | None:
    """Return how far the pruned model is from the dense one on each text, and on those that were not calibrated on."""
    perplexity, known = evaluation.get("perplexity", {}), evaluation.get("calibration_text", {})
    rows = []
    unseen = evaluation.get("unseen", {})
    if {"perplexity_ratio", "kl"} <= unseen.keys():
        rows.append(["unseen texts", f"× {format_with_error(unseen, 'perplexity_ratio')}", "no", *_format_distance(unseen)])
    for task, figures in evaluation.get("divergence", {}).items():
        if task in perplexity:
            calibrated = _describe_calibration(known[task]) if task in known else ""
            rows.append([task, f"× {format_with_error(perplexity[task], 'ratio')}", calibrated, *_format_distance(figures)])
    notes = [
        ("seen:", "whether it was calibrated on, or text of its domain"),
        ("KL:", "divergence of the pruned model's predictions from the dense model's, for each token"),
        ("same token:", "share of positions with the dense model's most likely token"),
        ("unseen texts:", "geometric mean of the ratios, mean of the others, over the texts marked no"),
    ]
    head = ["text", "perplexity ratio", "seen", "KL, nats", "same token, %"]
    return Table("Distance from the dense model by text, ± one standard error", head, rows, notes) if rows else None


def _format_distance(figures: Figures) -> list[str]:
    return [format_with_error(figures, "kl"), format_percent(figures["agreement"], figures.get("stderr_agreement"))]


def _describe_calibration(text: Figures) -> str:
    return "yes" if text["seen"] else "its domain" if text["same_domain"] else "no"


def tabulate_perplexity(evaluation: Figures) -> Table | None:
    """Return the perplexities of each task per token, word and byte."""
    tasks = dict.fromkeys(task for kind in UNITS.values() for task in evaluation.get(kind, {}))
    rows = [
        [
            f"{_mark_contamination(task, evaluation)}, per {unit}",
            f"× {format_with_error(figures, 'ratio')}",
            *(format_with_error(figures, side) for side in ("dense", "pruned")),
        ]
        for task in tasks
        for unit, kind in UNITS.items()
        if (figures := evaluation.get(kind, {}).get(task))
    ]
    head, notes = ["", "ratio", "dense", "pruned"], _note_contamination(evaluation, tasks)
    return Table("Perplexity, ± one standard error", head, rows, notes) if rows else None


def tabulate_sizes(evaluation: Figures) -> Table | None:
    """Return the sizes of both models."""
    rows = [
        [name, *(format_quantity(pair[side], unit) for side in ("dense", "pruned")), f"{pair['removed_percent']:.1f} %"]
        for key, (name, unit) in SIZES.items()
        if (pair := evaluation.get(key))
    ]
    return Table("Size", ["", "dense", "pruned", "saved"], rows) if rows else None


def tabulate_times(speed: Figures) -> Table:
    """Return the measured times (``render``'s argument ``speed``)."""
    names = {
        "prefill_seconds": f"prefill of {speed['prompt_tokens']} tokens",
        "decode_seconds_per_token": f"each of {speed['new_tokens']} new tokens",
    }
    rows = [
        [name, *(format_duration(speed[key][side]) for side in ("dense", "pruned")), f"× {speed[key]['speedup']:.2f}"]
        for key, name in names.items()
    ]
    threads = f", {speed['threads']} threads" if speed["device"] == "cpu" else ""
    caption = (
        f"Measured on {speed['device']}{threads}: {speed['dtype']}, batch of {speed['batch_size']}, {speed['rounds']} rounds"
    )
    return Table(caption, ["", "dense", "pruned", "speedup"], rows, [("Measured on", speed["machine"])])


def tabulate_cost(cost: Figures) -> Table:
    """Return what the compression cost (metrics/compression.json), stage by stage."""
    rows = [[stage, format_duration(seconds)] for stage, seconds in cost.get("stage_seconds", {}).items()]
    if "seconds" in cost:
        rows.append(["all stages", format_duration(cost["seconds"])])
    for key, name in (("peak_memory_bytes", "peak memory"), ("peak_cuda_bytes", "peak GPU memory")):
        if key in cost:
            rows.append([name, format_quantity(cost[key], "B")])
    if missing := cost.get("stages_not_measured"):
        rows.append(["not measured here", f"{missing} stage{'s' * (missing > 1)}"])
    notes = [("Measured on", machine) for machine in cost.get("machines", [])]
    return Table("Cost of the compression, of each stage in the run that made its output", ["", "cost"], rows, notes)


def tabulate_fits(fits: Mapping[str, Figures]) -> Table | None:
    """Return the figures of metrics/solve.json with their meanings; None for a method without a fit.

    Args:
        fits: name of the block → its figures; usually one unnamed block.
    """
    if not any(key.endswith("_residual_removed") for fit in fits.values() for key in fit):
        return None
    unknown = {key: (key, "") for fit in fits.values() for key in fit if key not in FIT_WORDS}
    columns = {name or "value": fit for name, fit in fits.items()}
    return _tabulate_meanings("Figures of the fit on the calibration text", columns, FIT_WORDS | unknown)


def tabulate_parts(repaired: Figures) -> Table | None:
    """Return the figures of metrics/repair.json about removed parts of layers, with their meanings."""
    table = _tabulate_meanings("What was removed", {"value": repaired}, PART_WORDS)
    return table if table.rows else None


def _tabulate_meanings(caption: str, columns: Mapping[str, Figures], words: Mapping[str, tuple[str, str]]) -> Table:
    rows = [
        [name, *(format_number(figures[key]) if key in figures else "" for figures in columns.values()), meaning]
        for key, (name, meaning) in words.items()
        if any(key in figures for figures in columns.values())
    ]
    return Table(caption, ["", *columns, "meaning"], rows)


def _mark_contamination(task: str, evaluation: Figures) -> str:
    return f"{task} {CONTAMINATED}" if task in find_contaminated_tasks(evaluation) else task


def _note_contamination(evaluation: Figures, tasks: Iterable[str]) -> list[tuple[str, str]]:
    contaminated = [task for task in tasks if task in find_contaminated_tasks(evaluation)]
    if not contaminated:
        return []
    # Where the source is the same, but its text that of an earlier pruning, there is no overlap.
    overlaps = {task: 100 * evaluation["calibration_text"][task]["overlap"] for task in contaminated}
    listed = ", ".join(f"{overlap:.0f} % of {task}" for task, overlap in overlaps.items() if overlap)
    matches = f" (items with 13 of its words in a row: {listed})" if listed else ""
    return [(CONTAMINATED, f"scored on calibration text, which says nothing about other text{matches}")]
