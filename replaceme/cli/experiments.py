"""``replaceme compare``: the experiments of this repository in a table and two pictures, and the speed of their models.

``dvc exp show --json`` has each experiment's parameters, figures and checksums. With ``--speed``, each model is taken from
DVC's cache and measured against its dense model, unless one with the same checksum was measured before in the same setting.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replaceme.base.errors import ParameterError, ReplaceMeError, ResourceError, excerpt
from replaceme.base.files import new_folder, read_json, round_floats, temporary_folder, write_json
from replaceme.base.parameters import read_params
from replaceme.base.progress import align, logger, silence_libraries
from replaceme.methods.registry import METHODS
from replaceme.pipeline.results import SPEED_FILE
from replaceme.running.entry import Parser, plain_parser
from replaceme.running.extras import require_package
from replaceme.running.workspace import Workspace

if TYPE_CHECKING:
    from replaceme.report.experiment_table import Comparison, Experiment

TABLE_FILE = "experiments.csv"
# Git ignores it, so that a comparison leaves the repository clean.
OUTPUT = Path("artifacts/experiments")
MODEL, DENSE = Workspace().model.as_posix(), Workspace().model_input.as_posix()
Record = dict[str, Any]


def make_parser() -> Parser:
    """Return the command's parser."""
    description = "Compare the experiments of this repository: table, CSV and pictures."
    parser = plain_parser("replaceme compare", description, "replaceme compare --speed")
    parser.add_argument("--rev", action="append", help="commit whose experiments are compared; repeatable [HEAD]")
    parser.add_argument(
        "--num", type=int, default=1, help="number of commits, counted back from that one, whose experiments are compared [1]"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder for the results [{OUTPUT}]")
    parser.add_argument(
        "--speed", action="store_true", help="also measure each model against its dense one, unless it was measured before"
    )
    return parser


def compare(arguments: Sequence[str]) -> None:
    """Print the experiments side by side, and save the table and the pictures."""
    from replaceme.report.experiment_table import SPEEDS, format_comparison, tabulate_experiments

    options = make_parser().parse_args(arguments)
    output = options.output
    if output.exists() and not (output / TABLE_FILE).is_file():
        raise ParameterError(
            f"--output: {excerpt(output, 150)} exists and holds no comparison of experiments; choose another folder."
        )
    experiments = read_experiments(options.rev or [], options.num)
    comparison = tabulate_experiments(experiments)
    # Save before the measurement, which takes long.
    save_comparison(comparison, output)
    if options.speed:
        silence_libraries(load=True)
        by_commit = {each.commit: each for each in experiments}
        times = measure_speeds([by_commit[commit] for commit in comparison.table["commit"]], output / SPEED_FILE)
        for kind, title in SPEEDS.items():
            comparison.table[f"{title}_speedup"] = [record[kind]["speedup"] if record else None for record in times]
        save_comparison(comparison, output)
    rows, notes = format_comparison(comparison)
    print(align(rows), *notes, sep="\n")
    logger.info("the table and the pictures are in %s", output)


def read_experiments(revisions: Sequence[str], number: int) -> list[Experiment]:
    """Return the finished experiments of some commits (HEAD if none is named) and of those before, and the commits themselves.

    Raises:
        ResourceError: DVC isn't installed.
        ParameterError: DVC finds no repository here, or no such commit.
    """
    require_package("dvc", "compare")
    words = ["exp", "show", "--json", "--num", str(number), *(f"--rev={revision}" for revision in revisions)]
    done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.startswith("ERROR: ")), done.stderr)
        raise ParameterError(
            f"compare: DVC says: {excerpt(said.removeprefix('ERROR: '), 150)}; run it inside the pipeline's repository, with "
            "commits that it has."
        )
    states, unfinished = [], 0
    for commit in json.loads(done.stdout):
        runs = commit["experiments"] or []
        # A running experiment has the figures of the commit that it started from.
        finished = [run["revs"][0] for run in runs if (run["executor"] or {}).get("state", "success") == "success"]
        unfinished += len(runs) - len(finished)
        states += [commit, *finished]
    if unfinished:
        logger.info("%d experiments are queued, running or failed, and left out", unfinished)
    return [_read_state(state) for state in states if state["rev"] != "workspace" and state["data"]]


