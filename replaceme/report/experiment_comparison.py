"""Comparison of experiments: the settings that differ, what was removed, the scores that were kept, and the cost."""

import math
from ast import literal_eval
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd

from replaceme.base.errors import ParameterError
from replaceme.base.progress import logger
from replaceme.methods.registry import FIELDS, METHODS, has_effect
from replaceme.report.methods_figure import Row
from replaceme.report.tradeoff import Point, pareto_front

RATIO, ABSOLUTE = " perplexity", " perplexity, absolute"
RETENTION, ERROR, REMOVED = "retention_percent", "retention_stderr", "parameters.removed_percent"
ABOVE_CHANCE = "retention_above_chance_percent"
UNSEEN = f"unseen{RATIO}"
SHORT = {"alpha": "α", "layers_to_skip": "layers"}
# Where a run was computed doesn't change its results.
NO_SETTING = ("save_path", "save_transform_only", "device", "device_map")
# Settings of the scoring get no column and no label.
SCORING = ("tasks", "eval_tokens", "eval_batch_size", "eval_dtype")
# Costs vary from run to run, so they don't tell experiments apart.
COSTS = {"seconds": "compression_seconds", "peak_memory_bytes": "peak_memory_bytes", "peak_cuda_bytes": "peak_cuda_bytes"}
SPEEDS = {"prefill_seconds": "prefill_speedup", "decode_seconds_per_token": "decode_speedup"}
COUNTS = ("parameters", "peak_memory_bytes", "peak_cuda_bytes")
TRAINED = "trained"
UNFINISHED = ("Queued", "Running", "Failed")
# The tasks that are scored on calibration text.
SEEN = "seen"
# Percentage points of the parameters: less than a layer of a small model.
SAME_SIZE = 2.5
# The settings of a result's size; and how many series a picture tells apart.
SIZES, MOST_SERIES = ("layers_to_skip", "remove", "tolerated_loss"), 9


