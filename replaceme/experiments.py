"""The experiments of this workspace against each other: a table, and quality against size with the Pareto front.

``dvc exp show`` shows every column; this shows the settings that differ and the results that decide.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from replaceme.entry import run
from replaceme.errors import ParameterError
from replaceme.evaluation.comparison import align
from replaceme.files import new_folder, rounded
from replaceme.params import Params
from replaceme.progress import logger
from replaceme.report.theme import png
from replaceme.report.tradeoff import Point, pareto_front, quality_against_size

RATIO = " perplexity"
RETENTION, REMOVED = "retention_percent", "parameters.removed_percent"
SHORT = {"alpha": "α", "layers_to_skip": "layers"}
# Where a run was computed says nothing about what came out.
NO_SETTING = ("save_path", "save_transform_only", "device", "device_map")


def compare_experiments() -> NoReturn:
    """Print and save the table and the picture of the experiments."""
    options = parser().parse_args()
    sys.exit(run(lambda: _compare(options.rev, options.num, options.output), options.debug))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser(description="Compare the experiments of this repository: table, CSV and picture.")
    parser.add_argument("--rev", action="append", help="commit whose experiments are compared; can be repeated [HEAD]")
    parser.add_argument("--num", type=int, default=1, help="also those of the commits before it, this many in all [1]")
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder for the results [experiments]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _compare(revisions: Sequence[str] | None, number: int, output: Path) -> None:
    if output.exists() and not (output / "experiments.csv").is_file():
        raise ParameterError(f"--output: {output} exists and holds no comparison of experiments; choose another folder.")
    table = comparison_of(_recorded(revisions, number))
    shown = _shown(table)
    print(align(shown))
    with new_folder(output) as folder:
        table.map(rounded).to_csv(folder / "experiments.csv", index=False)
        (folder / "experiments.md").write_text(_markdown(shown), encoding="utf-8")
        (folder / "quality.png").write_bytes(png(_picture(table)))
    logger.info("the table and the picture are in %s", output)


def _recorded(revisions: Sequence[str] | None, number: int) -> list[dict[str, Any]]:
    """Return DVC's record of each experiment. Raises ParameterError where there is no repository."""
    from dvc.api import exp_show
    from dvc.exceptions import DvcException
    from scmrepo.exceptions import SCMError

    try:
        records: list[dict[str, Any]] = exp_show(revs=list(revisions) if revisions else None, num=number)
    except (DvcException, SCMError) as failure:
        raise ParameterError(
            f"compare_experiments: {' '.join(str(failure).split())} (run it inside the repository)."
        ) from failure
    return records


