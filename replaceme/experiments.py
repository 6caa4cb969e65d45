"""The experiments of this workspace against each other: a table, quality against size, and methods at the same size.

``dvc exp show`` shows every column; this shows the settings that differ, the results that decide, and what they cost.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from replaceme.entry import run
from replaceme.errors import ParameterError
from replaceme.evaluation.comparison import align
from replaceme.experiment_speed import speeds_of
from replaceme.files import new_folder, rounded
from replaceme.progress import logger
from replaceme.report.experiment_table import markdown, shown
from replaceme.report.experiments import RATIO, RETENTION, SPEEDS, Comparison, comparison_of
from replaceme.report.methods import methods_figure
from replaceme.report.theme import png
from replaceme.report.tradeoff import quality_against_size

SPEED_FILE = "speed.json"


def compare_experiments() -> NoReturn:
    """Print and save the table and the pictures of the experiments."""
    options = parser().parse_args()
    sys.exit(run(lambda: _compare(options.rev, options.num, options.output, options.speed), options.debug))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser(description="Compare the experiments of this repository: table, CSV and pictures.")
    parser.add_argument("--rev", action="append", help="commit whose experiments are compared; can be repeated [HEAD]")
    parser.add_argument("--num", type=int, default=1, help="also those of the commits before it, this many in all [1]")
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder for the results [experiments]")
    parser.add_argument(
        "--speed", action="store_true", help="measure each model that was not measured before against its dense one"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _compare(revisions: Sequence[str] | None, number: int, output: Path, speed: bool = False) -> None:
    if output.exists() and not (output / "experiments.csv").is_file():
        raise ParameterError(f"--output: {output} exists and holds no comparison of experiments; choose another folder.")
    comparison = comparison_of(_recorded(revisions, number))
    # What is there is saved before the measurement, which takes long.
    _save(comparison, output)
    if speed:
        _add_speeds(comparison, output)
        _save(comparison, output)
    rows, notes = shown(comparison)
    print(align(rows), *notes, sep="\n")
    logger.info("the table and the pictures are in %s", output)


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


def _add_speeds(comparison: Comparison, output: Path) -> None:
    times = speeds_of(comparison.table.to_dict("records"), output / SPEED_FILE)
    for kind, column in SPEEDS.items():
        comparison.table[column] = [record[kind]["speedup"] if record else None for record in times]


def _save(comparison: Comparison, output: Path) -> None:
    """Write the table and the pictures; the times that were measured stay."""
    with new_folder(output) as folder:
        comparison.table.map(rounded).to_csv(folder / "experiments.csv", index=False)
        (folder / "experiments.md").write_text(markdown(*shown(comparison)), encoding="utf-8")
        title = _title(comparison.quality)
        (folder / "quality.png").write_bytes(png(quality_against_size(comparison.points(), title, comparison.higher_is_better)))
        rows, column = comparison.same_size()
        if rows:
            (folder / "methods.png").write_bytes(png(methods_figure(rows, _title(column), column == RETENTION)))
        if (output / SPEED_FILE).is_file():
            shutil.copyfile(output / SPEED_FILE, folder / SPEED_FILE)


def _title(column: str) -> str:
    return "accuracy kept (% of dense)" if column == RETENTION else f"perplexity of {column.removesuffix(RATIO)} (times dense)"