@dataclass(frozen=True)
class ExperimentComparison:
    """Experiments with their settings and results.

    Attributes:
        table: one row per experiment, with all columns.
        settings: the columns that are settings.
        varying: the settings that do not follow from the method's name, without those of the scoring.
        quality: the column that experiments are ranked by.
        higher_is_better: whether a higher quality is better.
    """

    table: pd.DataFrame
    settings: tuple[str, ...]
    varying: tuple[str, ...]
    quality: str
    higher_is_better: bool

    def points(self) -> list[Point]:
        """Return the experiments as points of size and quality.

        Those that differ in size alone are a series, unless there are too many of them to tell apart; then each method is one.
        """
        rows = self.table.to_dict("records")
        labels, series = [self._label(row) for row in rows], [self._series(row) for row in rows]
        if len(set(series)) > MOST_SERIES:
            series = [method_name(row) for row in rows]
        elif len({*zip(series, self.table["removed_percent"], strict=True)}) == len(rows) > len(set(series)):
            sizes = [name for name in self.varying if name in SIZES]
            labels = [", ".join(self._distinct_settings(row, sizes)) or label for row, label in zip(rows, labels, strict=True)]
        return [
            Point(label, name, float(row["removed_percent"]), float(row[self.quality]))
            for label, name, row in zip(labels, series, rows, strict=True)
        ]

    def same_size(self) -> tuple[list[Row], str]:
        """Return experiments of about the same size and at least two methods, and the column to compare them by.

        With several such sizes, the one with the most methods is taken. Perplexity is preferred, if all have it: it is finer
        than accuracy. That on unseen texts comes before that of single texts.
        """
        groups = [rows for rows in self._by_size() if len({row["method"] for row in rows}) > 1]
        if not groups:
            return [], ""
        rows = max(groups, key=lambda rows: (len({row["method"] for row in rows}), rows[0]["removed_percent"]))
        ratios = [name for name in self.table if name.endswith(RATIO) and all(row[name] == row[name] for row in rows)]
        column = self.quality if self.quality in ratios or not ratios else ratios[0]
        counts = pd.Series([row["method"] for row in rows]).value_counts()
        return [
            Row(
                str(row["method"]), float(row["removed_percent"]), float(row[column]), bool(row[TRAINED]),
                ", ".join(self._distinct_settings(row, self.varying) if counts[row["method"]] > 1 else []),
            )
            for row in rows
        ], column  # fmt: skip

    def _by_size(self) -> list[list[dict[str, Any]]]:
        rows, sizes = self.table.to_dict("records"), _sizes(self.table["removed_percent"])
        return [[row for row, _ in group] for _, group in groupby(zip(rows, sizes, strict=True), key=lambda pair: pair[1])]

    def _series(self, row: Mapping[str, Any]) -> str:
        """Return what tells an experiment's series apart: its method, and its settings but those of the size."""
        own = self.table[self.table["method"] == row["method"]]
        told = [name for name in self.varying if name not in SIZES and own[name].nunique(dropna=False) > 1]
        return ", ".join([method_name(row), *self._distinct_settings(row, told)])

    def _label(self, row: Mapping[str, Any]) -> str:
        """Return an experiment's name in a picture: its method, if there are several, and the settings that tell it apart."""
        settings = self._distinct_settings(row, self.varying)
        alone = self.table["method"].nunique() == 1
        return ", ".join(([] if alone and settings else [str(row["method"])]) + settings)

    def _distinct_settings(self, row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
        """Return those of these settings that tell an experiment apart from others of its method, if not switched off."""
        if (self.table["method"] == row["method"]).sum() == 1:
            return []
        values = {name: cell(row[name]) for name in names}
        off = {name for name, value in values.items() if value in ("", "false") or (name, value) == ("heal_epochs", "0")}
        return [f"{SHORT.get(name, name)} {value}" for name, value in values.items() if name not in off]


def comparison_of(records: Sequence[Mapping[str, Any]]) -> ExperimentComparison:
    """Return the experiments with their settings, results and costs, and whether they are on the Pareto front.

    Args:
        records: the experiments as ``dvc.api.exp_show`` returns them.

    Raises:
        ParameterError: no experiment has scores yet, or they have no score in common.
    """
    # A running experiment has the scores of the commit that it started from.
    ended = [record for record in records if record.get("State") not in UNFINISHED and record.get("rev") != "workspace"]
    scored = [record for record in ended if isinstance(record.get(REMOVED), int | float)]
    if not scored:
        raise ParameterError(
            "compare_experiments: no experiment has scores yet; run some, as in `dvc exp run --queue -S 'layers_to_skip=4,8'` "
            "and `dvc queue start`."
        )
    if left := sum(record.get("State") in UNFINISHED for record in records):
        logger.info("%d experiments are queued, running or failed, and left out", left)
    settings = _settings(scored)
    for name in ("model_path", "tasks", "eval_tokens"):
        if name in settings:
            logger.warning("%s differs between experiments: their scores are not comparable in absolute terms", name)
    table = pd.DataFrame({"experiment": [str(record.get("Experiment") or record["rev"]) for record in scored]})
    table["method"] = [str(record.get("method")) for record in scored]
    table[TRAINED] = [TRAINED if _trained(record) else "" for record in scored]
    table[list(settings)] = settings
    results, costs = _results(pd.DataFrame(scored))
    if unseen := _unseen_by_all(scored):
        results[UNSEEN] = unseen
    table = pd.concat([table, results, costs], axis=1)
    table[SEEN] = [_seen_tasks(record) for record in scored]
    table["revision"] = [str(record["rev"]) for record in scored]
    # The commit that the experiments start from often equals one of them.
    same = [name for name in table if name not in ("experiment", "revision", *costs)]
    table = table[~table[same].astype(str).duplicated(keep="last")].reset_index(drop=True)
    quality, higher_is_better = _quality(table)
    about = tuple(settings), _varying(table, list(settings)), quality, higher_is_better
    points = ExperimentComparison(table, *about).points()
    front = pareto_front(points, higher_is_better)
    table.insert(1, "best", [point in front for point in points])
    table["size"] = _sizes(table["removed_percent"])
    table = table.sort_values(["size", quality], ascending=[True, not higher_is_better], ignore_index=True, kind="stable")
    return ExperimentComparison(table.drop(columns="size"), *about)


def _settings(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the settings that differ between the experiments that use them; None for an experiment that doesn't use one."""
    defaults = {name: field.default for name, field in FIELDS.items()}
    found = []
    for record in records:
        given = {name: _setting(record, name) for name in defaults if _setting(record, name) is not None}
        values = defaults | {name: None if value == "None" else value for name, value in given.items()}
        found.append({name: value for name, value in given.items() if has_effect(name, values)})
    every = pd.DataFrame(found, columns=[name for name in defaults if name not in ("method", *NO_SETTING)])
    differing = every.loc[:, [every[name].dropna().astype(str).nunique() > 1 for name in every]]
    return differing.convert_dtypes().astype(object)


def _setting(record: Mapping[str, Any], name: str) -> Any:
    """Return a setting's value.

    DVC writes booleans as words, and puts the file before a parameter's name if a metric has the same name.
    """
    value = record.get(name) if f"params.yaml:{name}" not in record else record[f"params.yaml:{name}"]
    if isinstance(value, list | tuple | dict):
        return str(value)
    return {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value


def _trained(record: Mapping[str, Any]) -> bool:
    """Tell whether an experiment trained: by its recorded cost or, without one, by its settings."""
    if "trained" in record and record["trained"] == record["trained"]:
        return str(record["trained"]) in ("True", "1", "1.0")
    method = METHODS.get(str(record.get("method")))
    return (method is not None and method.trained) or _setting(record, "heal_epochs") not in (None, 0, "0")


def _marks(record: Mapping[str, Any], mark: str) -> dict[str, float | None]:
    """Return what an experiment's ``calibration_text`` says of each task: ``seen``, ``same_domain`` or ``overlap``."""
    start, end = "calibration_text.", f".{mark}"
    names = [name for name in record if name.startswith(start) and name.endswith(end)]
    return {name.removeprefix(start).removesuffix(end): _number(record, name) for name in names}


def _seen_tasks(record: Mapping[str, Any]) -> str:
    """Return the tasks that an experiment scored on calibration text, by name."""
    return ", ".join(sorted(task for task, seen in _marks(record, "seen").items() if seen == 1))


def _unseen_by_all(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return each experiment's geometric mean of the perplexity ratios, over the texts that none of them calibrated on.

    Empty if there are none, or if an experiment lacks a text. Other texts for each experiment would not be comparable.
    """
    unseen = []
    for record in records:
        same_domain = _marks(record, "same_domain")
        unseen.append({task for task, seen in _marks(record, "seen").items() if seen == 0 == same_domain.get(task)})
    ratios = [[_number(record, f"perplexity.{task}.ratio") for record in records] for task in sorted(set.intersection(*unseen))]
    common = [values for values in ratios if None not in values]
    return [math.exp(sum(map(math.log, own)) / len(common)) for own in zip(*common, strict=True)]


def _number(record: Mapping[str, Any], name: str) -> float | None:
    try:
        value = float(record[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _results(every: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the results and the costs, under the table's column names."""
    names = {REMOVED: "removed_percent", "parameters.pruned": "parameters", RETENTION: RETENTION, ERROR: ERROR}
    names |= {ABOVE_CHANCE: ABOVE_CHANCE}
    names |= {"relative_residual": "residual"}
    names |= {name: name.replace("accuracy.", "").replace(".pruned", "") for name in _of(every, "accuracy.", ".pruned")}
    for kind in ("perplexity", "word_perplexity"):  # lm-eval's own texts have no perplexity per token
        for name in _of(every, f"{kind}.", ".ratio"):
            task = name.removeprefix(f"{kind}.").removesuffix(".ratio")
            if f"{task}{RATIO}" not in names.values():
                names |= {name: f"{task}{RATIO}", name.removesuffix("ratio") + "pruned": f"{task}{ABSOLUTE}"}
    frames = (
        pd.DataFrame({title: pd.to_numeric(every[name], errors="coerce") for name, title in kind.items() if name in every})
        for kind in (names, COSTS)
    )
    results, costs = (frame.astype({name: "Int64" for name in COUNTS if name in frame}) for frame in frames)
    return results, costs


def _of(table: pd.DataFrame, start: str, end: str) -> list[str]:
    return [name for name in table if isinstance(name, str) and name.startswith(start) and name.endswith(end)]


def _quality(table: pd.DataFrame) -> tuple[str, bool]:
    """Return the column that experiments are ranked by, and whether higher is better."""
    if UNSEEN in table and table[UNSEEN].notna().all():
        return UNSEEN, False
    if RETENTION in table and table[RETENTION].notna().all():
        return RETENTION, True
    ratios = [name for name in table if name.endswith(RATIO) and table[name].notna().all()]
    if not ratios:
        raise ParameterError("compare_experiments: the experiments have no score in common; give them the same tasks.")
    return ratios[0], False


def _varying(table: pd.DataFrame, settings: Sequence[str]) -> tuple[str, ...]:
    """Return the settings that vary within a method, those with the most values first; with a single method, all settings.

    How the experiments were scored is left out.
    """
    settings = [name for name in settings if name not in SCORING]
    if table["method"].nunique() == 1:
        return tuple(settings)
    values = {name: table[name].astype(str) for name in settings}
    found = [name for name in settings if values[name].groupby(table["method"]).nunique().max() > 1]
    return tuple(sorted(found, key=lambda name: -values[name].nunique()))


def _sizes(removed: pd.Series) -> list[float]:
    """Return for each size the smallest size of its group: sizes within ``SAME_SIZE`` of that one."""
    first: dict[float, float] = {}
    for size in sorted(set(removed)):
        start = first[max(first)] if first else size
        first[size] = start if size - start <= SAME_SIZE else size
    return [first[size] for size in removed]


# DVC writes these values as Python does.
WORDS = {"True": "true", "False": "false", "None": "null"}


def method_name(row: Mapping[str, Any]) -> str:
    """Return an experiment's method, marked if it trained."""
    return f"{row['method']} ({TRAINED})" if row[TRAINED] else str(row["method"])


def cell(value: Any) -> str:
    """Return a value as params.yaml writes it; an empty text for a missing one."""
    if pd.isna(value):
        return ""
    if str(value) in WORDS:
        return WORDS[str(value)]
    if isinstance(value, float):
        return f"{value:g}"
    with suppress(ValueError, SyntaxError):
        # DVC writes a list as Python does.
        if isinstance(read := literal_eval(str(value)), list | tuple):
            return _listed(read)
    return str(value)


def _listed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_listed, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_listed(own)}' for key, own in value.items())}}}"
    return WORDS.get(str(value), str(value))
