"""Experiments side by side: the settings that differ, what was removed, the scores and the cost, one row each.

Figures have their names in the metrics files, joined by dots (``perplexity.wikipedia.ratio``). Experiments are ranked by the
perplexity of unseen text if all have it; otherwise by the accuracy kept, or by the perplexity of a text that all have.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from replaceme.base.errors import ParameterError
from replaceme.base.progress import align, logger
from replaceme.methods.registry import FIELDS, has_effect, is_trained
from replaceme.report.formatting import format_digits, format_duration, format_quantity
from replaceme.running.stage import SCORE_SETTINGS

REMOVED, RETENTION = "parameters.removed_percent", "retention_percent"
UNSEEN = "common_unseen_ratio"
COSTS = ("summary.seconds", "summary.memory_gb", "summary.gpu_memory_gb")
SPEEDS = {"prefill_seconds": "prefill", "decode_seconds_per_token": "decode"}
# Where and how a model is computed or scored doesn't tell models apart; a note says where the scoring differs.
UNSHOWN = ("method", "save_path", "save_transform_only", "device", "device_map")
# Settings of a result's size.
SIZES = ("layers_to_skip", "remove", "tolerated_loss")
SHORT = {"layers_to_skip": "layers", "alpha": "α"}
# Two sizes are about the same if none of the steps between them is larger: percentage points of the parameters.
SIZE_STEP = 1.0
TABLE_WIDTH = 120


@dataclass(frozen=True)
class Experiment:
    """A finished run as DVC knows it.

    Attributes:
        name: DVC's name, or that of a branch.
        commit: its commit.
        settings: the content of its params.yaml.
        figures: the content of metrics/evaluation.json, and of each other metrics file under the file's name.
        model: DVC's checksum of the pruned model's folder.
    """

    name: str
    commit: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    model: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Experiments in a table, the smallest cut first and of each size the best first.

    Attributes:
        table: ``experiment``, ``best`` (no other is better at its size), ``method``, ``trained``, the settings as text, the
            figures, ``size`` (equal for about the same size) and ``commit``.
        settings: names of the settings that differ between the experiments that use them.
        quality: name of the figure that experiments are ranked by.
    """

    table: pd.DataFrame
    settings: list[str]
    quality: str

    @property
    def varying(self) -> list[str]:
        """The settings that differ within a method, those with the most values first, without those of the scoring."""
        names = [name for name in self.settings if name not in SCORE_SETTINGS]
        values = self.table.groupby("method")[names].nunique().max()
        return [str(name) for name in values[values > 1].sort_values(ascending=False, kind="stable").index]

    def name_series(self) -> pd.Series:
        """Name each experiment by its method and what tells it apart from others of its method, but for its size."""
        text = name_methods(self.table)
        for name in self.varying:
            differs = self.table.groupby("method")[name].transform("nunique") > 1
            is_named = differs & ~self.table[name].isin(["", "false"]) & (name not in SIZES)
            text += (f", {SHORT.get(name, name)} " + self.table[name]).where(is_named, "")
        return text


def tabulate_experiments(experiments: Sequence[Experiment]) -> Comparison:
    """Put experiments into a table.

    Raises:
        ParameterError: none has scores yet, or they have no score in common.
    """
    scored = [each for each in experiments if "parameters" in each.figures]
    if not scored:
        raise ParameterError(
            "compare: no experiment has scores yet; run some, as in `dvc exp run --queue -S 'layers_to_skip=4,8'` and "
            "`dvc queue start`."
        )
    settings = find_differing_settings([each.settings for each in scored])
    for name in ("model_path", "tasks", "eval_tokens"):
        if name in settings:
            logger.warning("%s differs between experiments: their scores are not comparable in absolute terms", name)
    figures = pd.json_normalize([dict(each.figures) for each in scored])
    names = {"experiment": [each.name for each in scored], "method": [str(each.settings.get("method")) for each in scored]}
    trained = ["trained" if _is_trained(each) else "" for each in scored]
    table = pd.concat([pd.DataFrame({**names, "trained": trained}), settings, figures], axis=1)
    if unseen := _find_unseen_texts(figures):
        table[UNSEEN] = np.exp(np.log(figures[unseen]).mean(axis=1))
    # The commit that the experiments start from often equals one of them.
    results = table.drop(columns=["experiment", *COSTS], errors="ignore").astype(str)
    table["commit"] = [each.commit for each in scored]
    table = table[~results.duplicated(keep="last")].reset_index(drop=True)
    quality = _choose_quality(table)
    better = 1 if quality == RETENTION else -1
    table.insert(1, "best", _is_best(table[REMOVED].to_numpy(), better * table[quality].to_numpy()))
    table["size"] = (table[REMOVED].sort_values().diff() > SIZE_STEP).cumsum()
    table = table.sort_values(["size", quality], ascending=[True, better < 0], ignore_index=True, kind="stable")
    return Comparison(table, list(settings), quality)


