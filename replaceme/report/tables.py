"""The page's tables as text cells, from the pipeline's figures. Rows, columns and tables without figures are left out.

All accuracies are in percent, so that the run's table and the published one can be read side by side.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from replaceme.report.published_table import ROWS, SOURCE

Figures = Mapping[str, Any]

SIGNIFICANT = 0.05
NOTES = {
    "*": "differs from the dense model at p < 0.05 (exact McNemar test or paired t-test over the same items, or over their "
    "articles where items share one)",
    "°": "no significant difference from the dense model (p ≥ 0.05, same test)",
    "‡": "the dense model isn't two standard errors above chance, so nothing can be said",
}
AT_CHANCE = "‡"
ACCURACY_ROWS = ("dense", "pruned", "% of dense", "… above chance", "difference", "p", "chance", "items")
SEEN = "†"
UNITS = {"perplexity": "token", "word_perplexity": "word", "byte_perplexity": "byte"}
SIZES = {
    "parameters": ("parameters", ""),
    "parameters_without_embeddings": ("… without embeddings", ""),
    "disk_bytes": ("size on disk", "B"),
    "kv_cache_bytes_per_token": ("KV cache per token", "B"),
}
FIT_WORDS = {
    "removed_layers": ("layers removed", "in the whole model"),
    "tokens": ("calibration tokens", "used for the fit"),
    "relative_residual": (
        "relative residual",
        "‖H − state‖ / ‖H‖ at the cut, over all tokens, where H is the dense model's state; 0 is perfect",
    ),
    "relative_residual_removed": ("… without a map", "the same with nothing in the block's place"),
    "weighted_residual": (
        "relative residual",
        "√ mean over tokens of ‖H − state‖² / ‖H‖² at the cut, where H is the dense model's state; 0 is perfect",
    ),
    "weighted_residual_joint": (
        "relative residual",
        "√ mean over tokens of ‖H − state‖² / ‖H‖² at the cut, H the dense model's state, before the MLP is solved again",
    ),
    "weighted_residual_transform": ("… with a map alone", "the same with the best map T on the MLP's output"),
    "weighted_residual_removed": ("… without either", "the same with nothing in the block's place"),
    "mean_cosine": (
        "mean cosine",
        "between the state with the map and the dense model's, averaged over tokens; 1 is perfect",
    ),
    "mean_cosine_removed": ("… without a map", "the same with nothing in the block's place"),
    "smallest_factor": ("smallest factor", "by which a channel is scaled"),
    "largest_factor": ("largest factor", "the same"),
    "condition_number": (
        "condition number",
        "of MᵀM + αI, where M is the map's input: how far noise in the text can be amplified",
    ),
    "smallest_eigenvalue": ("smallest eigenvalue", "of MᵀM: the scale to compare α with"),
    "alpha_over_smallest_eigenvalue": ("α / smallest eigenvalue", "far below 1, the ridge changes almost nothing"),
    "distance_from_identity": ("distance from identity", "‖T − I‖ / √d; 0 leaves the host layer unchanged"),
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
        link: source of the figures, if not the run itself.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[tuple[str, str]] = ()
    link: str = ""


def accuracy_table(evaluation: Figures) -> Table | None:
    """Return dense and pruned accuracy and what is kept of it: the average first, then one column per task."""
    tasks = evaluation.get("accuracy")
    if not tasks:
        return None
    marks = {name: _mark(task) for name, task in tasks.items()}
    columns = {
        _named(name, evaluation): {
            "dense": _percent(task, "dense"),
            "pruned": f"{_percent(task, 'pruned')} {marks[name]}".rstrip(),
            "% of dense": f"{100 * task['pruned'] / task['dense']:.1f}" if task["dense"] else "",
            "… above chance": _above_chance(task, "above_chance"),
            "difference": _difference(task),
            "p": _p_value(task["p_value"]) if "p_value" in task else "",
            "chance": f"{100 * task['chance']:.1f}" if "chance" in task else "",
            "items": str(task.get("items", "")),
        }
        for name, task in tasks.items()
    }
    if average := evaluation.get("average_accuracy"):
        columns = {"average": _average_column(evaluation, average), **columns}
    rows = [[name, *(column.get(name, "") for column in columns.values())] for name in ACCURACY_ROWS]
    said = {cell.split()[-1] for row in rows for cell in row[1:] if cell}
    notes = [(mark, note) for mark, note in NOTES.items() if mark in said]
    return Table(
        "Accuracy in percent, ± one standard error (of the difference: paired over the items, or their articles)",
        ["", *columns],
        [row for row in rows if any(row[1:])],
        [*notes, *_seen_notes(evaluation, tasks)],
    )


def _average_column(evaluation: Figures, average: Figures) -> dict[str, str]:
    column = {
        "dense": f"{100 * average['dense']:.1f}",
        "pruned": f"{100 * average['pruned']:.1f}",
        "… above chance": _above_chance({**average, **evaluation}, "retention_above_chance"),
        "difference": _minus(f"{100 * (average['pruned'] - average['dense']):+.1f}"),
        "chance": f"{100 * average['chance']:.1f}" if "chance" in average else "",
    }
    if "retention_percent" in evaluation:
        column["% of dense"] = _kept(evaluation, "retention")
    return column


def _above_chance(figures: Figures, key: str) -> str:
    """Return the share of the accuracy above chance that is kept; a mark where the dense model isn't above chance."""
    if "chance" not in figures:
        return ""
    return _kept(figures, key) if f"{key}_percent" in figures else AT_CHANCE


