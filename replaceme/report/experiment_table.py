"""The printed table of experiments: the most important columns, within 120 characters for a dozen methods."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from replaceme.base.progress import align
from replaceme.report.experiment_comparison import (
    ABOVE_CHANCE,
    ABSOLUTE,
    COSTS,
    ERROR,
    RATIO,
    RETENTION,
    SEEN,
    SPEEDS,
    UNSEEN,
    ExperimentComparison,
    cell,
    method_name,
)
from replaceme.report.tables import digits, quantity

COLUMNS = 120
TITLES = {"removed_percent": "removed", "parameters": "params", RETENTION: "kept", ABOVE_CHANCE: "above chance"}
TITLES |= {"compression_seconds": "time", "peak_memory_bytes": "memory", "peak_cuda_bytes": "GPU"}
TITLES |= {"prefill_speedup": "prefill", "decode_speedup": "decode"}


def shown(comparison: ExperimentComparison) -> tuple[list[list[str]], list[str]]:
    """Return the table as rows of cells, the heading first, and a note for each setting that has no column.

    A star marks the experiments that are the best for their size. With several methods, a setting that varies within one gets a
    column if the table then fits ``COLUMNS`` characters.
    """
    table, settings = comparison.table, list(comparison.varying)
    if table["method"].nunique() > 1:
        settings = []
        for name in comparison.varying:
            if len(align(_rows(table, [*settings, name])).splitlines()[0]) <= COLUMNS:
                settings.append(name)
    rows = _rows(table, settings)
    notes = [_note(table, name) for name in comparison.settings if name not in settings]
    if SEEN in rows[0]:
        notes.append(f"{SEEN}: tasks that are scored on calibration text")
    return rows, notes


def markdown(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return the same as a Markdown table, followed by the notes."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    text = "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
    return text + "".join(f"\n{note}\n" for note in notes)


def _rows(table: pd.DataFrame, settings: Sequence[str]) -> list[list[str]]:
    # Seven texts are too many columns: the headline stands for them, and the file has them all.
    ratios = [UNSEEN] if UNSEEN in table else [name for name in table if name.endswith(RATIO)]
    # CUDA's memory says more than that of the whole process.
    cuda = "peak_cuda_bytes" in table and table["peak_cuda_bytes"].notna().all()
    costs = [name for name in COSTS.values() if name != "peak_memory_bytes" or not cuda]
    columns = ["experiment", "method", *settings]
    columns += ["removed_percent", "parameters"]
    columns += [name for name in (RETENTION, ABOVE_CHANCE, *ratios) if name in table and table[name].notna().any()]
    columns += [SEEN] if (table[SEEN] != "").any() else []
    columns += [name for name in (*costs, *SPEEDS.values()) if name in table and table[name].notna().any()]
    titles = TITLES | ({ratios[0]: "perplexity"} if len(ratios) == 1 and ratios != [UNSEEN] else {})
    rows = [[titles.get(name, name) for name in columns]]
    for row in table.to_dict("records"):
        cells = [_shown(name, row, len(ratios) == 1) for name in columns]
        rows.append([f"{'* ' if row['best'] else '  '}{cells[0]}", *cells[1:]])
    return rows


def _note(table: pd.DataFrame, name: str) -> str:
    """Say which methods, or which experiments, have which value: ``repair: true in lstsq, else false``."""
    uses = table[table[name].map(cell) != ""]
    values = uses[name].map(cell)
    most, *others = values.value_counts().index
    constant = uses["method"].map(values.groupby(uses["method"]).nunique()) == 1
    who = uses["method"].where(constant, uses["experiment"])
    return (
        f"{name}: "
        + "".join(f"{value} in {', '.join(sorted(set(who[values == value])))}, " for value in others)
        + f"else {most}"
    )


FORMATS: Mapping[str, Callable[[float], str]] = {
    "removed_percent": lambda value: f"{value:.1f} %",
    "parameters": quantity,
    ABOVE_CHANCE: lambda value: f"{value:.1f} %",
    "compression_seconds": lambda value: _duration(value),
    "peak_memory_bytes": lambda value: _gigabytes(value),
    "peak_cuda_bytes": lambda value: _gigabytes(value),
    **dict.fromkeys(SPEEDS.values(), lambda value: f"× {value:.2f}"),
}


def _shown(name: str, row: Mapping[str, Any], absolute: bool) -> str:
    if name == "method":
        return method_name(row)
    value = row[name]
    if pd.isna(value):  # this experiment has no such score, or doesn't use the setting
        return ""
    if name == RETENTION:
        error = row.get(ERROR)
        return f"{value:.1f} %" if error is None or error != error else f"{value:.1f} ± {error:.1f} %"
    if name.endswith(RATIO):
        itself = row.get(name.removesuffix(RATIO) + ABSOLUTE)
        ratio = f"× {digits(value, 3)}"
        return f"{digits(itself, 4)} {ratio}" if absolute and itself == itself and itself is not None else ratio
    return FORMATS.get(name, cell)(value)


def _duration(seconds: float) -> str:
    unit, length = next((pair for pair in (("h", 3600), ("min", 60)) if seconds >= pair[1]), ("s", 1))
    return f"{seconds / length:.{int(seconds < 10 * length)}f} {unit}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