def _read_state(state: Record) -> Experiment:
    from replaceme.report.experiment_table import Experiment

    data = state["data"]
    files = {Path(path).stem: content.get("data") or {} for path, content in {**data["metrics"], **data["params"]}.items()}
    settings, evaluation = files.pop("params", {}), files.pop("evaluation", {})
    commit = state["rev"][:7]
    model = data["outs"].get(MODEL, {}).get("hash")
    return Experiment(state["name"] or commit, commit, settings, {**evaluation, **files}, model)


def save_comparison(comparison: Comparison, output: Path) -> None:
    """Write the table and the pictures into a folder, and keep the measured times that it holds."""
    from replaceme.report.experiment_figures import draw_methods, draw_quality
    from replaceme.report.experiment_table import format_comparison, format_markdown
    from replaceme.report.theme import to_png

    with new_folder(output) as folder:
        comparison.table.drop(columns="size").map(round_floats).convert_dtypes().to_csv(folder / TABLE_FILE, index=False)
        (folder / "experiments.md").write_text(format_markdown(*format_comparison(comparison)), encoding="utf-8")
        (folder / "quality.png").write_bytes(to_png(draw_quality(comparison)))
        if methods := draw_methods(comparison):
            (folder / "methods.png").write_bytes(to_png(methods))
        if (output / SPEED_FILE).is_file():
            shutil.copyfile(output / SPEED_FILE, folder / SPEED_FILE)


def measure_speeds(experiments: Sequence[Experiment], file: Path) -> list[Record | None]:
    """Return the times of each experiment, as from ``measure_speed``; None, after a warning, where the model is missing.

    Args:
        experiments: as from ``read_experiments``.
        file: JSON with earlier times; new ones are added at once.
    """
    known: list[Record] = read_json(file) if file.is_file() else []
    times: list[Record | None] = []
    for number, each in enumerate(experiments, 1):
        try:
            record = _measure(each, known, file.absolute().parent)
        except ReplaceMeError as problem:
            logger.warning("%s: its speed is left out: %s", each.name, problem)
            times.append(None)
            continue
        is_known = record in known
        if not is_known:
            known.append(record)
            write_json(file, known)
        times.append(record)
        speedups = record["prefill_seconds"]["speedup"], record["decode_seconds_per_token"]["speedup"]
        how = "known" if is_known else "measured"
        logger.info("%s (%d of %d): prefill × %.2f, decoding × %.2f, %s", each.name, number, len(experiments), *speedups, how)
    return times


def _measure(experiment: Experiment, known: Sequence[Record], folder: Path) -> Record:
    """Return the known times of an experiment's model, or measure it in a temporary folder next to ``folder``."""
    from dvc.api import DVCFileSystem

    from replaceme.models.find import recorded_model
    from replaceme.models.model import Model
    from replaceme.pipeline.speed import describe_setting, measure_speed

    params = read_params(None, dict(experiment.settings), methods=METHODS, preset="recommended")
    setting = {"model": experiment.model, **describe_setting(params)}
    for record in known:
        if setting.items() <= record.items():
            return record
    with temporary_folder(f"{folder.name}-", folder.parent) as copy:
        try:
            files = DVCFileSystem(rev=experiment.commit)
            files.get(MODEL, str(copy / "model"), recursive=True)
            files.get(DENSE, str(copy / "dense.json"))
        except Exception as failure:  # DVC raises many kinds of errors for a file that its cache lacks
            raise ResourceError(
                f"its model is not in DVC's cache ({type(failure).__name__}); `dvc exp apply {experiment.name}` and "
                "`dvc repro` make it again."
            ) from failure
        pruned = Model(copy / "model", experiment.name, trust_remote_code=params.trust_remote_code)
        times = measure_speed(params, recorded_model(params, copy / "dense.json"), pruned)
    return round_floats({"experiment": experiment.name, **times, **setting}, 4)