def _kept(figures: Figures, key: str) -> str:
    error = figures.get(f"{key}_stderr")
    return _minus(f"{figures[f'{key}_percent']:.1f}") + ("" if error is None else f" ± {error:.1f}")


def divergence_table(evaluation: Figures) -> Table | None:
    """Return how far the pruned model is from the dense one on each text, and on those that were not calibrated on."""
    texts, known = evaluation.get("divergence", {}), evaluation.get("calibration_text", {})
    rows = [
        [
            task,
            f"× {_with_error(evaluation['perplexity'][task], 'ratio')}",
            _calibrated(known[task]) if task in known else "",
            _with_error(figures, "kl"),
            _percent_with_error(figures, "agreement"),
        ]
        for task, figures in texts.items()
        if task in evaluation.get("perplexity", {})
    ]
    unseen = evaluation.get("unseen", {})
    if {"perplexity_ratio", "kl"} <= unseen.keys():
        ratio = f"× {_with_error(unseen, 'perplexity_ratio')}"
        rows.insert(0, ["unseen texts", ratio, "no", _with_error(unseen, "kl"), _percent_with_error(unseen, "agreement")])
    notes = [
        ("KL:", "divergence of the pruned model's predictions from the dense model's, for each token"),
        ("same token:", "share of positions with the dense model's most likely token"),
        ("unseen texts:", "geometric mean of the ratios, mean of the others, over the texts marked no"),
    ]
    head = ["text", "perplexity ratio", "calibrated on", "KL, nats", "same token, %"]
    return Table("Distance from the dense model by text, ± one standard error", head, rows, notes) if rows else None


def _calibrated(text: Figures) -> str:
    return "yes" if text["seen"] else "its domain" if text["same_domain"] else "no"


def _percent_with_error(figures: Figures, key: str) -> str:
    error = figures.get(f"stderr_{key}")
    return f"{100 * figures[key]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def perplexity_table(evaluation: Figures) -> Table | None:
    """Return the perplexities of each task per token, word and byte."""
    tasks = dict.fromkeys(task for group in UNITS for task in evaluation.get(group, {}))
    rows = [
        [
            f"{_named(task, evaluation)}, per {unit}",
            f"× {_with_error(figures, 'ratio')}",
            *(_with_error(figures, side) for side in ("dense", "pruned")),
        ]
        for task in tasks
        for group, unit in UNITS.items()
        if (figures := evaluation.get(group, {}).get(task))
    ]
    head, notes = ["", "ratio", "dense", "pruned"], _seen_notes(evaluation, tasks)
    return Table("Perplexity, ± one standard error", head, rows, notes) if rows else None


def size_table(evaluation: Figures) -> Table | None:
    """Return the sizes of both models."""
    rows = [
        [name, *(quantity(evaluation[key][side], unit) for side in ("dense", "pruned")), _saved(evaluation[key])]
        for key, (name, unit) in SIZES.items()
        if key in evaluation
    ]
    return Table("Size", ["", "dense", "pruned", "saved"], rows) if rows else None


def times_table(speed: Figures) -> Table:
    """Return the measured times (``render``'s argument ``speed``)."""
    names = {
        "prefill_seconds": f"prefill of {speed['prompt_tokens']} tokens",
        "decode_seconds_per_token": f"each of {speed['new_tokens']} new tokens",
    }
    rows = [
        [name, *(_seconds(speed[key][side]) for side in ("dense", "pruned")), f"× {speed[key]['speedup']:.2f}"]
        for key, name in names.items()
    ]
    threads = f", {speed['threads']} threads" if speed["device"] == "cpu" else ""
    caption = (
        f"Measured on {speed['device']}{threads}: {speed['dtype']}, batch of {speed['batch_size']}, {speed['rounds']} rounds"
    )
    # Times that an earlier version measured name no machine.
    notes = [("Measured on", speed["machine"])] if "machine" in speed else []
    return Table(caption, ["", "dense", "pruned", "speedup"], rows, notes)