def comparison_of(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row an experiment: name, the settings that differ, results, and whether it is on the Pareto front.

    Args:
        records: what ``dvc.api.exp_show`` returns.

    Raises:
        ParameterError: nothing has been scored yet.
    """
    scored = [record for record in records if isinstance(record.get(REMOVED), int | float) and record.get("rev") != "workspace"]
    if not scored:
        raise ParameterError(
            "compare_experiments: no experiment has scores yet; run some, as in `dvc exp run --queue -S 'layers_to_skip=4,8'` "
            "and `dvc queue start`."
        )
    if left := sum(record.get("State") in ("Queued", "Running", "Failed") for record in records):
        logger.info("%d experiments are queued, running or failed, and left out", left)
    every = pd.DataFrame(scored)
    settings = [name for name in Params.model_fields if name in every and name not in NO_SETTING]
    differing = [name for name in settings if name != "method" and every[name].astype(str).nunique() > 1]
    for name in ("model_path", "tasks", "eval_tokens"):
        if name in differing:
            logger.warning("%s differs between experiments: their scores don't compare in absolute terms", name)
    table = pd.DataFrame({"experiment": [_name(record) for record in scored]})
    table[["method", *differing]] = every[["method", *differing]].convert_dtypes().astype(object)
    table["removed_percent"] = every[REMOVED].astype(float)
    results = {RETENTION: RETENTION, "retention_stderr": "retention_stderr", "relative_residual": "residual"}
    results |= {name: name.replace("accuracy.", "").replace(".pruned", "") for name in _of(every, "accuracy.", ".pruned")}
    for kind in ("perplexity", "word_perplexity"):  # lm-eval's own texts have no perplexity of tokens
        found = {name: f"{name.split('.')[1]}{RATIO}" for name in _of(every, f"{kind}.", ".ratio")}
        results |= {name: title for name, title in found.items() if title not in results.values()}
    for name, title in results.items():
        if name in every:
            table[title] = pd.to_numeric(every[name], errors="coerce")
    # The commit that the experiments start from is often one of them.
    table = table.drop_duplicates(subset=[name for name in table if name != "experiment"], keep="last", ignore_index=True)
    points, higher_is_better, quality = _points(table)
    front = pareto_front(points, higher_is_better)
    table.insert(1, "best", [point in front for point in points])
    return table.sort_values(["method", "removed_percent", quality], ascending=[True, True, False], ignore_index=True)


def _of(table: pd.DataFrame, start: str, end: str) -> list[str]:
    return [name for name in table if isinstance(name, str) and name.startswith(start) and name.endswith(end)]


def _name(record: Mapping[str, Any]) -> str:
    return str(record.get("Experiment") or record["rev"])


def _points(table: pd.DataFrame) -> tuple[list[Point], bool, str]:
    """Return the points of the picture, whether more is better, and the column that says how good an experiment is."""
    if RETENTION in table and table[RETENTION].notna().all():
        quality = RETENTION
    else:
        ratios = [name for name in table if name.endswith(RATIO) and table[name].notna().all()]
        if not ratios:
            raise ParameterError("compare_experiments: the experiments have no score in common; give them the same tasks.")
        quality = ratios[0]
    settings = _settings_of(table)
    points = [
        Point(
            ", ".join(f"{SHORT.get(name, name)} {_cell(row[name])}" for name in settings) or str(row["method"]),
            str(row["method"]), float(row["removed_percent"]), float(row[quality]),
        )
        for row in table.to_dict("records")
    ]  # fmt: skip
    return points, quality == RETENTION, quality


def _settings_of(table: pd.DataFrame) -> list[str]:
    return [name for name in Params.model_fields if name in table and name != "method"]


def _picture(table: pd.DataFrame) -> Any:
    points, higher_is_better, quality = _points(table)
    title = "accuracy kept (% of dense)" if higher_is_better else f"perplexity of {quality.removesuffix(RATIO)} (times dense)"
    return quality_against_size(points, title, higher_is_better)


FORMATS: Mapping[str, Callable[[float], str]] = {
    "removed_percent": lambda value: f"{value:.1f} %",
    RETENTION: lambda value: f"{value:.1f} %",
    "retention_stderr": lambda value: f"± {value:.1f}",
}
TITLES = {"removed_percent": "removed", RETENTION: "kept", "retention_stderr": ""}


def _shown(table: pd.DataFrame) -> list[list[str]]:
    """Return the columns that decide, as people read them; a star stands before what is best for its size."""
    columns = ["experiment", "method", *_settings_of(table), "removed_percent"]
    columns += [name for name in table if name in (RETENTION, "retention_stderr") or name.endswith(RATIO)]
    rows = [[TITLES.get(name, name) for name in columns]]
    for row in table.to_dict("records"):
        cells = [_shown_cell(name, row[name]) for name in columns]
        rows.append([f"{'* ' if row['best'] else '  '}{cells[0]}", *cells[1:]])
    return rows


def _shown_cell(name: str, value: Any) -> str:
    if value != value:  # not a number: this experiment has no such score
        return ""
    return f"× {value:.3g}" if name.endswith(RATIO) else FORMATS.get(name, _cell)(value)


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