def find_differing_settings(settings: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the settings that differ between the experiments that use them, as params.yaml writes them; "" if unused."""
    defaults = {name: field.default for name, field in FIELDS.items()}
    used = [
        {name: format_setting(value) for name, value in own.items() if has_effect(name, defaults | dict(own))}
        for own in settings
    ]
    table = pd.DataFrame(used, columns=[name for name in FIELDS if name not in UNSHOWN])
    return table.loc[:, table.nunique() > 1].fillna("")


def format_setting(value: Any) -> str:
    """Return a parameter's value as params.yaml writes it."""
    if type(value) in (int, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")


def name_methods(table: pd.DataFrame) -> pd.Series:
    """Return each experiment's method, marked if it trained."""
    return table["method"] + table["trained"].map({"": "", "trained": " (trained)"})


def find_ratio_columns(table: pd.DataFrame) -> dict[str, str]:
    """Return the columns of perplexity over the dense model's, each with its task; lm-eval's own texts count words alone."""
    tasks: dict[str, str] = {}
    for kind in ("perplexity", "word_perplexity"):
        for name in table.filter(regex=rf"^{kind}\..*\.ratio$"):
            tasks.setdefault(name.removeprefix(f"{kind}.").removesuffix(".ratio"), name)
    return {name: task for task, name in tasks.items()}


def _is_trained(experiment: Experiment) -> bool:
    healed, checked = (experiment.figures.get(name) or {} for name in ("heal", "check"))
    return is_trained(str(experiment.settings.get("method")), healed, checked)


def _find_unseen_texts(figures: pd.DataFrame) -> list[str]:
    """Return the ratios of the texts that no experiment calibrated on: other texts for each wouldn't be comparable."""
    return [
        name
        for name, task in find_ratio_columns(figures).items()
        if figures.reindex(columns=[f"calibration_text.{task}.{mark}" for mark in ("seen", "same_domain")]).eq(0).all(axis=None)
        and figures[name].notna().all()
    ]


def _choose_quality(table: pd.DataFrame) -> str:
    for name in (UNSEEN, RETENTION, *find_ratio_columns(table)):
        if name in table and table[name].notna().all():
            return name
    raise ParameterError("compare: the experiments have no score in common; give them the same tasks.")


def _is_best(removed: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Tell which experiments are on the Pareto front: no other removed and scored as much, and more of one of both."""
    as_good = (removed >= removed[:, None]) & (score >= score[:, None])
    better = (removed > removed[:, None]) | (score > score[:, None])
    return np.asarray(~(as_good & better).any(axis=1))


def format_comparison(comparison: Comparison) -> tuple[list[list[str]], list[str]]:
    """Return the table as rows of cells, the heading first, and notes; a star marks the best of each size.

    A setting that varies within a method has a column if the table then fits ``TABLE_WIDTH`` characters, and a note otherwise.
    """
    table = comparison.table
    names = table["best"].map({True: "* ", False: "  "}) + table["experiment"]
    head = pd.DataFrame({"experiment": names, "method": name_methods(table)})
    cells = _format_figures(table)
    fitting: list[str] = []
    for name in comparison.varying:
        if len(align(_join_columns(head, table[[*fitting, name]], cells)).split("\n")[0]) <= TABLE_WIDTH:
            fitting.append(name)
    notes = [_describe_setting(table, name) for name in comparison.settings if name not in fitting]
    if UNSEEN in table:
        texts = [find_ratio_columns(table)[name] for name in _find_unseen_texts(table)]
        if not table.reindex(columns=["unseen.texts"]).eq(len(texts)).all(axis=None):
            notes.append(f"unseen: {', '.join(texts)}, which no experiment here has seen; unseen_ratio is over a run's own")
    if "seen" in cells:
        notes.append("seen: tasks that are scored on calibration text")
    return _join_columns(head, table[fitting], cells), notes


def format_markdown(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return the same as a Markdown table, followed by the notes."""
    escaped = [[cell.strip().replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (escaped[0], ["---"] * len(rows[0]), *escaped[1:])]
    return "\n\n".join(["\n".join(lines), *notes]) + "\n"


def _join_columns(*parts: pd.DataFrame) -> list[list[str]]:
    whole = pd.concat(parts, axis=1)
    return [list(whole), *whole.to_numpy().tolist()]


def _format_figures(table: pd.DataFrame) -> pd.DataFrame:
    """Return the figures as text; a column without any is left out."""

    def texts(name: str, form: Any) -> pd.Series:
        values = table.reindex(columns=[name])[name]
        return pd.Series(["" if pd.isna(value) else form(value) for value in values], index=table.index)

    def percents(name: str) -> pd.Series:
        return texts(name, "{:.1f} %".format)

    error = texts("retention_stderr", "± {:.1f} %".format)
    kept = texts(RETENTION, "{:.1f} ".format) + error.where(error != "", texts(RETENTION, lambda _: "%"))
    columns = {"removed": percents(REMOVED), "params": texts("parameters.pruned", format_quantity), "kept": kept}
    columns["above chance"] = percents("retention_above_chance_percent")
    # Seven texts are too many columns: the headline stands for them, and the file has them all.
    ratios = {UNSEEN: "unseen"} if UNSEEN in table else find_ratio_columns(table)
    for name, task in ratios.items():
        columns[f"{task} perplexity"] = texts(name, lambda ratio: f"× {format_digits(ratio, 3)}")
    if len(ratios) == 1 and UNSEEN not in ratios:
        (name,) = ratios
        absolute = texts(f"{name.removesuffix('ratio')}pruned", lambda value: f"{format_digits(value, 4)} ")
        columns["perplexity"] = absolute + columns.popitem()[1]
    seen = table.filter(regex=r"^calibration_text\..*\.seen$")
    tasks = seen.columns.str.removeprefix("calibration_text.").str.removesuffix(".seen")
    columns["seen"] = pd.Series([", ".join(tasks[row]) for row in seen.eq(1).to_numpy(dtype=bool)], index=table.index)
    seconds, memory, gpu_memory = COSTS
    columns["time"] = texts(seconds, format_duration)
    columns |= {title: texts(name, "{:.1f} GB".format) for title, name in (("memory", memory), ("GPU", gpu_memory))}
    columns |= {title: texts(f"{title}_speedup", "× {:.2f}".format) for title in SPEEDS.values()}
    cells = pd.DataFrame(columns)
    if (cells["GPU"] != "").all():
        cells = cells.drop(columns="memory")  # the GPU's says more than that of the whole process
    return cells.loc[:, (cells != "").any()]


def _describe_setting(table: pd.DataFrame, name: str) -> str:
    """Say which methods, or which experiments, have which value: ``repair: true in lstsq, else false``."""
    uses = table[table[name] != ""]
    most, *others = uses[name].value_counts().index
    is_constant = uses.groupby("method")[name].transform("nunique") == 1
    owners = uses["method"].where(is_constant, uses["experiment"]).groupby(uses[name]).unique()
    return f"{name}: " + "".join(f"{value} in {', '.join(sorted(owners[value]))}, " for value in others) + f"else {most}"