def cost_table(cost: Figures) -> Table:
    """Return what the compression cost (metrics/compression.json), stage by stage."""
    rows = [[stage, _seconds(seconds)] for stage, seconds in cost.get("stage_seconds", {}).items()]
    if "seconds" in cost:
        rows.append(["all stages", _seconds(cost["seconds"])])
    for key, name in (("peak_memory_bytes", "peak memory"), ("peak_cuda_bytes", "peak GPU memory")):
        if key in cost:
            rows.append([name, quantity(cost[key], "B")])
    if missing := cost.get("stages_not_measured"):
        rows.append(["not measured here", f"{missing} stage{'s' * (missing > 1)}"])
    notes = [("Measured on", machine) for machine in cost.get("machines", [])]
    return Table("Cost of the compression, of each stage in the run that made its output", ["", "cost"], rows, notes)


def fit_table(fits: Mapping[str, Figures]) -> Table:
    """Return the figures of metrics/solve.json with their meanings.

    Args:
        fits: name of the block → its figures; usually one unnamed block.
    """
    keys = dict.fromkeys([*FIT_WORDS, *(key for fit in fits.values() for key in fit)])
    rows = [
        [FIT_WORDS.get(key, (key, ""))[0], *(number(fit[key]) if key in fit else "" for fit in fits.values()), _meaning(key)]
        for key in keys
        if any(key in fit for fit in fits.values())
    ]
    return Table("Figures of the fit on the calibration text", ["", *(name or "value" for name in fits), "meaning"], rows)


def parts_table(figures: Figures) -> Table | None:
    """Return the figures of metrics/repair.json about removed parts of layers, with their meanings."""
    rows = [[name, number(figures[key]), meaning] for key, (name, meaning) in PART_WORDS.items() if key in figures]
    return Table("What was removed", ["", "value", "meaning"], rows) if rows else None


def published_table(label: str) -> Table:
    """Return the published table, captioned with ``label``."""
    rows = [
        [row.method, f"{row.percent_of_dense:.1f}", f"{100 * row.average:.1f}", *(f"{100 * value:.1f}" for value in row[1:5])]
        for row in ROWS
    ]
    head = ["", "% of dense", "average", "BoolQ", "HellaSwag", "PIQA", "MMLU"]
    return Table(f"Accuracy in percent, 25 % of the layers removed; {label}", head, rows, link=SOURCE)


def number(value: float) -> str:
    """Write a figure with four significant digits, an integer in full."""
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e7):
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.4g}")


def digits(value: float, count: int) -> str:
    """Write a figure with ``count`` significant digits, trailing zeros included, and one with more integer digits in full."""
    return f"{value:#.{count}g}".rstrip(".") if value < 10**count else f"{value:,.0f}"


def quantity(value: float, unit: str = "") -> str:
    """Write a large figure with a decimal prefix: ``134.5 M``, ``269.1 MB``."""
    prefixes = ["", "k", "M", "G", "T"]
    while abs(value) >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.4g} {prefixes[0]}{unit}".rstrip()


def seen_in(evaluation: Figures, tasks: Iterable[str]) -> list[str]:
    """Return those of some tasks that are scored on calibration text."""
    texts = evaluation.get("calibration_text", {})
    return [task for task in tasks if texts.get(task, {}).get("seen")]


def _named(task: str, evaluation: Figures) -> str:
    return f"{task} {SEEN}" if seen_in(evaluation, [task]) else task


def _seen_notes(evaluation: Figures, tasks: Iterable[str]) -> list[tuple[str, str]]:
    seen = seen_in(evaluation, tasks)
    if not seen:
        return []
    copies = {task: 100 * evaluation["calibration_text"][task]["overlap"] for task in seen}
    # None are found where a source is the same, but its text that of an earlier pruning.
    shares = ", ".join(f"{percent:.0f} % of {task}" for task, percent in copies.items() if percent)
    found = f" (items with 13 of its words in a row: {shares})" if shares else ""
    return [(SEEN, f"scored on calibration text, which says nothing about other text{found}")]


def _mark(task: Figures) -> str:
    if "p_value" not in task:
        return ""
    return "*" if task["p_value"] < SIGNIFICANT else "°"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _percent(task: Figures, key: str) -> str:
    error = task.get(f"stderr_{key}")
    return f"{100 * task[key]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _difference(task: Figures) -> str:
    error = task.get("stderr_diff")
    return _minus(f"{100 * (task['pruned'] - task['dense']):+.1f}") + ("" if error is None else f" ± {100 * error:.1f}")


def _with_error(figures: Figures, key: str) -> str:
    error = figures.get(f"stderr_{key}")
    # Four digits, and two of the error, zeros at the end included, so that the figures of a column can be compared at a glance.
    return digits(figures[key], 4) + ("" if error is None else f" ± {digits(error, 2)}")


def _saved(pair: Figures) -> str:
    return f"{pair['removed_percent']:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _meaning(key: str) -> str:
    return FIT_WORDS.get(key, ("", ""))[1]


def _minus(text: str) -> str:
    return text.replace("-", "−")
